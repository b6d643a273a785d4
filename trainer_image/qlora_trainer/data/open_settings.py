"""Chooses the settings that a job leaves open, from its tokenized rows."""

from collections.abc import Callable

import numpy

from qlora_api.automatic import Choose, ModelFacts, choose, choose_length
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


def settings_chooser(
    spec: QLoRAJobSpec, of_length: tuple[Choice, ...], dataset: Dataset, model: ModelFacts, *, packed: bool
) -> Choose:
    """Return how all settings that the job leaves open are chosen.

    `spec`: filled with `of_length` of `build_in_length`. `packed`: whether a sequence may have several rows.
    """
    length = spec.training.max_sequence_length
    if length is None:
        raise AssertionError("the length of a sequence is set or chosen")
    held_out = () if dataset.chosen_share is None else (dataset.chosen_share,)
    facts = dataset.facts(length, spec.training.seed, packed=packed)
    return lambda limits: (*of_length, *held_out, *choose(spec, length, facts, model, limits))
