"""Input that was made to do harm: each is refused with the right exit code, no code of it runs, and nothing is written
outside the workspace.

The cases run in the `prepare` step, which alone reads what tenants bring, under a limit of memory and of time: a bomb
that goes off, or a wait for ever, is a failure of the test and not of the machine.
"""

import gzip
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.v1alpha1 import QLoRAJobDocument
from qlora_trainer.checkpoint import newest_checkpoint
from qlora_trainer.failures import StepFailure
from qlora_trainer.prepare import prepare
from tests.trainer.conftest import MakeContext
from tests.trainer.tiny import Recorded, chat_row, write_rows

UNSAFE, CONFIGURATION, DATASET, MODEL = (
    ExitCode.UNSAFE_ARTEFACT,
    ExitCode.BAD_CONFIGURATION,
    ExitCode.BAD_DATASET,
    ExitCode.MODEL_UNAVAILABLE,
)
MEMORY_BYTES = 3 * 2**30
SECONDS = 120


@dataclass(frozen=True)
class Place:
    """Where a case puts what it brings."""

    model: Path
    data: Path
    outside: Path
    """Not on any volume of the job; holds `secret`."""

    @property
    def canary(self) -> Path:
        """What code of the input would make."""
        return self.outside / "canary"

    def config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tokenizer_config(self, **changes: Any) -> None:
        path = self.model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def code(self, name: str) -> None:
        (self.model / name).write_text(f"open({str(self.canary)!r}, 'w').close()\n")

    def template(self, text: str) -> None:
        (self.model / "chat_template.jinja").write_text(text)

    def rows(self, content: bytes, name: str = "train.jsonl") -> None:
        (self.data / "train.jsonl").unlink()
        (self.data / name).write_bytes(content)


Case = Callable[[Place], None]
CASES: dict[str, tuple[Case, tuple[ExitCode, ...]]] = {}


def case(*codes: ExitCode) -> Callable[[Case], Case]:
    """Collect the case; its name, with blanks, says what it tries."""

    def collect(function: Case) -> Case:
        CASES[function.__name__.replace("_", " ")] = (function, codes)
        return function

    return collect


# Code


@case(UNSAFE)
def code_named_by_the_configuration(place: Place) -> None:
    place.code("evil.py")
    place.config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


@case(UNSAFE)
def code_named_deep_in_the_configuration(place: Place) -> None:
    place.code("evil.py")
    place.config(text_config={"sub": [{"auto_map": {"AutoConfig": "evil.Config"}}]})


@case(UNSAFE, CONFIGURATION)
def code_named_by_the_tokenizer(place: Place) -> None:
    place.code("evil.py")
    place.tokenizer_config(tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


@case(UNSAFE)
def an_attention_kernel_from_a_repository(place: Place) -> None:
    place.config(_attn_implementation="attacker/kernel")


@case(UNSAFE)
def an_attention_kernel_under_another_name(place: Place) -> None:
    place.config(attn_implementation_internal="attacker/kernel@main")


@case(UNSAFE)
def other_weights_named_by_the_configuration(place: Place) -> None:
    place.config(transformers_weights="other.safetensors")


@case(UNSAFE)
def an_adapter_in_the_models_folder(place: Place) -> None:
    (place.model / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}}')


class _Payload:
    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._canary),)


@case(UNSAFE, MODEL)
def pickled_weights_alone(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    (place.model / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(place.canary)))


@case(MODEL, UNSAFE)
def a_pickle_under_the_name_of_safetensors(place: Place) -> None:
    (place.model / "model.safetensors").write_bytes(pickle.dumps(_Payload(place.canary)))


@case(DATASET)
def a_pickled_data_set(place: Place) -> None:
    place.rows(pickle.dumps(_Payload(place.canary)))


@case(CONFIGURATION, DATASET)
def a_template_that_climbs_to_the_interpreter(place: Place) -> None:
    climb = "''.__class__.__mro__[1].__subclasses__()"
    place.template("{{ " + climb + " }}{% for message in messages %}{{ message['content'] }}{% endfor %}")


@case(CONFIGURATION, DATASET)
def a_template_that_reads_a_file(place: Place) -> None:
    place.template("{{ cycler.__init__.__globals__.os.mkdir('" + str(place.canary) + "') }}")


@case(CONFIGURATION, DATASET)
def a_template_that_includes_another(place: Place) -> None:
    place.template("{% include '" + str(place.outside / "secret") + "' %}")


# Paths


