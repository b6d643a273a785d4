"""The input of a step: the job's document, its workspace and its volumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_api import contract
from qlora_api.contract import MAX_ACTIVITY_LENGTH, ProgressRecord, WorkspaceLayout, within_limit
from qlora_api.sources import ConfigMapSource, HubSource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.status import StepName
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable, unsafe_artifact
from qlora_trainer.core.records import timestamp

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class TaskFolder:
    """A folder of tasks of lm-evaluation-harness, and their data."""

    path: Path
    sha256: str = ""
    """The one that the profile pins; empty for any content, on a laptop."""


@dataclass(frozen=True)
class Mounts:
    """Where claims, ConfigMaps and Secrets are mounted in this process's file system."""

    volumes: Path = Path(contract.VOLUMES_MOUNT)
    config_maps: Path = Path(contract.CONFIG_MAPS_MOUNT)
    token_file: Path = Path(contract.TOKEN_FILE)
    credentials: Path = Path(contract.CREDENTIALS_MOUNT)
    signing_key: Path = Path(contract.SIGNING_KEY_FILE)
    """The key that signs lineage. Missing without one in the profile, or on a laptop."""
    model_cache: Path | None = None
    """The shared folder of downloaded base models, or None if each job has its own."""
    continued: Path = Path(contract.CONTINUED_MOUNT)
    """The workspace folder of the job that spec.continues names."""
    sweep: Path | None = None
    """The folder that the cells of a sweep share, or None if the job is no cell."""
    tasks: TaskFolder | None = None
    """The tasks of benchmarks, or None if there is no such folder."""
    claims: Mapping[str, Path] = field(default_factory=dict)
    """Claims that are elsewhere: on a laptop, from `--volume CLAIM=DIR`."""
    config_map_folders: Mapping[str, Path] = field(default_factory=dict)
    """ConfigMaps as folders with a file per key, from `--config-map NAME=DIR`."""
    local_names: Mapping[str, Path] = field(default_factory=dict)
    """Folders that messages name instead of these claims: those of files that a user gave without an address."""

    def volume(self, source: VolumeSource) -> Path:
        """The path of a pvc:// address. Raises StepFailure UNREACHABLE if not mounted."""
        root = self.claims.get(source.claim, self.volumes / source.claim)
        if not root.is_dir():
            raise unreachable(f"volume claim {source.claim!r} is not mounted at {root}")
        return root / source.path if source.path else root

    def folder(self, source: VolumeSource) -> Path:
        """Return the path of a pvc:// address of a folder.

        Raises StepFailure UNSAFE_ARTIFACT if it is a link that leads out of its volume, UNREACHABLE if not mounted.
        """
        path, root = self.volume(source), self.volume(VolumeSource(source.claim))
        # A link to itself is no folder.
        if path.is_dir() and not path.resolve().is_relative_to(root.resolve()):
            raise unsafe_artifact(f"{source} is a link that leads out of its volume: put the files themselves there")
        return path

    def name(self, source: VolumeSource) -> str:
        """The pvc:// address for messages, or the path of a file that was given by it."""
        folder = self.local_names.get(source.claim)
        return str(source) if folder is None else str(folder / source.path)

    def config_map(self, source: ConfigMapSource) -> Path:
        """The file of a ConfigMap's key. Raises StepFailure UNREACHABLE if missing."""
        path = self.config_map_folders.get(source.name, self.config_maps / source.name) / source.key
        if not path.is_file():
            raise unreachable(
                f"ConfigMap {source.name!r} with key {source.key!r} does not exist in the job's namespace"
            )
        return path


@dataclass(frozen=True)
class Identity:
    """The job, pod and attempt that a process works for."""

    job_uid: str
    """`local` where no API server has given one."""
    pod_uid: str
    attempt: int
    """Number of the step's Job, counted from 1; 0 in the Job of another QLoRAJob."""
    started: datetime | None
    """When the process started; None if it does more than one step."""

    def progress(self, step: StepName, time: datetime, activity: str, **figures: object) -> ProgressRecord:
        """The progress record of this job and pod with further fields, cut to its limits."""
        record = ProgressRecord(
            job_uid=self.job_uid,
            pod_uid=self.pod_uid,
            step=step,
            time=timestamp(time),
            activity=activity[:MAX_ACTIVITY_LENGTH],
            **figures,
        )
        return within_limit(record)


@dataclass(frozen=True)
class StepContext:
    """Everything that a step depends on besides the clock and its own files."""

    document: QLoRAJobDocument
    workspace: WorkspaceLayout
    mounts: Mounts
    device: Device
    pod_uid: str
    attempt: int
    workspace_uri: str
    """Address of the workspace folder: pvc://CLAIM/FOLDER, or a path on a laptop."""
    registries: tuple[str, ...] = ()
    started: datetime | None = None
    contract_version: int = contract.CONTRACT_VERSION
    gpu_hour_price: str = ""
    """The price in the profile, with the currency, or an empty string."""
    rungs: tuple[int, ...] = ()
    """Optimizer steps after which the job's sweep compares its cells, if it does."""
    group_size: int = 1
    """How many jobs are trained together with this one, itself included."""

    @property
    def spec(self) -> QLoRAJobSpec:
        """The job's spec, with the schema's defaults."""
        return self.document.spec

    @property
    def identity(self) -> Identity:
        """The job, pod and attempt that the step works for."""
        return Identity(self.document.metadata.uid or "local", self.pod_uid, self.attempt, self.started)

    def secret(self, part: Literal["model", "dataset", "output", "lora", "tracking"]) -> Secret:
        """Return the Secret that a part of the spec names, mounted below `credentials/`."""
        spec, lora, tracking = self.spec, self.spec.lora.initial_adapter, self.spec.output.tracking
        field, reference = {
            "model": ("spec.model", spec.model.secret_ref),
            "dataset": ("spec.dataset", spec.dataset.secret_ref),
            "output": ("spec.output", spec.output.secret_ref),
            "lora": ("spec.lora.from", None if lora is None else lora.secret_ref),
            "tracking": ("spec.output.tracking", None if tracking is None else tracking.secret_ref),
        }[part]
        name = None if reference is None else reference.name
        return Secret(self.mounts.credentials / part, f"{field}.secretRef", name)


def base_name(model: BaseModelSpec) -> str:
    """Return the base's name for PEFT and servers: ORG/NAME, else the address."""
    source = parse_source(model.source)
    return source.repository if isinstance(source, HubSource) else model.source


def load_document(path: Path) -> QLoRAJobDocument:
    """Read the job's document. Raises StepFailure with the wrong fields."""
    try:
        return QLoRAJobDocument.model_validate_json(path.read_bytes())
    except FileNotFoundError as missing:
        raise bad_configuration(f"{path} does not exist: the job's document is not mounted") from missing
    except ValidationError as error:
        raise bad_configuration(f"{path}: {explain(error)}") from error


def explain(error: ValidationError, limit: int = 3) -> str:
    """The first `limit` problems of a validation as a sentence, with their fields."""
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_url=False)[:limit]
    ]
    more = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {more} more" if more > 0 else "")
