"""Chooses the settings that a job leaves open, from its tokenized rows."""

from collections.abc import Callable

import numpy

from qlora_api.automatic import Limits, ModelFacts, choose, choose_length
from qlora_api.choice import Choice
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import fill
from qlora_trainer.data.dataset import Dataset


def build_in_length(
    spec: QLoRAJobSpec, build: Callable[[QLoRAJobSpec], Dataset], context: int | None
) -> tuple[Dataset, tuple[Choice, ...]]:
    """Build the data set, and choose the tokens of a sequence if the job leaves them open.

    `context`: tokens of a row that the model has positions for, None for any number.
    """
    dataset = build(spec)
    if spec.training.max_sequence_length is not None:
        return dataset, ()
    lengths = numpy.concatenate([source.all_lengths() for source in dataset.training]).tolist()
    chosen = choose_length(lengths, context)
    if dataset.rows.lengths.max() > int(chosen.value):
        dataset = build(fill(spec, [chosen]))
    return dataset, (chosen,)


def choose_settings(
    spec: QLoRAJobSpec, dataset: Dataset, model: ModelFacts, limits: Limits, *, packed: bool
) -> tuple[Choice, ...]:
    """Choose all settings that the job leaves open but the length of a sequence, which `build_in_length` chooses.

    `packed`: whether a sequence may have several rows.
    """
    length = spec.training.max_sequence_length
    if length is None:
        raise AssertionError("the length of a sequence is set or chosen")
    held_out = () if dataset.chosen_share is None else (dataset.chosen_share,)
    return (*held_out, *choose(spec, length, dataset.facts(length, spec.training.seed, packed=packed), model, limits))
