"""The contract of operator and trainer: exit codes, records, mounted files and the workspace's layout."""

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from qlora_api.artifact_status import AdapterStatus, BaseStatus, GateStatus, MergedStatus
from qlora_api.choice import MAX_CHOICES, Choice
from qlora_api.schema import ObservedModel, replace
from qlora_api.spec.output import TrackingStatus
from qlora_api.status import Bytes, Count, DatasetStatus, Finite, MemoryStatus, Share, StepName, Timestamp
from qlora_api.status_types import MAX_RUNGS
from qlora_api.usage import WorkStatus

CONTRACT_VERSION = 7
"""Raised by a release whose operator and trainer expect something new of each other.

1: the trainer ends a job that was interrupted too often. 2: the operator does, because only it can tell a suspension.
3: the trainer meets those of other nodes; only jobs with several nodes need it. 4: the trainer trains further jobs in
the same process; only cells that one pod trains need it. 5: publish signs the lineage; only jobs whose profile has a
key need it. 6: prepare chooses what the spec leaves open; only jobs that leave a setting open need it. 7: both 5 and 6.
"""


def needed_contract(nodes: int, *, grouped: bool = False, signed: bool = False, chosen: bool = False) -> int:
    """Return the lowest contract version that supports a job of so many nodes.

    All versions support one node.
    """
    if chosen:
        return 7 if signed else 6
    return 5 if signed else 4 if grouped else 3 if nodes > 1 else 2


def with_signing(version: int) -> int:
    """Return the contract version that a job of this one needs to be signed too."""
    return max(version, needed_contract(1, signed=True, chosen=version >= needed_contract(1, chosen=True)))


def is_signed(version: int) -> bool:
    """Whether publish signs the lineage of jobs of this contract version."""
    return version == with_signing(version)


def without_signing(version: int) -> int:
    """Return a contract version that every trainer of this one supports, and that needs no key."""
    return version - 1 if is_signed(version) else version


TRAINER_CONTAINER = "trainer"

JOB_FILE = PurePosixPath("/etc/qlora/job.json")
OTHER_JOBS = JOB_FILE.parent / "with"
"""Folder of the documents of the further jobs that a train pod trains: `NAME.json`."""
TERMINATION_LOG = PurePosixPath("/dev/termination-log")
WORKSPACE_MOUNT = PurePosixPath("/workspace")
VOLUMES_MOUNT = PurePosixPath("/volumes")
CONFIG_MAPS_MOUNT = PurePosixPath("/config-maps")
MODEL_CACHE_MOUNT = PurePosixPath("/model-cache")
TOKEN_FILE = PurePosixPath("/secrets/model/token")
# In it a folder for each part of the spec whose secretRef a step may read, with a file for each key.
CREDENTIALS_MOUNT = PurePosixPath("/credentials")
SIGNING_KEY_FILE = PurePosixPath("/secrets/signing/private.pem")
"""Only publish has it."""
CA_MOUNT = PurePosixPath("/ca")
"""In it a folder for the ConfigMap of the profile's own certificates, with a file for its key."""
PROXY_MOUNT = PurePosixPath("/proxy")
"""In it a folder for the Secret of the profile's proxy, with the files of PROXY_KEYS."""
PROXY_KEYS = ("username", "password")
CONTINUED_MOUNT = PurePosixPath("/continued")
"""The workspace folder of the job that spec.continues names; only prepare has it, and cannot write to it."""

BENCHMARKS_MOUNT = PurePosixPath("/benchmarks")
"""The claim with the tasks of spec.gate.benchmarks, which no step can write to."""

