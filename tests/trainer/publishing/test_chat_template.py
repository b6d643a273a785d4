"""Published files of a job with a chat template and a system prompt: servers must be given both."""

import json
import shlex
import shutil
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.end_of_turn import end_of_turn
from qlora_trainer.data.render.template_source import JobTemplate
from qlora_trainer.publishing.merged_model import give_template
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.models.tiny import POD_UID, Recorded, chat_row, write_rows
from tests.support.runs.report_page import Page
from tests.support.training import job, run

ROWS = [chat_row(f"List the pods of n{i}.", f"kubectl get pods --namespace n{i}") for i in range(8)]
SYSTEM = "Answer with one command.\nIt's all."
SPEC: dict[str, Any] = {
    "model": {"source": "pvc://models/base"},
    "dataset": {
        "chatTemplate": "chatml",
        "source": "pvc://data/train.jsonl",
        "systemPrompt": {"text": SYSTEM},
        "eval": {"fraction": 0.25},
    },
    "output": {"merged": {}},
    "training": {"packing": False, "samples": 1, "maxSequenceLength": 128},
}


def base_without_template(tiny_llama: Path, folder: Path) -> Path:
    """Copy a base without chat training: no template, texts end with <|endoftext|>."""
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink()
    for name, change in {
        "tokenizer_config": {"eos_token": "<|endoftext|>"},
        "generation_config": {"eos_token_id": 0},
    }.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> StepContext:
    """Prepare, train and publish a job. A test that changes it must restore it."""
    root = tmp_path_factory.mktemp("template")
    write_rows(root / "data" / "train.jsonl", ROWS)
    base_without_template(tiny_llama, root / "models" / "base")
    context = StepContext(
        document=job(SPEC),
        workspace=WorkspaceLayout(root / "workspace"),
        mounts=Mounts(claims={name: root / name for name in ("data", "models")}),
        device="cpu",
        pod_uid=POD_UID,
        attempt=1,
        workspace_uri=str(root / "workspace"),
    )
    prepare(context, Recorded())
    run(context)
    publish_again(context)
    return context


def publish_again(context: StepContext) -> None:
    """Run publish, as if it had never been run."""
    context.workspace.completion("publish").unlink(missing_ok=True)
    publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def request_of(text: str) -> Any:
    """The payload of the request in a report or a model card."""
    command = "\n".join(text[text.index("curl ") :].splitlines()[:2])
    return json.loads(shlex.split(command)[-1])


def test_template_system_prompt_and_end_of_answers_are_published_with_the_adapter(trained: StepContext) -> None:
    folder = trained.workspace.adapter
    template = (folder / "chat_template.jinja").read_bytes()
    digest = sha256(template).hexdigest()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["chat_template.jinja"]["sha256"] == digest

    page = Page((trained.workspace.report / "report.html").read_text())
    for text in ((folder / "README.md").read_text(), "".join(page.text)):
        assert digest in text
        assert "--chat-template PATH/OF/TH" in text
        assert "model.generation_config.eos_token_id = [0, 2]" in text
    for shown in (
        "System message Answer with one command. It's all. (for rows without one)",
        "End of an answer <|im_end|>",
        "Trained on completions only",
    ):
        assert shown in page.words, shown
    for text in ((folder / "README.md").read_text(), "".join(page.text)):
        request = request_of(text)
        assert request["messages"][0] == {"role": "system", "content": SYSTEM}
        assert request["stop_token_ids"] == [2]


def test_a_servers_prompt_from_template_and_system_prompt_was_trained_on(trained: StepContext) -> None:
    prepared = json.loads(trained.workspace.completion("prepare").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(trained.workspace.adapter)
    conversation = [{"role": "system", "content": SYSTEM}, *ROWS[0]["messages"]]
    asked = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)
    splits = [PreparedDataset.open(trained.workspace.root / prepared["dataPath"], name) for name in ("train", "eval")]
    assert asked["input_ids"] in [split[index].input_ids.tolist() for split in splits for index in range(len(split))]


def test_a_merged_model_has_the_template_and_stops_at_its_end(trained: StepContext) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(trained.workspace.merged)
    assert tokenizer.chat_template == (trained.workspace.adapter / "chat_template.jinja").read_text()
    assert GenerationConfig.from_pretrained(trained.workspace.merged).eos_token_id == [0, 2]


def test_a_line_break_after_answers_does_not_change_the_merged_models_end(trained: StepContext, tmp_path: Path) -> None:
    model = trained.workspace.root.parent / "models" / "base"
    merged, template = tmp_path / "merged", tmp_path / "template.jinja"
    shutil.copytree(model, merged)
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    give_template(merged, template, end_of_turn(Tokenizer(model, JobTemplate(template.read_text())), model))
    assert GenerationConfig.from_pretrained(merged).eos_token_id == 0


@pytest.mark.parametrize("change", ["text", "removed", "link"])
def test_nothing_is_published_with_a_template_that_was_changed_after_prepare(
    trained: StepContext, tmp_path: Path, change: str
) -> None:
    prepared = json.loads(trained.workspace.completion("prepare").read_text())
    path = trained.workspace.root / prepared["dataPath"] / "chat_template.jinja"
    kept = shutil.move(path, tmp_path / "kept")
    if change == "text":
        path.write_text("{{ 1 }}")
    elif change == "link":
        path.symlink_to(kept)
    with pytest.raises(StepFailure, match="is not the chat template that the rows were prepared with") as failure:
        publish_again(trained)
    path.unlink(missing_ok=True)
    shutil.move(kept, path)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT


def test_nothing_is_published_with_a_tokenizer_that_was_changed_after_prepare(trained: StepContext) -> None:
    prepared = json.loads(trained.workspace.completion("prepare").read_text())
    path = trained.workspace.root / prepared["modelPath"] / "tokenizer_config.json"
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    with pytest.raises(StepFailure, match="has another tokenizer than the rows were") as failure:
        publish_again(trained)
    path.write_bytes(before)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT
