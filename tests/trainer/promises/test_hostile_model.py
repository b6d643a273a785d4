"""Models that were made to do harm: each is rejected by the right guard, runs no code and writes nothing outside.

The cases run in the `prepare` step, which alone reads tenants' files, under a limit of memory and of time: a bomb that
goes off, or a wait for ever, is a failure of the test and not of the machine.
"""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from tests.support.runs.hostile import Case, Payload, Place, collector, new_trial
from tests.trainer.conftest import MakeContext

UNSAFE, CONFIGURATION, DATASET, MODEL = (
    ExitCode.UNSAFE_ARTIFACT,
    ExitCode.BAD_CONFIGURATION,
    ExitCode.BAD_DATASET,
    ExitCode.MODEL_UNAVAILABLE,
)
CASES: dict[str, Case] = {}
case = collector(CASES)


# Code


@case(UNSAFE, "has auto_map")
def code_named_by_the_configuration(place: Place) -> None:
    place.code(place.model, "evil.py")
    place.config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


@case(UNSAFE, "has auto_map")
def code_named_deep_in_the_configuration(place: Place) -> None:
    place.code(place.model, "evil.py")
    place.config(text_config={"sub": [{"auto_map": {"AutoConfig": "evil.Config"}}]})


@case(UNSAFE, "tokenizer_config.json has auto_map")
def code_named_by_the_tokenizer(place: Place) -> None:
    place.code(place.model, "evil.py")
    place.tokenizer_config(tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


@case(UNSAFE, "would download and run a kernel")
def an_attention_kernel_from_a_repository(place: Place) -> None:
    place.config(_attn_implementation="attacker/kernel")


@case(UNSAFE, "would download and run a kernel")
def an_attention_kernel_under_another_name(place: Place) -> None:
    place.config(attn_implementation_internal="attacker/kernel@main")


@case(UNSAFE, "has transformers_weights")
def other_weights_named_by_the_configuration(place: Place) -> None:
    place.config(transformers_weights="other.safetensors")


@case(UNSAFE, "settings of a tower would be read from another place")
def a_tower_from_a_repository(place: Place) -> None:
    place.config(model_type="gemma3n", vision_config={"architecture": "hf-hub:attacker/tower"})


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


@case(MODEL, "is not a whole safetensors file")
def a_pickle_under_the_name_of_safetensors(place: Place) -> None:
    (place.model / "model.safetensors").write_bytes(pickle.dumps(Payload(place.canary)))


@case(DATASET, "is unsafe")
def a_template_that_climbs_to_the_interpreter(place: Place) -> None:
    climb = "''.__class__.__mro__[1].__subclasses__()"
    place.template("{{ " + climb + " }}{% for message in messages %}{{ message['content'] }}{% endfor %}")


@case(DATASET, "is unsafe")
def a_template_that_reads_a_file(place: Place) -> None:
    place.template("{{ cycler.__init__.__globals__.os.mkdir('" + str(place.canary) + "') }}")


@case(DATASET, "no loader")
def a_template_that_includes_another(place: Place) -> None:
    place.template("{% include '" + str(place.outside / "secret") + "' %}")


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


# Bombs


@case(CONFIGURATION, "is not JSON")
def a_configuration_that_nests_without_end(place: Place) -> None:
    (place.model / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


@case(CONFIGURATION, "at most 16777216 bytes are read")
def a_configuration_of_many_megabytes(place: Place) -> None:
    place.config(x="a" * 300_000_000)


@case(CONFIGURATION, "num_hidden_layers")
def a_billion_layers(place: Place) -> None:
    place.config(num_hidden_layers=10**9)


@case(CONFIGURATION, "its num_hidden_layers is 1000000000, and at most 1024 are allowed")
def a_tower_of_a_billion_layers(place: Place) -> None:
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 10**9}
    place.config(model_type="llava", vision_config=tower)


@case(CONFIGURATION, "vocab_size is 1125899906842624, and at most 10000000 are allowed")
def a_vocabulary_larger_than_memory(place: Place) -> None:
    place.config(vocab_size=2**50)


@case(CONFIGURATION, "hidden_size is 1099511627776, and at most 131072 are allowed")
def layers_wider_than_memory(place: Place) -> None:
    place.config(hidden_size=2**40, intermediate_size=2**40)


@case(CONFIGURATION, "negative dimension -64")
def sizes_below_zero(place: Place) -> None:
    place.config(hidden_size=-64, num_attention_heads=-4)


@case(CONFIGURATION, "number of `layer_types` (500000)")
def a_list_of_layers_without_end(place: Place) -> None:
    place.config(layer_types=["full_attention"] * 500_000)


@case(DATASET, "needs more memory than there is")
def a_template_that_writes_without_end(place: Place) -> None:
    place.template("{{ 'a' * 10000000000 }}")


@case(DATASET, "Range too big")
def a_template_that_counts_without_end(place: Place) -> None:
    place.template("{% for i in range(10 ** 12) %}a{% endfor %}")


@case(DATASET, "recursion")
def a_template_that_calls_itself(place: Place) -> None:
    place.template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


@case(CONFIGURATION, "template cannot be used")
def a_template_that_nests_without_end(place: Place) -> None:
    place.template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}")


@case(CONFIGURATION, "template cannot be used")
def a_template_of_more_loops_than_python_takes(place: Place) -> None:
    place.template("{% for m in messages %}" * 30 + "{{ m }}" + "{% endfor %}" * 30)


@case(DATASET, "template rejects this conversation")
def a_template_that_asks_a_number_for_its_items(place: Place) -> None:
    place.template("{{ 1 | dictsort }}")


@case(MODEL, "is not a whole safetensors file")
def a_safetensors_header_longer_than_the_file(place: Place) -> None:
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


@case(MODEL, "is not a whole safetensors file")
def a_safetensors_header_that_nests_without_end(place: Place) -> None:
    header = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


@case(MODEL, "is not a whole safetensors file")
def safetensors_that_overlap(place: Place) -> None:
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


@case(MODEL, "is not a whole safetensors file")
def safetensors_that_end_before_they_begin(place: Place) -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 0]}}).encode()
    (place.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


# Encodings


@case(CONFIGURATION, "is not JSON")
def a_configuration_that_is_no_text(place: Place) -> None:
    (place.model / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')


@case(CONFIGURATION, "tokenizer cannot be loaded")
def a_tokenizer_that_is_no_tokenizer(place: Place) -> None:
    (place.model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_model_is_rejected_and_does_nothing(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    new_trial(tmp_path, tiny_llama, make_context, monkeypatch).require_rejection(CASES[name])