ENV_POD_UID = "QLORA_POD_UID"
ENV_ATTEMPT = "QLORA_ATTEMPT"
ENV_CONTRACT_VERSION = "QLORA_CONTRACT_VERSION"
ENV_DEVICE = "QLORA_DEVICE"
ENV_OUTPUT_CLAIM = "QLORA_WORKSPACE_CLAIM"
ENV_REGISTRIES = "QLORA_REGISTRIES"
ENV_MLFLOW_SERVER = "QLORA_MLFLOW_SERVER"
ENV_WANDB_SERVER = "QLORA_WANDB_SERVER"
"""Servers of trackers, to which publish uploads."""
ENV_IMAGE = "QLORA_IMAGE"
"""The trainer's image as the profile names it, for the lineage."""
ENV_CA_FILE = "QLORA_CA_FILE"
"""File with certificates that are trusted besides the public ones."""
ENV_PROXY_SECRET = "QLORA_PROXY_SECRET"  # noqa: S105 - a path
"""Folder with the credentials for the proxy of HTTPS_PROXY."""
ENV_CLOUD_IDENTITY = "QLORA_CLOUD_IDENTITY"
"""The cloud (aws, google or azure) that has given the pod an identity, which may be used for object stores."""
ENV_MODEL_CACHE = "QLORA_MODEL_CACHE"
ENV_BENCHMARKS = "QLORA_BENCHMARKS"
ENV_BENCHMARKS_SHA256 = "QLORA_BENCHMARKS_SHA256"
"""The folder of the tasks of spec.gate.benchmarks, and the checksum that the profile pins."""
ENV_SWEEP_FOLDER = "QLORA_SWEEP_FOLDER"
"""The folder that the cells of a sweep share: prepare keeps tokenized rows there, and publish, or train of a cell that
is stopped or diverges, writes the sweep's report."""
ENV_RUNGS = "QLORA_RUNGS"
"""Optimizer steps after which a sweep compares its cells, separated by commas: train reports the losses there."""
ENV_GROUP_SIZE = "QLORA_GROUP_SIZE"
"""How many jobs are trained together with the job, itself included: prepare reports what of its memory they share."""
REPORT_FILE = "report.html"
"""The page of a run, beside the adapter and in the workspace."""
ENV_GPU_HOUR_PRICE = "QLORA_GPU_HOUR_PRICE"
"""The profile's price of a GPU hour and its currency, such as `2.50 EUR`, for the report that publish writes."""
SWEEP_REPORT = "report.html"
"""The page in that folder."""
ENV_NODE = "QLORA_NODE"
"""Which of the train pods this is, counted from 0; set if there are several."""
ENV_RENDEZVOUS = "QLORA_RENDEZVOUS"
"""HOST:PORT at which node 0 serves the store that all train pods share."""
ENV_NODE_WAIT = "QLORA_NODE_WAIT_SECONDS"
"""For how many seconds train pods wait for one another."""
DEFAULT_NODE_WAIT_SECONDS = 900

RENDEZVOUS_PORT = 29500

CPU_ALLOCATOR = "libtcmalloc_minimal.so.4"
"""Preloaded (LD_PRELOAD) for training on a CPU: glibc's own allocator takes more time and more memory."""

GPU_LOSS_CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time when a GPU trains; the memory estimate counts on it."""

MAX_PROGRESS_BYTES = 1024
MAX_RESULT_BYTES = 4096
MAX_ACTIVITY_LENGTH = 128
MIN_SECONDS_BETWEEN_PROGRESS = 5.0


def nine_digits(figure: float) -> float:
    """Round the figure to nine significant digits, in the same unit.

    A progress record is short, and a float32 has fewer. Cells of a sweep are compared by such losses: rounded to four
    decimals, 0.00034 and 0.00026 would be equal.
    """
    return float(f"{figure:.9g}")


class ExitCode(IntEnum):
    """How a step ends. A code that is not listed counts as INTERNAL_ERROR."""

    DONE = 0
    BAD_CONFIGURATION = 10
    BAD_DATASET = 11
    MODEL_UNAVAILABLE = 12
    GPU_OUT_OF_MEMORY = 13
    DIVERGED = 14
    UNSAFE_ARTIFACT = 15
    STORAGE_FULL = 16
    DOES_NOT_FIT = 17
    RETRIES_EXHAUSTED = 18
    UNSUPPORTED_CONTRACT = 19
    GATE_FAILED = 20
    INTERRUPTED = 143
    UNREACHABLE = 200
    PEER_LOST = 201
    PEERS_MISSING = 202
    INTERNAL_ERROR = 203

    @property
    def reason(self) -> str:
        """The condition's reason, in CamelCase."""
        return "GPUOutOfMemory" if self is ExitCode.GPU_OUT_OF_MEMORY else self.name.title().replace("_", "")

    @property
    def permanent(self) -> bool:
        """Whether another attempt would fail too, so that the step is not retried."""
        return ExitCode.BAD_CONFIGURATION <= self <= ExitCode.GATE_FAILED


