"""However often and wherever attempts end, the continued run ends in the same bytes as an undisturbed one.

An instant is a place of the trainer's code and how often it has been passed: a function's call or return, or a call of
C code as `os.fsync`, before or after. Each attempt is a forked process that ends at one instant in one of four ways.
"""

import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig

import qlora_trainer
from qlora_trainer.core import cpu
from qlora_trainer.core.completion import TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.training.checkpoints import attempts
from tests.support.commands.command import Files, new_files
from tests.support.manifests import merged
from tests.support.models.tiny import SHAPE, chat_row, save_model, write_rows
from tests.support.ranks import until, waiting_at
from tests.support.training import adapter_bytes, history, prepared, run

Site = tuple[str, str, int, str, str]
"""File, function, line, event of `sys.setprofile`, name of the C function."""
Ending = Literal["exception", "SIGKILL", "SIGTERM", "eviction"]
ENDINGS: tuple[Ending, ...] = ("exception", "SIGKILL", "SIGTERM", "eviction")
TRAINER = f"{Path(qlora_trainer.__file__).parent}/"
LONGEST_GRACE = 400
"""Events between SIGTERM and SIGKILL of an eviction."""

# Where something is written or renamed: every place is an instant. Of the others some are drawn.
WRITING = (
    "attempts.py",
    "checkpoint.py",
    "conversion.py",
    "filesystem.py",
    "metrics_log.py",
    "records.py",
    "saver.py",
    "train.py",
)
OTHERS_DRAWN = 12
# Each optimizer, each LoRA layer: PEFT's is used with dropout, without it the fused one.
RUNS = (("paged_adamw_32bit", 0.1), ("paged_adamw_8bit", 0.0), ("adamw", 0.0))

# Rank 64 makes tensors large enough that the 8-bit optimizer really keeps 8 bits. With this learning rate the held-out
# loss falls until step 4.
SPEC: dict[str, Any] = {
    "lora": {"rank": 64},
    "training": {
        "maxSteps": 30,
        "warmupSteps": 1,
        "learningRate": 0.05,
        "evalEverySteps": 1,
        "keep": "best",
        "earlyStopping": {"patience": 1},
    },
    "retry": {"maxDisruptions": 1000},
}


class Crash(Exception):  # noqa: N818 - an attempt's end, as the others
    """The error of an attempt that crashes."""


@dataclass(frozen=True)
class Instant:
    """When and how an attempt ends."""

    site: Site
    occurrence: int
    ending: Ending
    grace: int
    """Events of an eviction until SIGKILL."""


# A forked process has none of its parent's threads, and would wait for them for ever.
pytestmark = pytest.mark.usefixtures("one_thread")


def watch(seen: Callable[[Site], None]) -> None:
    """Call `seen` at every event of the trainer's own code from now on, in new threads too."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        folder, _, file = frame.f_code.co_filename.rpartition("/")
        if f"{folder}/".startswith(TRAINER):
            name = argument.__name__ if event.startswith("c_") else ""
            seen((file, frame.f_code.co_name, frame.f_lineno, event, name))

    threading.setprofile(profile)
    sys.setprofile(profile)


def sites_of(context: StepContext) -> Counter[Site]:
    """The sites that an undisturbed run passes, and how often."""
    sites: Counter[Site] = Counter()
    watch(lambda site: sites.update([site]))
    try:
        run(context)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sites


def attempt(context: StepContext, instant: Instant | None) -> int:
    """Train in a fork until `instant`. Return the exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        stop = StopRequest()
        signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
        if instant is not None:
            watch(_end_at(instant))
        try:
            run(context, stop=stop)
        except Crash:
            os._exit(2)
        except Interrupted:
            os._exit(143)
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end_at(instant: Instant) -> Callable[[Site], None]:
    passed, events_left = 0, -1

    def seen(site: Site) -> None:
        nonlocal passed, events_left
        if events_left >= 0:
            events_left -= 1
            if events_left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        passed += site == instant.site
        if site != instant.site or passed != instant.occurrence:
            return
        if instant.ending == "exception":
            raise Crash
        os.kill(os.getpid(), signal.SIGKILL if instant.ending == "SIGKILL" else signal.SIGTERM)
        if instant.ending == "eviction":
            events_left = instant.grace

    return seen


def drawn(sites: Counter[Site], share: int, random: Random) -> list[Instant]:
    """Draw instants at a share of the writing sites and at some others, shuffled."""
    writing = sorted(site for site in sites if site[0] in WRITING)[share :: len(RUNS)]
    others = random.sample(sorted(site for site in sites if site[0] not in WRITING), OTHERS_DRAWN)
    chosen = [*writing, *others]
    random.shuffle(chosen)
    endings = itertools.islice(itertools.cycle(ENDINGS), share, None)
    return [
        Instant(site, random.randint(1, min(3, sites[site])), ending, random.randrange(LONGEST_GRACE))
        for site, ending in zip(chosen, endings, strict=False)
    ]


