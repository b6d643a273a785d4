"""Training equals a plain loop over one example at a time with transformers, peft and bitsandbytes alone.

The reference shares nothing with the trainer but its files: it tokenizes by itself, loads and prepares the model as
PEFT advises, takes the loss that transformers computes from labels, and steps PyTorch's AdamW. In float32 both differ
by the order of sums only: 1e-6 of a loss is allowed, and of a tensor 1e-5 of its length (2⁻²⁴ is 6e-8). In bfloat16
each product is rounded to 2⁻⁹: the loss may be off by 2e-4, the gradient by 1e-2 and 1.5 times the reference's, and a
single tensor's by twice as much.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_parameters, adapter_tensors, restore_adapter
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.exact import compute_in_float32, random_words
from tests.support.models.adapted import adapted
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.training import history, run
from tests.trainer.conftest import MakeContext

TrainOn = Literal["completion", "all"]
LOSS_TOLERANCE = 1e-6
TENSOR_TOLERANCE = 1e-5
STEPS = 5
RATE = 0.01
CLIP = 0.3


def random_rows(seed: int) -> list[dict[str, Any]]:
    """Return questions and answers of 1 to 16 words, for rows of every length."""
    random = Random(seed)
    return [chat_row(random_words(random, 16), random_words(random, 16)) for _ in range(9)]


@dataclass(frozen=True)
class Example:
    """One row as the reference sees it: both int64 [1, tokens]."""

    input_ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """Labels that something predicts."""
        return int((self.labels[:, 1:] != -100).sum())


def examples_of(rows: list[dict[str, Any]], model: Path, train_on: TrainOn) -> list[Example]:
    """The rows, tokenized and labeled by prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        first, last = len(tokenizer(prompt, add_special_tokens=False).input_ids), len(ids) - ids[::-1].index(end)
        labels = [token if first <= place < last else -100 for place, token in enumerate(ids)]
        examples.append(Example(torch.tensor([ids]), torch.tensor([labels if train_on == "completion" else ids])))
    return examples


def reference_model(folder: Path, dtype: torch.dtype, attention: str, tensors: dict[str, Tensor]) -> Any:
    """Build the model of PEFT's quantization guide, with `tensors` as adapter weights."""
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        attn_implementation=attention,
        device_map={"": "cpu"},
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, config)
    parameters = reference_parameters(model)
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model.train()


def reference_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their name in the adapter's file."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def reference_backward(model: Any, examples: list[Example]) -> float:
    """Return the mean loss of all targets, one example at a time, with its gradients."""
    total = sum(example.targets for example in examples)
    summed = 0.0
    for example in examples:
        loss = model(input_ids=example.input_ids, labels=example.labels, use_cache=False).loss
        loss = loss * example.targets / total
        loss.backward()
        summed += float(loss.detach())
    return summed


@torch.no_grad()
def reference_loss(model: Any, examples: list[Example]) -> float:
    """Return the mean loss of all targets, one example at a time."""
    losses = [float(model(input_ids=each.input_ids, labels=each.labels).loss) * each.targets for each in examples]
    return sum(losses) / sum(each.targets for each in examples)


def our_model(folder: Path, seed: int) -> Any:
    """The trainer's model, checkpointed, with B other than 0, so that A has gradients."""
    model = adapted(folder, seed=seed)
    torch.manual_seed(seed)
    restore_adapter(model, {name: torch.randn_like(t) * 0.05 for name, t in adapter_tensors(model).items()})
    return model


def prepared_rows(
    make_context: MakeContext, folder: Path, rows: list[dict[str, Any]], model: Path, **training: Any
) -> StepContext:
    """The context of a job whose prepare step has packed the rows."""
    write_rows(folder / "data" / "train.jsonl", rows)
    context = make_context({"training": {"maxSequenceLength": 128, **training}}, model=model)
    prepare(context, Recorded())
    return context


