"""The embedded cluster with the operator installed by Helm, a tiny model and small data."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from devcluster import cleanup, cluster, layout, product, toolchain
from tests.cluster.environment import INPUTS, Cluster, Tenant, new_namespace
from tests.support.models.tiny import SHAPE, save_model


@pytest.fixture(scope="session")
def installed() -> Iterator[Cluster]:
    """The tests' cluster; started and stopped here unless it runs already. Stopping must leave nothing behind.

    A cluster that the tests have not started is rejected: it may hold a contributor's work. Programs and images have
    been built before (`make test-tools`), for a test builds nothing.
    """
    where = layout.from_environment()
    toolchain.built(where)
    images = product.built_images()
    ran_before = where.ready.exists() and not cluster.trouble(where)
    with cluster.locked(where):
        cluster.up(where, cluster.DEFAULT_GPUS, for_tests=True)
    with cluster.used_by_tests(where):
        product.load_images(where, images)
        product.install(where, where.kubeconfig, images)
        yield Cluster(cluster.kubectl_of(where), images, where.audit_log)
        if not ran_before:
            with cluster.locked(where):
                cleanup.down(where)
            assert cleanup.leftovers(where) == []


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with tokenizer and chat template."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model", LlamaConfig(**SHAPE))


@pytest.fixture(scope="module")
def tenant(installed: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """Create a namespace with inputs on a claim.

    The claim `inputs` holds `model/`, `train.jsonl` and `held-out.jsonl`.
    """
    tenant = Tenant(installed, new_namespace(installed))
    give_inputs(tenant, tiny_model, tmp_path_factory.mktemp("inputs"))
    yield tenant
    tenant.kubectl("delete", "qlorasweeps,qlorajobs", "--all")
    installed.kubectl("delete", "namespace", tenant.namespace, "--wait=false")


def give_inputs(tenant: Tenant, model: Path, folder: Path) -> None:
    """The claim `inputs` with its files, which are written to `folder` first."""
    tenant.claim(INPUTS)
    with tenant.volume(INPUTS) as pod:
        pod.put(model, "model")
        for name, first, count in (("train.jsonl", 0, 64), ("held-out.jsonl", 64, 8)):
            (folder / name).write_text(
                "".join(f"{json.dumps(row(number))}\n" for number in range(first, first + count))
            )
            pod.put(folder / name, name)


def row(number: int, padding: str = "") -> dict[str, object]:
    """One conversation of a task that a tiny model can learn: repeat the word."""
    word = ("alpha", "beta", "gamma", "delta")[number % 4]
    return {
        "messages": [
            {"role": "user", "content": f"{padding}say {word} number {number}"},
            {"role": "assistant", "content": f"{word} {word}"},
        ]
    }
