"""Jobs over the fake hub and how they are rejected."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.fake_hub import FakeHub, serve
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.trainer.conftest import MakeContext

MODEL: dict[str, Any] = {"model": {"source": "hf://acme/tiny"}}


def rejection(make_context: MakeContext, records: Recorded, code: ExitCode, spec: dict[str, Any] | None = None) -> str:
    """The message of prepare when it ends with `code`; checks for leftover files."""
    context = make_context({**MODEL, **(spec or {})})
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is code, failure.value.message
    if code.permanent:
        assert not [*context.workspace.root.rglob("*")]
    return failure.value.message


@contextmanager
def tiny_hub(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve acme/tiny from a hub without a login, with one row of data on the volume."""
    repository = folder / "hub" / "tiny"
    shutil.copytree(model, repository)
    write_rows(folder / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
    with serve(FakeHub({"models/acme/tiny": repository})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served
