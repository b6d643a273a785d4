"""A chat template of the job: its text, its limits, and the remarks about it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.processors import TemplateProcessing

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import DatasetSpec
from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import Conversation, Message
from qlora_trainer.data.render import safe_template as render_limits
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.end_of_turn import end_of_turn, marks_in_pieces, template_remarks
from qlora_trainer.data.render.template_source import JobTemplate, job_template
from qlora_trainer.steps.prepare import prepare
from tests.support.models.learned import learned
from tests.support.models.tiny import CHATML, Recorded, chat_row, save_tokenizer, write_rows
from tests.trainer.conftest import MakeContext

ROW = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
    ]
}
# As the families' publishers describe their formats; the mark that begins a text apart.
EXPECTED = {
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\nFirst.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    "<|im_start|>assistant\nSecond.<|im_end|>\n",
    "gemma": "<start_of_turn>user\nBe short.\n\nOne?<end_of_turn>\n<start_of_turn>model\nFirst.<end_of_turn>\n"
    "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\nSecond.<end_of_turn>\n",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nFirst.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSecond.<|eot_id|>",
    "mistral": "[INST] Be short.\n\nOne? [/INST] First.<|endoftext|>[INST] Two? [/INST] Second.<|endoftext|>",
    "zephyr": "<|system|>\nBe short.<|endoftext|>\n<|user|>\nOne?<|endoftext|>\n<|assistant|>\nFirst.<|endoftext|>\n"
    "<|user|>\nTwo?<|endoftext|>\n<|assistant|>\nSecond.<|endoftext|>\n",
}
ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama-3": "<|eot_id|>",
    "mistral": "<|endoftext|>",
    "zephyr": "<|endoftext|>",
}


def named(name: str) -> JobTemplate:
    """One of the trainer's own templates."""
    spec = DatasetSpec.model_validate({"source": "pvc://data/rows.jsonl", "chatTemplate": name})
    template = job_template(spec, Mounts())
    assert template is not None
    return template


def of_config_map(folder: Path, content: bytes) -> JobTemplate | None:
    """The template of a ConfigMap's key."""
    (folder / "formats").mkdir(parents=True)
    (folder / "formats" / "ours.jinja").write_bytes(content)
    spec = DatasetSpec.model_validate(
        {"source": "pvc://data/a.jsonl", "chatTemplate": "configMap://formats/ours.jinja"}
    )
    return job_template(spec, Mounts(config_maps=folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tokenizer with ChatML's tokens, no template, and the end <|endoftext|>."""
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def beginning(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with <|endoftext|> before each text, as Llama's and Gemma's marks."""
    folder = tmp_path_factory.mktemp("beginning") / "model"
    shutil.copytree(base, folder)
    tokenizer = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_by_name_writes_the_familys_format_and_trains_each_end(base: Path, name: str) -> None:
    [(text, targets)] = learned(base, [ROW], template=named(name))
    assert text == EXPECTED[name]
    assert [target.strip() for target in targets] == [f"First.{ENDS[name]}", f"Second.{ENDS[name]}"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_tokenizers_start_mark_begins_a_conversation_once(beginning: Path, name: str) -> None:
    [(text, _)] = learned(beginning, [ROW], template=named(name))
    assert text == "<|endoftext|>" + EXPECTED[name]


def test_the_jobs_template_takes_precedence_over_the_models(tiny_llama: Path) -> None:
    [(text, _)] = learned(tiny_llama, [ROW], template=JobTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert text == "Be short.One?First.Two?Second."


def answered(tokenizer: Tokenizer) -> str:
    """The text of a question and its answer."""
    return tokenizer.render(Conversation((Message("user", "q"), Message("assistant", "a"))), "line 1").text


def test_a_template_that_computes_for_hours_is_stopped(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_limits, "SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(
        StepFailure, match=r"chatTemplate takes more than 0\.2 seconds for this conversation"
    ) as failure:
        answered(Tokenizer(tiny_llama, JobTemplate(loop)))
    assert failure.value.exit_code is ExitCode.BAD_DATASET


def test_a_template_that_writes_too_much_is_rejected(tiny_llama: Path) -> None:
    with pytest.raises(StepFailure, match=r"chatTemplate writes 70000000 characters, at most 67108864 are allowed"):
        answered(Tokenizer(tiny_llama, JobTemplate("{{ 'a' * 70000000 }}")))


def test_a_template_runs_in_a_sandbox(tiny_llama: Path) -> None:
    with pytest.raises(StepFailure, match="is unsafe"):
        answered(Tokenizer(tiny_llama, JobTemplate("{{ ''.__class__.__mro__ }}")))


def test_half_a_character_in_a_templates_output_is_rejected(tiny_llama: Path) -> None:
    with pytest.raises(
        StepFailure,
        match=r"line 1: the chat template of spec\.dataset\.chatTemplate writes an unpaired surrogate \(U\+D800\) at "
        "character 3: not valid Unicode, correct the template",
    ) as failure:
        answered(Tokenizer(tiny_llama, JobTemplate("{{ 'abc\\ud800' }}" + CHATML)))
    assert failure.value.exit_code is ExitCode.BAD_DATASET


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("messages[0].content.upper", "<built-in method upper of str object at 0x…>"),
        ("'- ' ~ messages[0].content.strip", "<built-in method strip of str object at 0x…>"),
        ("messages[0].content.strip | upper", "<BUILT-IN METHOD STRIP OF STR OBJECT AT 0x…>"),
        ("[messages[0].items]", "<built-in method items of dict object at 0x…>"),
        ("messages | map(attribute='content')", "<generator object sync_do_map at 0x…>"),
        ("cycler('a', 'b')", "<jinja2.utils.Cycler object at 0x…>"),
    ],
)
def test_a_template_that_writes_a_function_or_a_generator_is_rejected(
    tiny_llama: Path, expression: str, found: str
) -> None:
    """Their text has an address in memory: tokens would change under one fingerprint."""
    with pytest.raises(StepFailure) as failure:
        answered(Tokenizer(tiny_llama, JobTemplate("{{ " + expression + " }}" + CHATML)))
    assert failure.value.exit_code is ExitCode.BAD_DATASET
    assert failure.value.message.startswith(
        f"line 1: the chat template of spec.dataset.chatTemplate writes '{found}' in place of a text"
    )
    assert "call a function with (), as in content.strip()" in failure.value.message


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((Message("user", "q"), Message("assistant", "a", reasoning="hm"))),
        Conversation(
            (Message("user", "q"), Message("assistant", "a")), ({"type": "function", "function": {"name": "f"}},)
        ),
    ],
    ids=["reasoning", "tools"],
)
def test_a_templates_errors_are_reported_for_rows_with_reasoning_and_tools_too(
    tiny_llama: Path, conversation: Conversation
) -> None:
    tokenizer = Tokenizer(tiny_llama, JobTemplate("{{ messages[0].content.upper }}" + CHATML))
    tokenizer.require_system_message()
    with pytest.raises(StepFailure, match="writes '<built-in method upper of str object at 0x…>'"):
        tokenizer.render(conversation, "line 1")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ ['a', 'b'] | random }}", "filter random"),
        ("{{ ['ab', 'cd'] | map('random') | join }}", "filter random"),
        ("{{ lipsum(n=1) }}", "function lipsum"),
    ],
)
def test_a_template_that_draws_at_random_is_rejected(tiny_llama: Path, template: str, name: str) -> None:
    with pytest.raises(
        StepFailure,
        match=rf"line 1: the chat template of spec\.dataset\.chatTemplate uses the {name}, .*: write the text",
    ) as failure:
        answered(Tokenizer(tiny_llama, JobTemplate(template + CHATML)))
    assert failure.value.exit_code is ExitCode.BAD_DATASET


def test_an_address_that_a_row_or_the_template_has_is_text_like_any_other(tiny_llama: Path) -> None:
    """Also where the template writes more digits after it, or has cut some off."""
    fault = "Segmentation fault at 0x7FFDeadBEEF, <object object at 0x7f12345678"
    written = "{{ 'mapped at 0x55aa55aa55aa ' + messages[0].content[:-4] }}" + CHATML.replace(
        "<|im_end|>", "dead<|im_end|>"
    )
    tokenizer = Tokenizer(tiny_llama, JobTemplate(written))
    text = tokenizer.render(Conversation((Message("user", fault), Message("assistant", "a"))), "line 1").text
    assert text.startswith(f"mapped at 0x55aa55aa55aa {fault[:-4]}<|im_start|>")
    assert fault + "dead" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" \n", "is empty: it must hold a chat template in Jinja"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a" * (2**20 + 1), "has more than 1048576 bytes"),
    ],
)
def test_a_config_map_that_holds_no_template_is_a_bad_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(StepFailure, match=says) as failure:
        of_config_map(tmp_path, content)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_template_that_does_not_compile_is_a_bad_configuration(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(StepFailure, match=r"the chat template of spec\.dataset\.chatTemplate cannot be used"):
        Tokenizer(tiny_llama, of_config_map(tmp_path, b"{% for %}"))


def test_an_answer_that_ends_with_the_end_of_text_has_no_remark(base: Path) -> None:
    for name in ("mistral", "zephyr"):
        assert end_of_turn(Tokenizer(base, named(name)), base) is None


def test_an_end_of_answers_that_is_another_token_is_named_with_its_id(base: Path) -> None:
    end = end_of_turn(Tokenizer(base, named("chatml")), base)
    assert end == EndOfTurn(text="<|im_end|>", token=2, known=(0,))
    [remark] = template_remarks(end, ())
    assert """answers end with '<|im_end|>', servers do not stop at this text by default""" in remark
    assert 'send "stop_token_ids": [2] with each request' in remark


@pytest.mark.parametrize("ids", [2, [0, 2]])
def test_an_end_in_the_generation_settings_needs_no_remark(base: Path, tmp_path: Path, ids: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert end_of_turn(Tokenizer(base, named("chatml")), tmp_path) is None


def test_an_end_of_several_tokens_is_named_as_a_text(base: Path) -> None:
    end = end_of_turn(Tokenizer(base, named("llama-3")), base)
    assert end == EndOfTurn(text="<|eot_id|>", known=(0,))
    assert 'send "stop": ["<|eot_id|>"] with each request' in template_remarks(end, ())[0]


def test_a_template_without_an_end_of_answers_is_reported(base: Path) -> None:
    template = JobTemplate("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    end = end_of_turn(Tokenizer(base, template), base)
    # A line break is one token here, and answers have some inside them: a server must not stop at the first.
    assert end == EndOfTurn(text="", known=(0,))
    [remark] = template_remarks(end, ())
    assert remark == "the chat template writes nothing after an answer, so the model does not learn where to stop"


def test_marks_that_are_no_tokens_are_named(base: Path) -> None:
    assert marks_in_pieces(Tokenizer(base, named("chatml"))) == ()
    pieces = marks_in_pieces(Tokenizer(base, named("llama-3")))
    assert pieces == ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert "no token for <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in template_remarks(None, pieces)[0]


def test_another_template_prepares_the_data_again(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("One?", "First.")] * 3)
    path = tmp_path / "config-maps" / "formats" / "ours.jinja"
    path.parent.mkdir(parents=True)
    context = make_context({"dataset": {"chatTemplate": "configMap://formats/ours.jinja"}})
    fingerprints = []
    for role in ("assistant", "assistant", "model"):
        path.write_text(f"{{% for m in messages %}}{{{{ m.content + '<|im_end|>' }}}}{{% endfor %}}{{# {role} #}}")
        record = prepare(context, records)
        fingerprints.append(record.fingerprint)
        written = context.workspace.root / record.data_path / "chat_template.jinja"
        assert written.read_bytes() == path.read_bytes()
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    path.unlink()
    assert prepare(context, records) == record


def test_text_format_rejects_chat_template(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "kubectl get pods"}])
    for field, value in {"chatTemplate": "chatml", "systemPrompt": {"text": "Be short."}}.items():
        with pytest.raises(StepFailure, match=f"spec.dataset.{field} is set, but the rows .* are of format text") as e:
            prepare(make_context({"dataset": {field: value}}), records)
        assert e.value.exit_code is ExitCode.BAD_CONFIGURATION
