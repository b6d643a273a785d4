"""Asks a model the tasks of lm-evaluation-harness: the harness reads, asks and scores, and the model is the caller's.

A folder of tasks may hold Python code, and rows that decide scores: it is copied, and the copy is used only if it has
the expected checksum. The harness is in images for evaluation only, and is imported when it is needed.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_api.printable import first_line
from qlora_api.spec.gate import BenchmarkSpec
from qlora_trainer.core.context import TaskFolder
from qlora_trainer.core.failures import (
    Interrupted,
    StepFailure,
    bad_configuration,
    is_out_of_gpu_memory,
    unsafe_artifact,
)
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.core.protocols import FastTokenizer
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PretrainedConfig

_FIELD = "spec.gate.benchmarks"


def tasks_sha256(folder: Path) -> str:
    """Return the SHA-256 of `find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`.

    Raises StepFailure (UNSAFE_ARTIFACT) for a name that sha256sum would escape, OSError.
    """
    names = [os.fsencode(path.relative_to(folder)) for path in _files(folder)]
    if odd := [name for name in names if set(name).intersection(b"\\\n\r")]:
        raise unsafe_artifact(
            f"{_FIELD}: the folder of tasks has a file {odd[0]!r}: rename it, without \\ and line ends"
        )
    lines = (f"{file_sha256(folder / os.fsdecode(name))}  ./".encode() + name + b"\n" for name in sorted(names))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """The regular files, without links, of which another process could change the target."""
    for root, _, names in os.walk(folder):
        paths = (Path(root, name) for name in names)
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


@contextmanager
def _copied(tasks: TaskFolder) -> Iterator[tuple[Path, str]]:
    """Yield a copy of the folder that is as expected, and its checksum."""
    if not tasks.path.is_dir():
        raise bad_configuration(f"{_FIELD}: the folder of tasks {tasks.path} does not exist: check evaluation.path")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in _files(tasks.path):
            target = copy / file.relative_to(tasks.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target, follow_symlinks=False)
        found = tasks_sha256(copy)
        if tasks.sha256 not in ("", found):
            raise unsafe_artifact(
                f"{_FIELD}: the folder of tasks has the SHA-256 {found}, and evaluation.sha256 of the profile is "
                f"{tasks.sha256}: restore the folder, or ask the platform team to check it and to change the profile"
            )
        yield copy, found


@contextmanager
def open_benchmarks(tasks: TaskFolder | None, benchmarks: Sequence[BenchmarkSpec]) -> Iterator["Benchmarks"]:
    """Yield the tasks, checked. The working directory is theirs, as they name their data relative to it.

    Raises StepFailure: BAD_CONFIGURATION without a folder, the harness or a task; UNSAFE_ARTIFACT for another folder.
    """
    if tasks is None:
        raise bad_configuration(f"{_FIELD} needs a folder of tasks: give it with --benchmarks DIR")
    if importlib.util.find_spec("lm_eval") is None:
        raise bad_configuration(
            f"{_FIELD} needs an image with lm-evaluation-harness: set evaluation.image of the profile to one, or "
            "install qlora-operator[evaluation] on a laptop"
        )
    with ExitStack() as opened:
        copy, sha256 = opened.enter_context(_copied(tasks))
        opened.enter_context(chdir(copy))
        with _task_errors(""):
            import datasets
            from lm_eval.tasks import TaskManager

            # Where it keeps what it makes of rows: the home directory cannot be written in a pod.
            datasets.config.HF_DATASETS_CACHE = copy / ".cache"
            manager = TaskManager(include_path=str(copy), include_defaults=False)
        for number, benchmark in enumerate(benchmarks):
            if benchmark.task not in manager.all_subtasks:
                raise bad_configuration(
                    f"{_FIELD}[{number}].task is {benchmark.task}, and the folder of tasks has: "
                    f"{', '.join(sorted(manager.all_subtasks)[:20]) or 'none'}; change it to one of them"
                )
        yield Benchmarks(manager, sha256)


def require_tasks(tasks: TaskFolder | None, benchmarks: Sequence[BenchmarkSpec]) -> None:
    """Raise StepFailure as `open_benchmarks` does. Reads no rows, which could come from a network."""
    if benchmarks:
        with open_benchmarks(tasks, benchmarks):
            return


@contextmanager
def _task_errors(task: str) -> Iterator[None]:
    """Raise StepFailure for any error of a task, whose code is not ours."""
    try:
        yield
    except (StepFailure, Interrupted):
        raise
    except Exception as error:
        if is_out_of_gpu_memory(error):
            raise
        named = f"{_FIELD}[{task}]" if task else _FIELD
        raise bad_configuration(
            f"{named}: lm-evaluation-harness cannot run it ({type(error).__name__}: {first_line(error)}): correct the "
            "task in the folder of tasks, or remove the benchmark"
        ) from error


@dataclass(frozen=True)
class HarnessModel:
    """A trained PEFT model as the harness calls it, with or without its adapter.

    It is no `nn.Module`: the harness would tie the weights of one, and move it.
    """

    model: AdaptedModel
    device: torch.device
    has_adapter: bool
    before_each: Callable[[], None]
    """Called before each computation: it reports progress, and raises to stop."""

    @property
    def config(self) -> "PretrainedConfig":
        """The configuration of the decoder."""
        return self.model.config

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Return transformers' output with logits [rows, tokens, vocabulary]."""
        with self._computing():
            return self.model(input_ids=input_ids, use_cache=False)  # type: ignore[operator]

    def generate(self, **settings: object) -> torch.Tensor:
        """Return token ids of prompts and answers, int64 [rows, tokens]."""
        with self._computing():
            return self.model.generate(**settings)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        self.before_each()
        without = nullcontext() if self.has_adapter else self.model.disable_adapter()
        with without, torch.no_grad(), computing(self.model, self.device.type, cache=True):
            yield


