"""Tiny models made once a session, the context of a step over them, and a registry."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# As steps do (process.py), which these tests also call in this process. Before anything loads bitsandbytes.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The same on every processor. Tests that are of float32 set it.
os.environ["QLORA_CPU_COMPUTE"] = "bfloat16"

import pytest
import torch
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from transformers import LlamaConfig, Qwen2Config
from urllib3.util import Retry

from qlora_api.contract import WorkspaceLayout
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.families import admission
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.memory import dry_run
from qlora_trainer.model.memory.dry_run import StepSize, measure_within_limits
from qlora_trainer.model.source.files import CONFIG
from qlora_trainer.steps import prepare_model
from qlora_trainer.stores import registry_auth as oci_auth
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.models.tiny import JOB_UID, POD_UID, SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.resolved import TRAINING
from tests.support.runs.kept import kept
from tests.support.runs.shared import TOGETHER, finish, finished_files, make_fluent, train_together
from tests.support.servers import HTPASSWD, give_login, registry
from tests.support.services.fault_proxy import FaultProxy, serve_proxy
from tests.support.training import context_of, job, prepared

# Autograd counts the devices once, at its first use. Inside or after a FakeTensorMode, which torch.compile has too, it
# counts a GPU that is not there and starts a thread for it: no process forked afterwards can train.
torch.ones(1, requires_grad=True).sum().backward()

MakeContext = Callable[..., StepContext]
Prepare = Callable[..., StepContext]


@pytest.fixture(autouse=True)
def _the_hubs_client_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the client's waits of one second, two, four, … between its tries."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _seconds: None))


@pytest.fixture(scope="session", autouse=True)
def _a_model_is_inspected_and_measured_once() -> Iterator[None]:
    """Cache what forks find by their input: hundreds of tests prepare the same tiny models.

    Tests replace what inspects and measures.
    """
    found: dict[tuple[Any, ...], MeasuredMemory] = {}
    families: dict[tuple[Any, ...], Family] = {}
    inspect_within_limits = admission.inspect_model

    def measure(
        config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str, family: Any = None
    ) -> MeasuredMemory:
        settings = (part.model_dump_json() for part in (spec.lora, spec.training, spec.quantization))
        key = (vars(dry_run)["within_limits"], config.read_bytes(), *settings, *sizes, digest, family)
        if key not in found:
            found[key] = measure_within_limits(config, spec, sizes, digest, family)
        return found[key]

    def inspect(folder: Path, lora: ResolvedLora) -> Family:
        if not (folder / CONFIG).is_file():
            return inspect_within_limits(folder, lora)
        files = (path.read_bytes() for path in (folder / CONFIG, folder / "tokenizer_config.json") if path.is_file())
        key = (vars(admission)["_inspect"], vars(admission)["within_limits"], *files, lora.model_dump_json())
        if key not in families:
            families[key] = inspect_within_limits(folder, lora)
        return families[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_model, "measure_within_limits", measure)
        patch.setattr(admission, "inspect_model", inspect)
        yield


@pytest.fixture(scope="session")
def tiny_llama() -> Iterator[Path]:
    """Folder of a two-layer Llama with a ChatML template. Do not change it: copy it."""
    with kept("llama", lambda folder: save_model(folder / "model", LlamaConfig(**SHAPE))) as folder:
        yield folder / "model"


@pytest.fixture(scope="session")
def one_block() -> Iterator[Path]:
    """Folder of a Llama of one block, for many runs. Do not change it: copy it."""
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 1}))
    with kept("one-block", lambda folder: save_model(folder / "model", config)) as folder:
        yield folder / "model"


@pytest.fixture(scope="session")
def tiny_qwen2() -> Iterator[Path]:
    """Folder of a two-layer Qwen2 with a ChatML template. Do not change it: copy it."""
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    with kept("qwen2", lambda folder: save_model(folder / "model", config)) as folder:
        yield folder / "model"


@pytest.fixture(scope="session")
def fluent(tiny_llama: Path) -> Iterator[Path]:
    """The tiny Llama after training on the test's rows, so that it has skills to lose."""
    with kept("fluent", lambda folder: make_fluent(folder / "model", tiny_llama)) as folder:
        yield folder / "model"


