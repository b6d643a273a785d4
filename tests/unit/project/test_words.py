"""The rules of docs/styles find the words that the project does not use, in the files that `make words` reads."""

from pathlib import Path

import pytest

from devcluster import toolchain
from devcluster.layout import from_environment
from docs import words

CASES = {
    "Actors": ("The claim is gone if somebody has deleted it.", "The claim is gone if a user has deleted it."),
    "Which": ("The folder in\nwhich the run is.", "It depends on which rows are used."),
    "Personified": ("The condition says why.", "Users say why, and rows look like these."),
    "NounClauses": ("The loss. What is trained is a list.", "Is it trained? What is it?"),
    "Words": ("The run goes on at its checkpoint.", "The run resumes at its checkpoint, besides."),
    "Own": ("A job has a folder of its own.", "A job has a folder."),
}
CODE = '''"""Returns nothing."""
# noqa: somebody
class Part:
    """Has a field."""
    said = Field("somebody", description="The rows "
        "of a job.")  # in bytes
'''


@pytest.fixture(scope="module")
def vale() -> Path:
    return toolchain.built(from_environment(), ["vale"])["vale"]


def test_each_rule_finds_a_bad_sentence_and_passes_a_good_one(vale: Path) -> None:
    texts = {
        f"{rule}/{kind}": text for rule, pair in CASES.items() for kind, text in zip(("bad", "good"), pair, strict=True)
    }
    found = {(name, rule) for name, _, rule, _ in words.hits(vale, texts)}
    assert found == {(f"{rule}/bad", rule) for rule in CASES}
    assert set(CASES) == set(words.RULES)


def test_code_blocks_and_names_in_backquotes_are_not_read(vale: Path) -> None:
    assert words.hits(vale, {"page": "```\nsomebody\n```\n\nThe option `somebody`.\n"}) == []


def test_a_hit_has_the_line_of_its_file(vale: Path, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""One.\n\nTwo, and somebody.\n"""\n')
    (hit,) = words.hits(vale, {"operator/module.py": words.prose(file)})
    assert hit[:3] == ("operator/module.py", 3, "Actors")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", CODE, ["Returns nothing.", "", "", "Has a field.", "The rows of a job.", "in bytes", ""]),
        ("a.py", r'''"""One.\n\nTwo."""''', ["One."]),
        ("a.yaml", "# Top.\na: b # c\n  # -- Field\n", ["Top.", "", "Field"]),
        ("a.md", "One.\n```yaml\na: b\n```\nTwo.", ["One.", "", "", "", "Two."]),
    ],
)
def test_only_prose_is_read_on_its_own_lines(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert words.prose(tmp_path / name).split("\n") == expected


def test_rates_are_per_folder_and_rounded_up() -> None:
    texts = {"docs/a.md": "word " * 2990, "README.md": "word " * 10, "gitops/a.md": "word " * 1000}
    hit = ("README.md", 1, "Which", "")
    assert words.rates(texts, [hit]) == {"docs": (0, 0.4, 0, 0, 0, 0), "other": (0,) * len(words.RULES)}