@dataclass(frozen=True)
class Benchmarks:
    """Tasks whose folder is checked."""

    _manager: "TaskManager"
    sha256: str
    """Of the folder."""

    def load(self, benchmark: BenchmarkSpec) -> None:
        """Read the task's rows, without asking them. Raises StepFailure for another metric, or none."""
        with _task_errors(benchmark.task):
            task = self._manager.load([benchmark.task])["tasks"][benchmark.task]
            _require_rising(benchmark, task.higher_is_better())

    def measure(self, benchmark: BenchmarkSpec, model: HarnessModel, tokenizer: FastTokenizer) -> tuple[float, int]:
        """Return the model's score, 0 to 1, and the number of rows that it was asked.

        The rows are asked one at a time, in the task's order, so that the same model has the same score.
        """
        with _task_errors(benchmark.task):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1),
                tasks=[benchmark.task],
                task_manager=self._manager,
                limit=benchmark.rows,
                bootstrap_iters=0,
                log_samples=False,
            )
            scores, name = found["results"][benchmark.task], benchmark.metric
            _require_rising(benchmark, found["higher_is_better"][benchmark.task])
            score = scores.get(name if "," in name else f"{name},none")
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:
            measured = ", ".join(key.removesuffix(",none") for key in scores if "," in key and "_stderr" not in key)
            raise bad_configuration(
                f"{_FIELD}[{benchmark.task}].metric is {name}, and the task gives {score} for it, not a score of 0 to "
                f"1: change it to one of {measured}"
            )
        return float(score), int(found["n-samples"][benchmark.task]["effective"])


def _require_rising(benchmark: BenchmarkSpec, rising: dict[str, bool]) -> None:
    name = benchmark.metric.partition(",")[0]
    if not rising.get(name):
        allowed = ", ".join(sorted(metric for metric, rises in rising.items() if rises)) or "none"
        raise bad_configuration(
            f"{_FIELD}[{benchmark.task}].metric is {name}, and the task's metrics that are better if higher are: "
            f"{allowed}; change it to one of them"
        )