TIGHT_EXIT_CODE = 3
"""Exit code of `qlora plan` for a run that may run out of memory. No step has it."""
PERMANENT_EXIT_CODES = tuple(int(code) for code in ExitCode if code.permanent)


Evaluations = Annotated[tuple[tuple[Count, Finite], ...], Field(max_length=MAX_RUNGS)]
"""Step and held-out loss of those at the rungs of the job's sweep. Pairs, as a progress record is short."""


class _Record(ObservedModel):
    """Fields of every record, for readers to reject another job's or a forged one."""

    contract_version: int = CONTRACT_VERSION
    job_uid: str = Field(max_length=64)
    pod_uid: str = Field(max_length=64)
    step: StepName
    time: Timestamp


class ProgressRecord(_Record):
    """Progress of the step on standard output: 1 KiB every 5 seconds at most."""

    kind: Literal["progress"] = "progress"
    activity: str = Field("", max_length=MAX_ACTIVITY_LENGTH)
    training_step: Count = 0
    total_steps: Count = 0
    epoch: Finite = Field(0.0, ge=0)
    loss: Finite | None = None
    eval_loss: Finite | None = None
    learning_rate: Finite | None = None
    grad_norm: Finite | None = None
    tokens_per_second: Finite | None = None
    remaining_seconds: Finite | None = Field(None, ge=0)
    peak_memory_bytes: Bytes | None = None
    micro_batch_size: Count | None = None
    goodput: Share | None = None
    reward_margin: Finite | None = None
    accuracy: Share | None = None
    eval_accuracy: Share | None = None
    evaluations: Evaluations | None = None
    checkpoint_step: Count | None = None
    checkpoint_time: Timestamp | None = None
    training_since: Timestamp | None = None


class ResultRecord(_Record):
    """How the step ended: last line of output and termination log, up to 4096 bytes."""

    kind: Literal["result"] = "result"
    attempt: int = Field(1, ge=1)
    outcome: Literal["succeeded", "failed", "interrupted"]
    exit_code: int = Field(ge=0, le=255)
    reason: str = Field(max_length=128)
    message: str = Field("", max_length=1024)
    model_revision: str | None = Field(None, max_length=256)
    memory: MemoryStatus | None = None
    dataset: DatasetStatus | None = None
    base: BaseStatus | None = None
    work: WorkStatus | None = None
    settings: tuple[Choice, ...] | None = Field(None, max_length=MAX_CHOICES)
    trained: bool | None = None
    """Of prepare: whether the workspace has the finished run, so that train has nothing to do."""
    training_since: Timestamp | None = None
    training_step: Count | None = None
    total_steps: Count | None = None
    loss: Finite | None = None
    eval_loss: Finite | None = None
    initial_eval_loss: Finite | None = None
    reward_margin: Finite | None = None
    accuracy: Share | None = None
    eval_accuracy: Share | None = None
    peak_memory_bytes: Bytes | None = None
    goodput: Share | None = None
    evaluations: Evaluations | None = None
    gate: GateStatus | None = None
    adapter: AdapterStatus | None = None
    merged: MergedStatus | None = None
    report_sha256: str | None = Field(None, max_length=64, pattern=r"^[0-9a-f]{64}$")
    tracking: TrackingStatus | None = None


