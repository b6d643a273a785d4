"""A real vLLM on a CPU answers as PEFT did in training, and serves no adapter that the plugin has not verified.

The job is the demo's. `make test-serving` makes the environment that vLLM runs in.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from devcluster.addresses import free_port
from examples.demo.__main__ import model_folder
from qlora_api.channel import Channel, ChannelAdapter, ChannelStatement, channel_key, parse_adapter_name
from qlora_api.lineage import SIGNED_FILE, UNSIGNED_FILE, Statement
from qlora_api.schema import replace
from qlora_trainer.publishing.signing import sign
from qlora_vllm.layout import Layout
from tests.support.signed_adapter import KEY, public_pem
from tests.support.waiting import eventually

PYTHON = os.environ.get("QLORA_VLLM_PYTHON")
"""The interpreter of the environment with vLLM."""
DEMO = Path(__file__).parents[2] / "examples" / "demo"
MAX_NEW_TOKENS = 40
NEAR_TIE = 0.25
"""Nats. The logits of this model, in 16 bit, are multiples of 0.125."""
START_SECONDS = 1200
PROD = "team/demo@prod"
VARYING = {"id": None, "created": None, "usage": None}
"""Of an answer."""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="vLLM is installed by `make test-serving`")


@dataclass(frozen=True)
class Published:
    """The job's output, on a volume."""

    model: Path
    """The job's base, in 16 bit, as it was before."""
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "demo"

    @property
    def base(self) -> Path:
        return self.folder / "base"


@dataclass(frozen=True)
class Answer:
    """Tokens of a greedy answer, and how far each was ahead of the second, in nats."""

    tokens: list[int]
    leads: list[float]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The demo's adapter, and its base dequantized to 16 bit."""
    root, model = tmp_path_factory.mktemp("served"), model_folder()
    inputs = root / "inputs"
    shutil.copytree(model, inputs / "model")
    for name in ("train.jsonl", "held-out.jsonl"):
        shutil.copy(DEMO / name, inputs)
    (root / "volume").mkdir()
    manifest = yaml.safe_load((DEMO.parent / "demo.yaml").read_text())
    manifest["spec"]["output"] = {
        "destination": "pvc://served/demo",
        "base": {"destination": "pvc://served/base", "type": "bfloat16"},
    }
    (root / "job.yaml").write_text(yaml.safe_dump(manifest))
    volumes = [f"--volume=demo-inputs={inputs}", f"--volume=served={root / 'volume'}"]
    command = ["-m", "qlora_cli", "run", f"{root}/job.yaml", f"--workspace={root}/workspace", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *command, *volumes], env=environment, check=True)
    return Published(model, root / "volume")