@pytest.mark.parametrize(
    ("optimizer", "dropout", "every"),
    [("paged_adamw_8bit", 0.0, 5), *(pytest.param(*each, 1, marks=pytest.mark.slow) for each in RUNS)],
)
def test_attempts_that_end_anywhere_lead_to_the_bytes_of_an_undisturbed_run(
    optimizer: str, dropout: float, every: int, one_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job would fail after so many attempts that end before their first checkpoint.
    monkeypatch.setattr(attempts, "MAX_ATTEMPTS_WITHOUT_PROGRESS", 1000)
    spec = merged(SPEC, {"lora": {"dropout": dropout}, "training": {"optimizer": optimizer}})
    undisturbed = prepared(tmp_path / "undisturbed", one_block, spec)
    sites = sites_of(undisturbed)
    assert any(site[:2] == ("fused_lora.py", "backward") for site in sites) == (dropout == 0)
    expected = adapter_bytes(undisturbed), history(undisturbed)
    record = read_completion(undisturbed.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert (record.training_step, record.adapter_step) == (5, 4)
    share = RUNS.index((optimizer, dropout))
    # Not a multiple of the number of endings.
    instants = drawn(sites, share, Random(share))[::every]
    ended: Counter[str] = Counter()

    for number in itertools.count():
        disturbed = prepared(tmp_path / str(number), one_block, spec)
        gone_through: list[Instant] = []
        exit_code = None
        while exit_code != 0:
            instant = instants.pop() if instants else None
            exit_code = attempt(disturbed, instant)
            if instant is not None:
                gone_through.append(instant)
                ended[instant.ending] += exit_code != 0
            allowed = {"exception": 2, "SIGKILL": -9, "SIGTERM": 143, "eviction": -9}
            assert exit_code in (0, 143, allowed[instant.ending] if instant else 0), gone_through
        assert adapter_bytes(disturbed) == expected[0], gone_through
        assert history(disturbed) == expected[1], gone_through
        if not instants:
            break

    # Some places are passed only by a first attempt, or only by a later one.
    assert all(ended[ending] >= 8 // every for ending in ENDINGS), ended


def signalled(files: Files, step: int, *signals: signal.Signals, **environment: str) -> int:
    """Exit code of the train step's command line, sent `signals` after `step` steps."""
    process = files.start("train", **waiting_at(files.root / "code", step, 0), **environment)
    until(process, step)
    for number in signals:
        process.send_signal(number)
    process.communicate()
    return process.returncode


def losses(metrics: Path) -> list[dict[str, float | None]]:
    """Computed values at each line of a history."""
    entries = map(json.loads, metrics.read_text().splitlines())
    return [{name: entry.get(name) for name in ("step", "loss", "gradNorm", "evalLoss")} for entry in entries]


def assert_same_results(disturbed: Files, undisturbed: Files) -> None:
    """Both have the same bytes of an adapter, and computed the same on the way."""
    files = (undisturbed.workspace, disturbed.workspace)
    adapters = [(folder / "trained" / "adapter_model.safetensors").read_bytes() for folder in files]
    histories = [losses(folder / "report" / "metrics.jsonl") for folder in files]
    assert adapters[0] == adapters[1]
    assert histories[0] == histories[1]


# The next test sends real signals too, and test_exit_codes.py one in the middle of a step.
@pytest.mark.slow
def test_the_command_line_under_signals_ends_in_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, tiny_llama: Path
) -> None:
    training = {
        "maxSteps": 12,
        "gradientAccumulationSteps": 2,
        "scheduler": "cosine",
        "optimizer": "paged_adamw_8bit",
        "saveEverySteps": 3,
        "samples": 0,
    }
    spec = {"lora": {"rank": 64, "dropout": 0.1}, "training": training}
    undisturbed = new_files(tmp_path / "undisturbed", tiny_llama.parent, spec)
    assert undisturbed.run("prepare").exit_code == 0
    disturbed = undisturbed.copied(tmp_path / "disturbed")
    assert undisturbed.run("train").exit_code == 0

    assert signalled(disturbed, 4, signal.SIGKILL) == -signal.SIGKILL
    assert signalled(disturbed, 8, signal.SIGTERM, signal.SIGKILL) == -signal.SIGKILL
    assert disturbed.run("train").exit_code == 0

    assert_same_results(disturbed, undisturbed)


def long_rows() -> list[dict[str, Any]]:
    """Rows that fill a sequence of 1024 tokens in twos or threes."""
    random = Random(0)
    words = ("list", "the", "pods", "of", "namespace", "web", "labels", "deployment", "shop", "three", "node")
    return [chat_row(f"Question {n}?", " ".join(random.choices(words, k=random.randint(270, 420)))) for n in range(14)]


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_long_rows_lead_to_the_bytes_of_an_undisturbed_run(tmp_path: Path, threads: str) -> None:
    """Rows long enough for the long paths of attention, filling and loss."""
    model = save_model(tmp_path / "models" / "model", LlamaConfig(**(SHAPE | {"max_position_embeddings": 1024})))
    training = {
        "maxSteps": 4,
        "gradientAccumulationSteps": 2,
        "maxSequenceLength": 1024,
        "saveEverySteps": 2,
        "evalEverySteps": 4,
        "samples": 0,
    }
    undisturbed = new_files(tmp_path / "undisturbed", model.parent, {"training": training})
    write_rows(undisturbed.data / "train.jsonl", long_rows())
    assert undisturbed.run("prepare").exit_code == 0
    data = PreparedDataset.open(next(undisturbed.workspace.glob("data/*/train.safetensors")).parent, "train")
    sequences = [data[index] for index in range(len(data))]
    batches = [Batch.from_sequences([sequence], torch.device("cpu")) for sequence in sequences]
    assert all(max(sequence.row_lengths) > cpu.FLOAT32_GRADIENT_TOKENS for sequence in sequences)
    assert any(batch.input_ids.shape[1] > batch.tokens for batch in batches)
    assert all(batch.target_count > cpu.loss_chunk_tokens("cpu") for batch in batches)
    disturbed = undisturbed.copied(tmp_path / "disturbed")
    environment = {} if threads == "1" else {"OMP_NUM_THREADS": threads}
    assert undisturbed.run("train", **environment).exit_code == 0

    assert signalled(disturbed, 3, signal.SIGKILL, **environment) == -signal.SIGKILL
    assert list(disturbed.workspace.glob("checkpoints/step-*"))
    assert disturbed.run("train", **environment).exit_code == 0

    assert_same_results(disturbed, undisturbed)