def sequences_of(context: StepContext) -> list[Any]:
    """The packed sequences; at least one holds several rows."""
    data = PreparedDataset.open(next(context.workspace.data.glob("*/train.safetensors")).parent, "train")
    sequences = [data[index] for index in range(len(data))]
    assert max(len(sequence.row_lengths) for sequence in sequences) > 1
    return sequences


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference against the length of the expected vector."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def in_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float32(monkeypatch, fused=request.param == "fused")


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(("seed", "in_float32"), [(0, "fused"), (1, "fused"), (2, "PEFT's")], indirect=["in_float32"])
@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize(("family", "attention"), [("tiny_llama", "eager"), ("tiny_qwen2", "sdpa")])
def test_loss_and_gradients_are_those_of_one_example_at_a_time(
    family: str,
    attention: str,
    train_on: TrainOn,
    seed: int,
    request: pytest.FixtureRequest,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(family)
    rows = random_rows(seed)
    context = prepared_rows(make_context, tmp_path, rows, folder, trainOn=train_on)
    model, batch = our_model(folder, seed), Batch.from_sequences(sequences_of(context), torch.device("cpu"))
    examples = examples_of(rows, folder, train_on)
    reference = reference_model(folder, torch.float32, attention, adapter_tensors(model))

    assert batch.target_count == sum(example.targets for example in examples)
    loss = batch_loss(model.get_base_model(), batch) / batch.target_count
    loss.backward()
    expected = reference_backward(reference, examples)

    assert loss.item() == pytest.approx(expected, rel=LOSS_TOLERANCE)
    gradients = reference_parameters(reference)
    errors = {name: relative_error(p.grad, gradients[name].grad) for name, p in adapter_parameters(model).items()}
    assert len(errors) == 28
    assert max(errors.values()) < TENSOR_TOLERANCE, errors


def test_in_bfloat16_the_trainer_is_as_exact_as_the_reference(
    make_context: MakeContext, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = random_rows(0)
    context = prepared_rows(make_context, tmp_path, rows, tiny_llama)
    model, batch = our_model(tiny_llama, 0), Batch.from_sequences(sequences_of(context), torch.device("cpu"))
    examples, tensors = examples_of(rows, tiny_llama, "completion"), adapter_tensors(model)
    exact, usual = (reference_model(tiny_llama, dtype, "eager", tensors) for dtype in (torch.float32, torch.bfloat16))

    expected = reference_backward(exact, examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference_loss = reference_backward(usual, examples)
        loss = batch_loss(model.get_base_model(), batch) / batch.target_count
    loss.backward()

    gradients = [reference_parameters(exact), reference_parameters(usual), adapter_parameters(model)]
    truth, reference, ours = ({name: parameters[name].grad for name in tensors} for parameters in gradients)
    assert loss.item() == pytest.approx(expected, rel=2e-4)
    assert reference_loss == pytest.approx(expected, rel=2e-4)
    for name in tensors:
        usual_error = relative_error(reference[name], truth[name])
        assert relative_error(ours[name], truth[name]) < min(0.02, 2 * usual_error), name
    truth_of_all, reference_of_all, all_ours = (
        torch.cat([gradient.flatten() for gradient in named.values()]) for named in (truth, reference, ours)
    )
    usual_error = relative_error(reference_of_all, truth_of_all)
    assert relative_error(all_ours, truth_of_all) < min(0.01, 1.5 * usual_error)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("optimizer", "in_float32"), [("adamw", "fused"), ("paged_adamw_32bit", "PEFT's")], indirect=["in_float32"]
)
def test_a_whole_run_is_that_of_a_plain_loop(
    optimizer: str, make_context: MakeContext, tiny_llama: Path, tmp_path: Path
) -> None:
    """Every step sees every row, so the order of the data does not matter."""
    rows = random_rows(3)
    training = {
        "maxSteps": STEPS,
        "gradientAccumulationSteps": len(rows),
        "learningRate": RATE,
        "maxGradNorm": CLIP,
        "weightDecay": 0.1,
        "optimizer": optimizer,
    }
    context = prepared_rows(make_context, tmp_path, rows, tiny_llama, **training)
    start = adapter_tensors(adapted(tiny_llama, seed=0))
    model = reference_model(tiny_llama, torch.float32, "eager", start)
    parameters, examples = reference_parameters(model), examples_of(rows, tiny_llama, "completion")
    plain = torch.optim.AdamW(parameters.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    expected = []
    for _ in range(STEPS):
        loss = reference_backward(model, examples)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        expected += [loss, float(norm)]
        plain.step()
        plain.zero_grad()

    run(context)

    found = [line[name] for line in history(context) if "loss" in line for name in ("loss", "gradNorm")]
    assert found == pytest.approx(expected, rel=TENSOR_TOLERANCE)
    assert expected[-2] < expected[0]
    trained = load_file(context.workspace.trained / "adapter_model.safetensors")
    errors = {name: relative_error(trained[name], parameter.detach()) for name, parameter in parameters.items()}
    # Adam divides a gradient by its size, the smallest and least exact ones too.
    assert max(errors.values()) < 10 * TENSOR_TOLERANCE, errors


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("in_float32", ["fused"], indirect=True)
def test_guards_are_judged_by_the_losses_of_the_reference(
    make_context: MakeContext, tiny_llama: Path, tmp_path: Path
) -> None:
    """One guard has rows that are trained on, the other has answers that the tiny model never gives."""
    rows = {
        "train": random_rows(0),
        "near": random_rows(1),
        "far": [chat_row("Count.", "7 8 9 " * n) for n in (12, 13, 14)],
    }
    for name, written in rows.items():
        write_rows(tmp_path / "data" / f"{name}.jsonl", written)

    def guarded(least: float) -> StepContext:
        limits: dict[str, dict[str, float]] = {
            "near": {"maxLossIncrease": 0},
            "far": {"maxLossIncrease": 1, "minScore": least},
        }
        guards = [{"name": name, "source": f"pvc://data/{name}.jsonl", **limits[name]} for name in limits]
        gate = {"score": {"check": "exactMatch", "maxNewTokens": 96}, "guards": guards}
        training = {"maxSequenceLength": 128, "maxSteps": 8, "learningRate": 0.01}
        return make_context({"dataset": {"eval": {"fraction": 0.2}}, "training": training, "gate": gate})

    context = guarded(0.5)
    prepare(context, Recorded())
    run(context)
    reference = reference_model(
        tiny_llama, torch.float32, "eager", load_file(context.workspace.trained / "adapter_model.safetensors")
    )
    with pytest.raises(StepFailure) as failure:
        publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    published = publish(guarded(0), Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))

    assert failure.value.exit_code is ExitCode.GATE_FAILED
    assert published.gate is not None
    assert published.gate.passed
    near, far = published.gate.guards or ()
    for guard in (near, far):
        examples = examples_of(rows[guard.name], tiny_llama, "completion")
        with reference.disable_adapter():
            base_loss = reference_loss(reference, examples)
        assert guard.base_loss == pytest.approx(base_loss, rel=LOSS_TOLERANCE)
        assert guard.loss == pytest.approx(reference_loss(reference, examples), rel=LOSS_TOLERANCE)
        assert guard.tokens == sum(example.targets for example in examples)
        assert guard.sha256 == sha256((tmp_path / "data" / f"{guard.name}.jsonl").read_bytes()).hexdigest()
    assert (near.criteria[0].found, near.score) == (near.loss - near.base_loss, None)
    assert near.loss < near.base_loss
    assert (far.score_rows, far.base_score, far.criteria[1].name) == (3, 0, "minScore")
    card = (context.workspace.adapter / "README.md").read_text()
    assert f"| guards[near].maxLossIncrease | 0 | {near.loss - near.base_loss:.4g} | yes |" in card
    assert (
        f"On the {far.tokens} target tokens of guard far the mean loss is {far.base_loss:.4f} without the adapter and "
        f"{far.loss:.4f} with it; of 3 answers 0.0% pass without it and 0.0% with it." in card
    )
    assert "near" not in failure.value.message
    assert failure.value.message.startswith(
        "spec.gate.guards[far].minScore is 0.5, and 0 of the adapter's answers to 3 held-out rows passed"
    )