Record = ProgressRecord | ResultRecord
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def encode_record(record: Record) -> str:
    """Encode the record as one line of JSON, without the newline.

    Raises ValueError if it is larger than its kind may be.
    """
    limit = MAX_PROGRESS_BYTES if isinstance(record, ProgressRecord) else MAX_RESULT_BYTES
    line = _line(record)
    if len(line) > limit:
        raise ValueError(f"a {record.kind} record of {len(line)} bytes is larger than the {limit} bytes allowed")
    return line


def within_limit(record: ProgressRecord) -> ProgressRecord:
    """Cut the record's activity to the record's limit.

    JSON needs at most twelve bytes for a character.
    """
    excess, kept = len(_line(record)) - MAX_PROGRESS_BYTES, len(record.activity)
    while excess > 0 and kept:
        kept -= 1
        excess -= len(json.dumps(record.activity[kept])) - len('""')
    return replace(record, activity=record.activity[:kept])


def _line(record: Record) -> str:
    return json.dumps(record.dump(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def decode_record(line: str, *, job_uid: str, pod_uid: str) -> Record | None:
    """Decode a line of a log or termination message into a record of this job and pod.

    Returns None for anything else.
    """
    record = decode_any_record(line)
    return record if record is not None and (record.job_uid, record.pod_uid) == (job_uid, pod_uid) else None


def decode_any_record(line: str) -> Record | None:
    """Decode a line of a log into a record by any writer, only for display.

    Returns None for anything else.
    """
    if not line.startswith("{") or len(line.encode(errors="replace")) > MAX_RESULT_BYTES:
        return None
    try:
        return _RECORD.validate_json(line)
    except ValidationError:
        return None


@dataclass(frozen=True)
class WorkspaceLayout:
    """Paths in a job's own folder on the workspace volume."""

    root: Path

    @property
    def models(self) -> Path:
        """Downloaded files of base models: `model/<revision>/`."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """Tokenized and packed data: `data/<fingerprint>/`."""
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/step-N/`, each complete or absent."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """The adapter of the best evaluation, until a checkpoint holds it."""
        return self.root / "best"

    @property
    def initial_adapter(self) -> Path:
        """The adapter of spec.lora.from, checked by prepare."""
        return self.root / "initial-adapter"

    @property
    def trained(self) -> Path:
        """The adapter as training left it, not yet verified."""
        return self.root / "trained"

    @property
    def adapter(self) -> Path:
        """The published adapter, if the job names no other destination."""
        return self.root / "adapter"

    @property
    def base(self) -> Path:
        """The base model in 4-bit."""
        return self.root / "base"

    @property
    def merged(self) -> Path:
        """The merged model, if the job names no other destination."""
        return self.root / "merged"

    @property
    def report(self) -> Path:
        """Loss curve, metrics and summary."""
        return self.root / "report"

    @property
    def records(self) -> Path:
        """Completion records `<step>.json`, `attempts.jsonl` and the libraries' log."""
        return self.root / "records"

    def completion(self, step: StepName) -> Path:
        """Return the step's completion record: if it matches, the step is not repeated."""
        return self.records / f"{step}.json"


@dataclass(frozen=True)
class SweepLayout:
    """Paths in the folder that the cells of a sweep share, next to each cell's folder."""

    root: Path

    @property
    def rows(self) -> Path:
        """Return the folder of rows as tokens.

        The files' names have the data and settings. Each file is complete or absent.
        """
        return self.root / "rows"


@dataclass(frozen=True)
class ModelCacheLayout:
    """Paths on a claim that the jobs of a namespace share."""

    root: Path

    @property
    def quantized(self) -> Path:
        """Base models in 4-bit: `quantized/<digest>/`, each complete or absent."""
        return self.root / "quantized"