@pytest.fixture
def workspace(tmp_path: Path, tiny_llama: Path) -> Prepare:
    """Makes prepared workspaces, each by its name."""

    def make(
        name: str = "workspace", spec: dict[str, Any] | None = None, *, model: Path = tiny_llama, **settings: Any
    ) -> StepContext:
        return prepared(tmp_path / name, model, spec, **settings)

    return make


@pytest.fixture(scope="session")
def finished(tiny_llama: Path) -> Iterator[Files]:
    """A job whose three steps have been run by the trainer's command line. Do not change it: copy it."""
    with kept("finished", lambda folder: finish(folder, tiny_llama)) as folder:
        yield finished_files(folder, tiny_llama)


@pytest.fixture
def trained(tmp_path: Path, finished: Files) -> Files:
    """A job that is trained and not published."""
    files = finished.copied(tmp_path / "job")
    (files.workspace / "records" / "publish.json").unlink()
    shutil.rmtree(files.workspace / "adapter")
    return files


@pytest.fixture(scope="session")
def together(tiny_llama: Path) -> Iterator[tuple[Files, StepContext]]:
    """Train in two processes with the whole base each. Copy the files to change them."""
    with kept("together", lambda folder: train_together(folder, tiny_llama)) as folder:
        context = context_of(folder / "workspace", job(TOGETHER))
        yield Files(folder, tiny_llama.parent, context.spec.dump()), context


@pytest.fixture
def make_context(tmp_path: Path, tiny_llama: Path) -> MakeContext:
    """Makes the context of a job over the tiny Llama (claim `models`) and `tmp_path/data` (claim `data`).

    `spec` changes the job's spec, whose data set is `train.jsonl`; the workspace is `tmp_path/workspace`.
    """

    def make(
        spec: dict[str, Any] | None = None, *, model: Path = tiny_llama, mounts: Mounts | None = None, attempt: int = 1
    ) -> StepContext:
        (tmp_path / "data").mkdir(exist_ok=True)
        default = {
            "model": {"source": f"pvc://models/{model.name}"},
            "dataset": {"source": "pvc://data/train.jsonl"},
            "lora": {"rank": 4, "alpha": 8},
            "training": TRAINING
            | {
                "maxSteps": 4,
                "gradientAccumulationSteps": 2,
                "maxSequenceLength": 64,
                "learningRate": 1e-3,
                "samples": 0,
            },
        }
        document = QLoRAJobDocument.model_validate(
            {
                "apiVersion": "qlora.dev/v1beta1",
                "kind": "QLoRAJob",
                "metadata": {"name": "tiny", "namespace": "default", "uid": JOB_UID},
                "spec": merged(default, spec or {}),
            }
        )
        return StepContext(
            document=document,
            workspace=WorkspaceLayout(tmp_path / "workspace"),
            mounts=mounts
            or Mounts(
                claims={"models": model.parent, "data": tmp_path / "data"},
                config_maps=tmp_path / "config-maps",
                token_file=tmp_path / "secrets" / "token",
                credentials=tmp_path / "credentials",
            ),
            device="cpu",
            pod_uid=POD_UID,
            attempt=attempt,
            workspace_uri=str(tmp_path / "workspace"),
        )

    return make


@pytest.fixture(scope="module")
def real_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants a password."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "htpasswd").write_text(HTPASSWD)
    with registry(folder, passwords=folder / "htpasswd") as address:
        yield address


@pytest.fixture
def registry_proxy(real_registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Serve the profile's registry by a proxy, with the Secrets of model and output."""
    monkeypatch.setattr(oci_auth, "_RETRY", Retry(total=0))
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    with serve_proxy(FaultProxy(real_registry)) as served:
        for part in ("model", "output"):
            (tmp_path / "credentials" / part).mkdir(parents=True)
            give_login(tmp_path / "credentials" / part, served.address)
        yield served


@pytest.fixture
def records() -> Recorded:
    """Where a step's records go."""
    return Recorded()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with one thread: another number adds floats in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)