@case(UNSAFE, MODEL)
def an_index_that_climbs(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    _index(place, "../../outside/model.safetensors")


@case(UNSAFE, MODEL)
def an_index_with_an_absolute_path(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    _index(place, str(place.outside / "model.safetensors"))


@case(UNSAFE, MODEL)
def an_index_that_names_a_pickle(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    (place.model / "weights.bin").write_bytes(pickle.dumps(_Payload(place.canary)))
    _index(place, "weights.bin")


def _index(place: Place, file: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": file}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


@case(UNSAFE)
def weights_that_are_a_link(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    (place.model / "model.safetensors").symlink_to(place.outside / "model.safetensors")


@case(UNSAFE)
def a_configuration_that_is_a_link(place: Place) -> None:
    shutil.move(place.model / "config.json", place.outside / "config.json")
    (place.model / "config.json").symlink_to(place.outside / "config.json")


@case(UNSAFE, DATASET)
def data_that_are_a_link(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    (place.data / "train.jsonl").symlink_to(place.outside / "secret")


@case(UNSAFE, MODEL)
def a_link_that_leads_to_itself(place: Place) -> None:
    (place.model / "config.json").unlink()
    (place.model / "config.json").symlink_to(place.model / "config.json")


@case(UNSAFE)
def weights_that_are_a_pipe(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    os.mkfifo(place.model / "model.safetensors")


@case(UNSAFE, MODEL)
def a_configuration_that_is_a_pipe(place: Place) -> None:
    (place.model / "config.json").unlink()
    os.mkfifo(place.model / "config.json")


@case(UNSAFE, DATASET)
def data_that_are_a_pipe(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    os.mkfifo(place.data / "train.jsonl")


@case(UNSAFE, DATASET)
def data_that_are_an_endless_device(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    (place.data / "train.jsonl").symlink_to("/dev/zero")


@case(UNSAFE, MODEL)
def a_folder_in_place_of_the_configuration(place: Place) -> None:
    (place.model / "config.json").unlink()
    (place.model / "config.json").mkdir()


@case(DATASET)
def an_archive_that_climbs(place: Place) -> None:
    with zipfile.ZipFile(place.outside / "rows.zip", "w") as archive:
        archive.writestr("../../outside/canary", "x")
    place.rows((place.outside / "rows.zip").read_bytes())


@case(DATASET)
def a_tar_in_a_compressed_file(place: Place) -> None:
    with tarfile.open(place.outside / "rows.tar", "w") as archive:
        archive.add(place.outside / "secret", "../../outside/canary")
    (place.data / "train.jsonl").write_bytes((place.outside / "rows.tar").read_bytes())


# Bombs


@case(DATASET)
def a_gzip_bomb(place: Place) -> None:
    with gzip.open(place.data / "train.jsonl.gz", "wb") as bomb:
        for _ in range(512):
            bomb.write(b" " * 2**20)
    (place.data / "train.jsonl").unlink()


@case(DATASET)
def a_line_without_end(place: Place) -> None:
    with (place.data / "train.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(2**32)


@case(DATASET)
def rows_that_nest_without_end(place: Place) -> None:
    place.rows(b'{"text": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}\n")


@case(DATASET)
def a_number_of_a_million_digits(place: Place) -> None:
    place.rows(b'{"text": "a", "n": ' + b"9" * 1_000_000 + b"}\n")


@case(DATASET)
def a_parquet_page_that_says_it_is_huge(place: Place) -> None:
    table = pyarrow.table({"text": ["word"] * 100})
    pyarrow.parquet.write_table(table, place.outside / "rows.parquet", compression="zstd")
    content = bytearray((place.outside / "rows.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (place.data / "train.jsonl").unlink()
    (place.data / "train.parquet").write_bytes(bytes(content))


@case(CONFIGURATION)
def a_configuration_that_nests_without_end(place: Place) -> None:
    (place.model / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


@case(CONFIGURATION, MODEL, UNSAFE)
def a_configuration_of_many_megabytes(place: Place) -> None:
    (place.model / "config.json").write_text('{"model_type": "llama", "x": "' + "a" * 300_000_000 + '"}')


@case(CONFIGURATION)
def a_billion_layers(place: Place) -> None:
    place.config(num_hidden_layers=10**9)


@case(CONFIGURATION)
def a_vocabulary_larger_than_memory(place: Place) -> None:
    place.config(vocab_size=2**50)


@case(CONFIGURATION)
def layers_wider_than_memory(place: Place) -> None:
    place.config(hidden_size=2**40, intermediate_size=2**40)


@case(CONFIGURATION)
def sizes_below_zero(place: Place) -> None:
    place.config(hidden_size=-64, num_attention_heads=-4)


@case(CONFIGURATION)
def a_list_of_layers_without_end(place: Place) -> None:
    place.config(layer_types=["full_attention"] * 5_000_000)


@case(CONFIGURATION, DATASET)
def a_template_that_writes_without_end(place: Place) -> None:
    place.template("{{ 'a' * 10000000000 }}")


@case(CONFIGURATION, DATASET)
def a_template_that_counts_without_end(place: Place) -> None:
    place.template("{% for i in range(10 ** 12) %}a{% endfor %}")


@case(CONFIGURATION, DATASET)
def a_template_that_calls_itself(place: Place) -> None:
    place.template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


@case(MODEL, UNSAFE)
def a_safetensors_header_longer_than_the_file(place: Place) -> None:
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


@case(MODEL, UNSAFE)
def a_safetensors_header_that_nests_without_end(place: Place) -> None:
    header = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


@case(MODEL, UNSAFE)
def safetensors_that_overlap(place: Place) -> None:
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


@case(MODEL, UNSAFE)
def safetensors_that_end_before_they_begin(place: Place) -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 0]}}).encode()
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


# Encodings


@case(CONFIGURATION)
def a_configuration_that_is_no_text(place: Place) -> None:
    (place.model / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')


@case(DATASET)
def data_in_no_encoding(place: Place) -> None:
    place.rows(b'{"text": "\xc3\x28"}\n')


@case(DATASET)
def half_of_a_character(place: Place) -> None:
    place.rows(b'{"text": "\\ud800"}\n')


@case(CONFIGURATION, MODEL)
def a_tokenizer_that_is_no_tokenizer(place: Place) -> None:
    (place.model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')


@contextmanager
def bounded() -> Iterator[None]:
    """At most so much more memory, and so much time, as if a bomb went off it must not take the machine with it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def too_long(_signal: int, _frame: object) -> None:
        raise AssertionError(f"not refused within {SECONDS} s")

    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path) -> dict[str, int]:
    """Every file below with its size; links and pipes are not followed."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_is_refused_and_does_nothing(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, records: Recorded, name: str
) -> None:
    place = Place(tmp_path / "models" / "model", tmp_path / "data", tmp_path / "outside")
    shutil.copytree(tiny_llama, place.model)
    place.outside.mkdir()
    (place.outside / "secret").write_text("hf_secretsecretsecret")
    write_rows(place.data / "train.jsonl", [chat_row("a question", "an answer")] * 3)
    attack, codes = CASES[name]
    attack(place)
    source = next((path.name for path in place.data.iterdir() if path.name.startswith("train.")), "train.jsonl")
    context = make_context({"dataset": {"source": f"pvc://data/{source}"}}, model=place.model)
    before = tree(tmp_path / "outside") | tree(tmp_path / "models") | tree(tmp_path / "data")
    with bounded(), pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code in codes, failure.value.message
    assert "secretsecret" not in failure.value.message
    assert not place.canary.exists()
    assert tree(tmp_path / "outside") | tree(tmp_path / "models") | tree(tmp_path / "data") == before
    assert not context.workspace.completion("prepare").exists()


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(CASES) >= 40


ADDRESSES = [
    "hf://../../etc",
    "hf://org/..",
    "hf://org/name@evil.example",
    "hf://user:password@evil.example/name",
    "hf://org/name?token=x",
    "hf://org/name#x",
    "hf://org/na%2e%2eme/%2e%2e",
    "hf://org/name\n",
    "hf://org/name\x00",
    "hf://оrg/name",  # the first letter is Cyrillic
    "http://169.254.169.254/latest/meta-data",
    "https://huggingface.co/org/name",
    "file:///etc/passwd",
    "/etc/passwd",
    "../model",
    "pvc://claim/../../etc",
    "pvc://claim/.git/config",
    "pvc://../claim",
    "pvc://claim//etc",
    "s3://bucket/../other",
    "s3://user:key@bucket/path",
    "s3://bucket@evil.example/path",
    "oci://user:password@registry.example/name:tag",
    "oci://registry.example/../name:tag",
    "oci://registry.example/name:tag@evil.example",
    "HF://org/name",
    "hf:org/name",
    " hf://org/name",
    "hf://" + "a" * 600 + "/name",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", ["model", "dataset", "destination"])
def test_an_address_that_means_another_place_is_refused_by_the_schema(field: str, address: str) -> None:
    spec: dict[str, Any] = {"model": {"source": "hf://org/name"}, "dataset": {"source": "hf://org/rows"}}
    if field == "destination":
        spec["output"] = {"destination": address}
    else:
        spec[field] = {"source": address}
    document = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "a"}, "spec": spec}
    with pytest.raises(ValidationError):
        QLoRAJobDocument.model_validate(document)


@pytest.mark.parametrize("name", ["../../outside/secret", "/etc/passwd", "adapter.safetensors/../../x"])
def test_a_checkpoint_that_names_files_elsewhere_is_set_aside(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": {name: "0" * 64, "state.json": "0" * 64}}))
    (checkpoint / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert checkpoint.with_name("step-2.corrupt").is_dir()


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(_Payload(tmp_path / "canary")))
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert not (tmp_path / "canary").exists()