@contextmanager
def vllm(log: Path, model: Path, *options: str, **environment: str) -> Iterator[str]:
    """Serve `model` with LoRA on a loopback port. Yields the address."""
    port = free_port()
    server = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", "--host=127.0.0.1"]
    settings = [f"--port={port}", "--dtype=bfloat16", "--enforce-eager", "--max-model-len=512", "--enable-lora"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | environment
    # vLLM reads as a number what make exports as an empty text.
    inherited = {name: value for name, value in os.environ.items() if name != "VERBOSE"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*server, *settings, *options], env=inherited | variables, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(partial(is_ready_or_ended, process, address), seconds=START_SECONDS, what="vLLM's readiness")
        assert process.poll() is None, log.read_text()[-5000:]
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def is_ready_or_ended(process: "subprocess.Popen[bytes]", address: str) -> bool:
    try:
        return process.poll() is not None or requests.get(f"{address}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def ask(address: str, model: str, messages: list[dict[str, str]]) -> requests.Response:
    body: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
    details = {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
    return requests.post(f"{address}/v1/chat/completions", json=body | details, timeout=300)


def answer_of_vllm(address: str, messages: list[dict[str, str]]) -> Answer:
    choice = ask(address, "demo", messages).json()["choices"][0]
    tops = [token["top_logprobs"] for token in choice["logprobs"]["content"]]
    return Answer(choice["token_ids"], [first["logprob"] - second["logprob"] for first, second in tops])


def answer_of_peft(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> Answer:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(
        **prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = output.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    tops = [logits[0].float().topk(2).values.tolist() for logits in output.logits]
    return Answer(tokens, [first - second for first, second in tops])


def in_4_bit(published: Published) -> Any:
    """The adapter on the base as it was in training, by plain libraries."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(published.model, dtype=torch.bfloat16, quantization_config=settings)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # Its kernel for CPUs multiplies other numbers: it does not round the dequantized weights to 16 bit.
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, published.adapter).eval()


def difference(one: Answer, other: Answer) -> float | None:
    """The smaller lead, in nats, of the first different tokens; None for equal answers."""
    if one.tokens == other.tokens:
        return None
    places = [at for at, pair in enumerate(zip(one.tokens, other.tokens, strict=False)) if pair[0] != pair[1]]
    # One is the beginning of the other.
    return min(one.leads[places[0]], other.leads[places[0]]) if places else inf


def test_vllm_on_the_dequantized_base_answers_as_peft_on_the_4_bit_one(published: Published, tmp_path: Path) -> None:
    """Also where two tokens are equally likely, but for the rounding of logits. The original base gives 11 others."""
    rows = [json.loads(line)["messages"] for line in (DEMO / "held-out.jsonl").read_text().splitlines()]
    tokenizer, model = AutoTokenizer.from_pretrained(published.model), in_4_bit(published)
    expected = [answer_of_peft(model, tokenizer, row[:-1]) for row in rows]

    options = (f"--lora-modules=demo={published.adapter}", "--max-lora-rank=16")
    with vllm(tmp_path / "log", published.base, *options) as address:
        found = [answer_of_vllm(address, row[:-1]) for row in rows]

    differences = [each for pair in zip(found, expected, strict=True) if (each := difference(*pair)) is not None]
    assert len(differences) <= len(rows) // 10
    assert max(differences, default=0) <= NEAR_TIE


def test_only_verified_adapters_are_served_by_name_and_by_channel(published: Published, tmp_path: Path) -> None:
    """Tests of the plugin without a server are in tests/unit/qlora_vllm."""
    pod = Layout(tmp_path / "qlora")
    name = sign_and_announce(published, pod)
    changed = sign_and_announce(published, pod, job="changed")
    config = pod.claims / "served" / "changed" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 9'))
    promote(pod, name, 1)
    question = [{"role": "user", "content": "List the pods of team-blue."}]
    by_hand = {"lora_name": "by-hand", "lora_path": str(pod.claims / "served" / "demo")}

    # Another plugin, which is not named, would load adapters without a check.
    plugin = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "qlora", "QLORA_FOLDER": str(pod.root)}
    options = ("--max-lora-rank=16", f"--lora-modules=by-argument={published.adapter}")
    with vllm(tmp_path / "log", published.base, *options, **plugin) as address:
        eventually(lambda: requests.get(f"{address}/qlora/ready", timeout=60).ok, seconds=600, what="the channels")
        answer = ask(address, name, question)
        assert answer.json()["choices"] == ask(address, "by-argument", question).json()["choices"]
        assert answer.json()["model"] == name
        assert ask(address, changed, question).status_code == requests.codes.not_found
        for route, body in (
            ("v1/load_lora_adapter", by_hand),
            ("v1/unload_lora_adapter", by_hand),
            ("adapters", {"name": "by-hand", "src": by_hand["lora_path"]}),
        ):
            done = requests.post(f"{address}/{route}", json=body, timeout=60)
            assert (done.status_code, "verified adapters only" in done.text) == (requests.codes.forbidden, True), route
        assert ask(address, PROD, question).json() | VARYING == answer.json() | VARYING
        promote(pod, changed, 2)
        eventually(lambda: "problem" in channel(address), seconds=60, what="the failed promotion")
        assert ask(address, PROD, question).json()["model"] == name
        status = requests.get(f"{address}/v1/qlora/adapters", timeout=60).json()
        metrics = requests.get(f"{address}/metrics", timeout=60).text

    assert status["base"]["measured"] is True
    assert (status["channels"][0]["sequence"], status["channels"][0]["problem"]["sequence"]) == (1, 2)
    shown = {each["name"]: each["reason"] for each in status["adapters"]}
    assert shown[name] is None
    assert "adapter_config.json has SHA-256" in shown[changed]
    assert 'qlora_adapters_resolved_total{outcome="rejected"}' in metrics
    assert f'qlora_channel_sequence{{channel="{PROD}"}} 1.0' in metrics


SETTINGS = """
import os
from types import SimpleNamespace
from fastapi import FastAPI
from vllm.lora.resolver import LoRAResolverRegistry
from qlora_vllm.plugin import Plugin

def rejection(**variables):
    os.environ.update(variables)
    app = FastAPI()
    app.state.args = SimpleNamespace(model="org/model", revision="0" * 40, max_lora_rank=16)
    try:
        Plugin().attach_router(app)
        return "none"
    except ValueError as error:
        return str(error)
    finally:
        for name in variables:
            del os.environ[name]

allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}
print(rejection())
print(rejection(**allowed, VLLM_SERVER_DEV_MODE="1"))
print(rejection(**allowed, VLLM_SKIP_MODEL_NAME_VALIDATION="1"))
print(rejection(**allowed))
LoRAResolverRegistry.register_resolver("other", object())
print(rejection(**allowed))
"""


def test_the_plugin_starts_no_server_that_would_answer_with_an_unverified_adapter(tmp_path: Path) -> None:
    environment = {**os.environ, "QLORA_FOLDER": str(tmp_path)}
    done = subprocess.run([str(PYTHON), "-c", SETTINGS], env=environment, capture_output=True, text=True, check=True)
    expected = (
        "set VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "unset VLLM_SERVER_DEV_MODE",
        "unset VLLM_SKIP_MODEL_NAME_VALIDATION",
        "none",
        "set VLLM_PLUGINS to qlora only: other would",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("set ", "unset ", "none"))]
    assert [line[: len(each)] for line, each in zip(lines, expected, strict=True)] == list(expected)


def channel(address: str) -> dict[str, Any]:
    (shown,) = requests.get(f"{address}/v1/qlora/adapters", timeout=60).json()["channels"]
    return dict(shown)


def promote(pod: Layout, adapter: str, sequence: int) -> None:
    name = parse_adapter_name(adapter)
    led = ChannelAdapter(job=name.job, uri=f"pvc://served/{name.job}", sha256=name.sha256)
    promotion = Channel(
        namespace="team", name="demo@prod", sequence=sequence, adapter=led, promoted_at="2026-12-03T00:00:00Z"
    )
    statement = ChannelStatement(subject=(), predicate=promotion).model_dump_json(by_alias=True)
    (pod.records / "team" / channel_key(promotion.name)).write_text(statement)


def sign_and_announce(published: Published, pod: Layout, job: str = "demo") -> str:
    """Copy the adapter to a claim of the server's pod as that of the job, signed. Returns its name."""
    folder = shutil.copytree(published.adapter, pod.claims / "served" / job, copy_function=shutil.copyfile)
    statement = Statement.model_validate_json((folder / UNSIGNED_FILE).read_bytes())
    lineage = statement.predicate
    owner = replace(lineage.job, name=job, namespace="team")
    own = replace(statement, predicate=replace(lineage, job=owner))
    (folder / SIGNED_FILE).write_bytes(sign(own.model_dump_json(by_alias=True).encode(), KEY))
    digests = {subject.name: subject.digest["sha256"] for subject in statement.subject}
    digest = f"sha256:{digests['adapter_model.safetensors']}"
    for parent in (pod.records / "team", pod.key("team").parent):
        parent.mkdir(parents=True, exist_ok=True)
    (pod.records / "team" / f"{job}.json").write_text(json.dumps({"uri": f"pvc://served/{job}", "digest": digest}))
    pod.key("team").write_bytes(public_pem(KEY))
    return f"team/{job}@{digest}"
