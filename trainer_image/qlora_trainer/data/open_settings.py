"""Chooses the settings that a job leaves open, from its tokenized rows."""

from collections.abc import Callable

import numpy

from qlora_api.automatic import Limits, choose, choose_length
from qlora_api.choice import Choice
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import fill
from qlora_trainer.data.dataset import Dataset
from qlora_trainer.model.families.family import Traits


def build_in_length(
    spec: QLoRAJobSpec, build: Callable[[QLoRAJobSpec], Dataset], context: int | None
) -> tuple[Dataset, tuple[Choice, ...]]:
    """Build the data set, and choose the tokens of a sequence if the job leaves them open.

    `context`: tokens of a row that the model has positions for, None for any number.
    """
    dataset = build(spec)
    if spec.training.max_sequence_length is not None:
        return dataset, ()
    lengths = numpy.concatenate([source.all_lengths() for source in dataset.sources]).tolist()
    chosen = choose_length(lengths, context)
    if dataset.rows.lengths.max() > int(chosen.value):
        dataset = build(fill(spec, [chosen]))
    return dataset, (chosen,)


def choose_settings(
    spec: QLoRAJobSpec, dataset: Dataset, traits: Traits, of_length: tuple[Choice, ...], limits: Limits
) -> tuple[Choice, ...]:
    """Choose all settings that the job leaves open. `of_length`: as chosen for `dataset`."""
    in_length = fill(spec, of_length)
    length = in_length.training.max_sequence_length
    if length is None:
        raise AssertionError("the length of a sequence is set or chosen")
    facts = dataset.facts(length, spec.training.seed, packed=traits.packs(in_length.training))
    held_out = () if dataset.chosen_share is None else (dataset.chosen_share,)
    chosen = choose(in_length, length, facts, traits.require_sizes(), limits)
    return (*of_length, *held_out, *chosen)
