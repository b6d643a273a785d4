"""Measures a job's memory: runs micro batches of its model without data."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig

from qlora_api.gpus import has_room_for_groups
from qlora_api.memory.estimate import ActivationBytes
from qlora_api.memory.weights import SMALLEST_PAGED_TENSOR
from qlora_api.schema import replace
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.model.adapter.attach import adapter_name, attach_further_adapter
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.architecture.vocabulary import spreadable
from qlora_trainer.model.experts.stack import Mxfp4Stack, expert_stacks
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.memory.answer_bytes import answer_bytes
from qlora_trainer.model.memory.device import fake_batch, fake_cuda, on_fake_cuda
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.skeleton import adapted_skeleton
from qlora_trainer.model.memory.step import full_batch, joint_step_bytes, step_bytes
from qlora_trainer.model.protocols import AdaptedModel, Network
from qlora_trainer.model.source.files import CONFIG


def measure(
    config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str, family: Family | None = None
) -> MeasuredMemory:
    """Run a micro batch of each size of the model with this config.json, at full depth. Takes seconds for each.

    `family` is what an inspection for the same adapter has found; without it the model is inspected.

    Gradients of an earlier micro batch exist, as when they are accumulated. Raises StepFailure for a model that
    cannot be trained, and what PyTorch and transformers raise for one that they cannot run so.
    """
    # A process that was forked has none of its parent's threads, which PyTorch would wait for.
    torch.set_num_threads(1)
    family = family or _inspect(config, spec.lora)
    read = AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=False)
    steps: list[MeasuredStep] = []
    for checkpointing in sorted({size.gradient_checkpointing for size in sizes}):
        training = replace(spec.training, gradient_checkpointing=checkpointing)
        model = adapted_skeleton(read, family, spec.lora, training, spec.quantization)
        wanted = [size for size in sizes if size.gradient_checkpointing == checkpointing]
        steps += _steps(model, wanted, spec)
    return _count(model, spec, steps, digest)


def measure_together(
    config: Path, specs: Sequence[ResolvedSpec], passes: Sequence[tuple[int, ...]], family: Family | None = None
) -> tuple[ActivationBytes, ...]:
    """Run passes with a micro batch of each of several jobs, given by their numbers, of one model with all adapters.

    `family` is what an inspection for the adapter of the first job has found. Raises as `measure` does.
    """
    torch.set_num_threads(1)
    first, families = specs[0], _inspect_each(config, specs, family)
    read = AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=False)
    model = adapted_skeleton(read, families[0], first.lora, first.training, first.quantization)
    names = [adapter_name(position) for position in range(len(specs))]
    for name, spec, of_job in zip(names[1:], specs[1:], families[1:], strict=True):
        with torch.device("meta"):
            attach_further_adapter(
                model, name, spec.lora, of_job.target_modules, seed=spec.training.seed, base_name="", base_revision=""
            )
    full = [full_batch(spec.training.micro_batch_size, spec.training.max_sequence_length) for spec in specs]
    with trained_on_fake_cuda(model, first.resources.gpu_gib):
        steps = [
            joint_step_bytes(model, {names[number]: fake_batch(full[number]) for number in numbers})
            for numbers in passes
        ]
    recomputes = first.training.gradient_checkpointing
    return tuple(
        ActivationBytes.from_pass(step.kept, step.loss, step.work, recomputes_all=recomputes) for step in steps
    )


@contextmanager
def trained_on_fake_cuda(model: AdaptedModel, gpu_gib: float | None) -> Iterator[None]:
    """In the body the model is on a GPU, without data, with accumulated gradients.

    The job gives the GPU's memory only, so the run counts what takes more: Ampere's kernel for attention, and all
    experts of a block together if a GPU of that memory may have the kernel.
    """
    with fake_cuda(groups_experts=has_room_for_groups(gpu_gib)):
        on_fake_cuda(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        yield


def _inspect(config: Path, lora: ResolvedLora) -> Family:
    with TemporaryDirectory() as folder:
        return inspect_family(Path(shutil.copyfile(config, Path(folder) / CONFIG)).parent, lora)


def _inspect_each(config: Path, specs: Sequence[ResolvedSpec], first: Family | None) -> list[Family]:
    """The inspection for each job, once for equal adapters."""
    found: dict[str, Family] = {} if first is None else {specs[0].lora.model_dump_json(): first}
    for spec in specs:
        adapter = spec.lora.model_dump_json()
        if adapter not in found:
            found[adapter] = _inspect(config, spec.lora)
    return [found[spec.lora.model_dump_json()] for spec in specs]


def _steps(model: AdaptedModel, sizes: Sequence[StepSize], spec: ResolvedSpec) -> list[MeasuredStep]:
    pairs = spec.training.compares_answers
    batches = [full_batch(size.sequences, size.sequence_tokens, pairs=pairs) for size in sizes]
    with trained_on_fake_cuda(model, spec.resources.gpu_gib):
        return [
            MeasuredStep(**asdict(size), **asdict(step_bytes(model, fake_batch(batch))))
            for size, batch in zip(sizes, batches, strict=True)
        ]


def _count(model: AdaptedModel, spec: ResolvedSpec, steps: Sequence[MeasuredStep], digest: str) -> MeasuredMemory:
    packed = {id(module.weight) for module in model.modules() if isinstance(module, Linear4bit)}
    in_nf4, in_mxfp4 = _in_4_bit(model)
    blocks = [sum(_in_4_bit(block)) for block in decoder_blocks(model.get_base_model())]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapter = [parameter.numel() for name, parameter in trained if ".lora_" in name]
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in packed]
    config = model.config.get_text_config(decoder=True)
    answers = answer_bytes(config)
    return MeasuredMemory(
        digest=digest,
        blocks=config.num_hidden_layers,
        rank=spec.lora.rank,
        quantized_parameters=in_nf4,
        mxfp4_parameters=in_mxfp4,
        two_blocks=max(map(sum, pairwise(blocks)), default=sum(blocks)) / (in_nf4 + in_mxfp4),
        unquantized_bytes=sum(parameter.nbytes for parameter in frozen),
        vocabulary_bytes=sum(
            weight.nbytes for weight in {module.weight for module in spreadable(model.get_base_model())}
        ),
        adapter_parameters=sum(adapter),
        pageable_parameters=sum(size for size in adapter if size >= SMALLEST_PAGED_TENSOR),
        whole_parameters=sum(parameter.numel() for name, parameter in trained if ".lora_" not in name),
        answer_bytes_per_token=answers.per_token,
        answer_bytes_per_pair=answers.per_pair,
        steps=tuple(steps),
    )


def _in_4_bit(part: Network) -> tuple[int, int]:
    """The weights in NF4 or FP4, and in MXFP4."""
    layers = [module.quant_state.shape.numel() for module in part.modules() if isinstance(module, Linear4bit)]
    stacks = [stack for _, stack in expert_stacks(part)]
    in_mxfp4 = sum(stack.parameters_count for stack in stacks if isinstance(stack, Mxfp4Stack))
    return sum(layers) + sum(stack.parameters_count for stack in stacks) - in_mxfp4, in_mxfp4
