"""Models that were made to do harm: each is rejected by the right guard, runs no code and writes nothing outside.

The cases run in the `prepare` step, which alone reads tenants' files, under a limit of memory and of time: a bomb that
goes off, or a wait for ever, is a failure of the test and not of the machine.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from tests.support.runs.hostile import Case, Payload, Place, collector, new_trial
from tests.trainer.conftest import MakeContext

UNSAFE, CONFIGURATION = ExitCode.UNSAFE_ARTIFACT, ExitCode.BAD_CONFIGURATION
DATASET, MODEL = ExitCode.BAD_DATASET, ExitCode.MODEL_UNAVAILABLE
CASES: dict[str, Case] = {}
case = collector(CASES)
Table = dict[str, tuple[Any, ExitCode, str]]


# Configurations

KERNEL, TOWER = "would download and run a kernel", "settings of a tower would be read from another place"
REMOTE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 10**9}
CONFIGS: Table = {
    "code named by the configuration": ({"auto_map": REMOTE}, UNSAFE, "has auto_map"),
    "code named deep in it": ({"text_config": {"sub": [{"auto_map": REMOTE}]}}, UNSAFE, "has auto_map"),
    "an attention kernel from a repository": ({"_attn_implementation": "attacker/kernel"}, UNSAFE, KERNEL),
    "a kernel under another name": ({"attn_implementation_internal": "attacker/kernel@main"}, UNSAFE, KERNEL),
    "other weights": ({"transformers_weights": "other.safetensors"}, UNSAFE, "has transformers_weights"),
    "a tower from a repository": (
        {"model_type": "gemma3n", "vision_config": {"architecture": "hf-hub:attacker/tower"}},
        UNSAFE,
        TOWER,
    ),
    "many megabytes": ({"x": "a" * 300_000_000}, CONFIGURATION, "at most 16777216 bytes are read"),
    "a billion layers": ({"num_hidden_layers": 10**9}, CONFIGURATION, "num_hidden_layers"),
    "a tower of a billion layers": (
        {"model_type": "llava", "vision_config": CLIP},
        CONFIGURATION,
        "its num_hidden_layers is 1000000000, and at most 1024 are allowed",
    ),
    "a vocabulary larger than memory": (
        {"vocab_size": 2**50},
        CONFIGURATION,
        "vocab_size is 1125899906842624, and at most 10000000 are allowed",
    ),
    "layers wider than memory": (
        {"hidden_size": 2**40, "intermediate_size": 2**40},
        CONFIGURATION,
        "hidden_size is 1099511627776, and at most 131072 are allowed",
    ),
    "sizes below zero": ({"hidden_size": -64, "num_attention_heads": -4}, CONFIGURATION, "negative dimension -64"),
    "a list of layers without end": (
        {"layer_types": ["full_attention"] * 500_000},
        CONFIGURATION,
        "number of `layer_types` (500000)",
    ),
}


def configure(changes: dict[str, Any], place: Place) -> None:
    """Change the configuration, with code next to it."""
    place.code(place.model, "evil.py")
    place.config(**changes)


@case(UNSAFE, "tokenizer_config.json has auto_map")
def code_named_by_the_tokenizer(place: Place) -> None:
    place.code(place.model, "evil.py")
    place.tokenizer_config(tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


@case(UNSAFE, "settings of a tower would be read from another place")
def a_tower_from_a_folder(place: Place) -> None:
    folder = place.outside / "tower"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    tower = {"model_type": "timm_backbone", "backbone": f"local-dir:{folder}"}
    place.config(model_type="llava", vision_config=tower, text_config={"model_type": "llama"})


@case(UNSAFE, "weights of a tower would be read from another file")
def weights_of_a_tower_from_another_file(place: Place) -> None:
    pickled = place.outside / "tower.pth"
    pickled.write_bytes(pickle.dumps(Payload(place.canary)))
    place.config(model_type="gemma3n", vision_config={"model_args": {"checkpoint_path": str(pickled)}})


@case(UNSAFE, "has adapter_config.json")
def an_adapter_in_the_models_folder(place: Place) -> None:
    (place.model / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}}')


@case(UNSAFE, "which can run code")
def pickled_weights_alone(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    (place.model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(place.canary)))


# Templates

CLIMB = "''.__class__.__mro__[1].__subclasses__()"
TEMPLATES: Table = {
    "it climbs to the interpreter": ("{{ " + CLIMB + " }}", DATASET, "is unsafe"),
    "it reads a file": ("{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}", DATASET, "is unsafe"),
    "it includes another": ("{% include 'SECRET' %}", DATASET, "no loader"),
    "it writes without end": ("{{ 'a' * 10000000000 }}", DATASET, "needs more memory than there is"),
    "it counts without end": ("{% for i in range(10 ** 12) %}a{% endfor %}", DATASET, "Range too big"),
    "it calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DATASET, "recursion"),
    "it nests without end": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", CONFIGURATION, "cannot be used"),
    "more loops than Python takes": (
        "{% for m in messages %}" * 30 + "{{ m }}" + "{% endfor %}" * 30,
        CONFIGURATION,
        "template cannot be used",
    ),
    "it asks a number for its items": ("{{ 1 | dictsort }}", DATASET, "template rejects this conversation"),
}


def put_template(text: str, place: Place) -> None:
    """Give the model this template. CANARY and SECRET are paths of the place."""
    place.template(text.replace("CANARY", str(place.canary)).replace("SECRET", str(place.outside / "secret")))


# Paths


@case(UNSAFE, "allowed are plain names")
def an_index_that_climbs(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    _index(place, "../../outside/model.safetensors")


@case(UNSAFE, "allowed are plain names")
def an_index_with_an_absolute_path(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    _index(place, str(place.outside / "model.safetensors"))


@case(UNSAFE, "allowed are plain names")
def an_index_that_names_a_pickle(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    (place.model / "weights.bin").write_bytes(pickle.dumps(Payload(place.canary)))
    _index(place, "weights.bin")


def _index(place: Place, file: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": file}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


@case(UNSAFE, "is a link that leads out of its folder")
def weights_that_are_a_link(place: Place) -> None:
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    (place.model / "model.safetensors").symlink_to(place.outside / "model.safetensors")


@case(UNSAFE, "is a link that leads out of its folder")
def a_configuration_that_is_a_link(place: Place) -> None:
    shutil.move(place.model / "config.json", place.outside / "config.json")
    (place.model / "config.json").symlink_to(place.outside / "config.json")


@case(UNSAFE, "is a link that leads to itself")
def a_link_that_leads_to_itself(place: Place) -> None:
    (place.model / "config.json").unlink()
    (place.model / "config.json").symlink_to(place.model / "config.json")


@case(UNSAFE, "is not a regular file")
def weights_that_are_a_pipe(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    os.mkfifo(place.model / "model.safetensors")


@case(UNSAFE, "is not a regular file")
def a_configuration_that_is_a_pipe(place: Place) -> None:
    (place.model / "config.json").unlink()
    os.mkfifo(place.model / "config.json")


@case(UNSAFE, "is not a regular file")
def a_folder_in_place_of_the_configuration(place: Place) -> None:
    (place.model / "config.json").unlink()
    (place.model / "config.json").mkdir()


# Files

NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
ENTRY = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}


def safetensors(header: str, length: int | None = None) -> bytes:
    """A file with this header, and eight bytes of data."""
    return struct.pack("<Q", length or len(header)) + header.encode() + b"\0" * 8


NOT_WHOLE, NOT_JSON = "is not a whole safetensors file", "is not JSON"
FILES: dict[str, tuple[str, Callable[[Place], bytes], ExitCode, str]] = {
    "a pickle under the name of safetensors": (
        "model.safetensors",
        lambda place: pickle.dumps(Payload(place.canary)),
        MODEL,
        NOT_WHOLE,
    ),
    "a header longer than the file": ("model.safetensors", lambda _: safetensors("{}", 2**60), MODEL, NOT_WHOLE),
    "a header that nests without end": ("model.safetensors", lambda _: safetensors(NESTED), MODEL, NOT_WHOLE),
    "tensors that overlap": (
        "model.safetensors",
        lambda _: safetensors(json.dumps({"a": ENTRY, "b": ENTRY})),
        MODEL,
        NOT_WHOLE,
    ),
    "a tensor that ends before it begins": (
        "model.safetensors",
        lambda _: safetensors(json.dumps({"a": ENTRY | {"data_offsets": [8, 0]}})),
        MODEL,
        NOT_WHOLE,
    ),
    "a configuration that nests without end": ("config.json", lambda _: NESTED.encode(), CONFIGURATION, NOT_JSON),
    "a configuration that is no text": (
        "config.json",
        lambda _: b'{"model_type": "\xff\xfe"}',
        CONFIGURATION,
        NOT_JSON,
    ),
    "a tokenizer that is no tokenizer": (
        "tokenizer.json",
        lambda _: b'{"version": "1.0", "model": {"type": "Evil"}}',
        CONFIGURATION,
        "tokenizer cannot be loaded",
    ),
}


def put_file(name: str, content: Callable[[Place], bytes], place: Place) -> None:
    """Replace one of the model's files."""
    (place.model / name).write_bytes(content(place))


CASES |= {
    **{name: Case(partial(configure, changes), code, says) for name, (changes, code, says) in CONFIGS.items()},
    **{name: Case(partial(put_template, text), code, says) for name, (text, code, says) in TEMPLATES.items()},
    **{name: Case(partial(put_file, file, made), code, says) for name, (file, made, code, says) in FILES.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_model_is_rejected_and_does_nothing(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    new_trial(tmp_path, tiny_llama, make_context, monkeypatch).require_rejection(CASES[name])
