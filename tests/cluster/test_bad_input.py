"""Bad inputs on a claim: Failed before a GPU is requested, with one sentence that names the fix, and unchanged.

The trainer's own tests go through all of it, and test_life.py has rows that cannot be read; here it must reach the
status.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.environment import INPUTS, Tenant, tiny_job

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def bad(tenant: Tenant, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """Add bad files to the tenant's good ones, and check at the end that none changed."""
    folder = tmp_path_factory.mktemp("bad")
    with tenant.volume(INPUTS) as pod:
        shutil.copytree(tiny_model, folder / "big")
        (folder / "big" / "config.json").write_text(json.dumps(LLAMA_70B))
        pod.put(folder / "big", "big")
        (folder / "pickled").mkdir()
        (folder / "pickled" / "config.json").write_text((tiny_model / "config.json").read_text())
        (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        pod.put(folder / "pickled", "pickled")
        before = listing(pod.run("find", "/volume", "-type", "f", "-exec", "sha256sum", "{}", "+"))
    yield tenant
    with tenant.volume(INPUTS) as pod:
        assert listing(pod.run("find", "/volume", "-type", "f", "-exec", "sha256sum", "{}", "+")) == before


def listing(sums: str) -> list[str]:
    return sorted(sums.splitlines())


CASES = {
    "no-model": ({"model": {"source": f"pvc://{INPUTS}/nothing"}}, "ModelUnavailable", "nothing"),
    "pickled": ({"model": {"source": f"pvc://{INPUTS}/pickled"}}, "UnsafeArtifact", "safetensors"),
    "too-large": (
        {"model": {"source": f"pvc://{INPUTS}/big"}, "resources": {"cpu": "500m", "gpuMemory": "24Gi"}},
        "DoesNotFit",
        "24 GiB",
    ),
    "no-data": ({"dataset": {"source": f"pvc://{INPUTS}/nothing.jsonl"}}, "BadDataset", "nothing.jsonl"),
}


@pytest.mark.parametrize(
    ("spec", "reason", "said"),
    [
        pytest.param(*case, id=name, marks=() if name == "too-large" else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_bad_input_fails_before_a_gpu_is_requested(
    bad: Tenant, spec: dict[str, Any], reason: str, said: str, request: pytest.FixtureRequest
) -> None:
    bad.require_rejected(bad.apply(tiny_job(f"bad-{request.node.callspec.id}", **spec)), reason, said)
