"""The commit-msg hook passes the subjects that CONTRIBUTING.md asks for."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
HOOK = next(hook for hook in HOOKS if hook["id"] == "commit-subject")
LONGEST = f"Add {'x' * 68}"


def passes(message: str) -> bool:
    """As pre-commit searches a file with these arguments."""
    assert HOOK["args"] == ["--multiline", "--negate"]
    return re.search(HOOK["entry"].encode(), message.encode(), re.MULTILINE | re.DOTALL) is not None


@pytest.mark.parametrize(
    "message",
    [
        "Fix the retry of uploads\n",
        "Speed up prepare\n\nTokenizing took most of its time.\n",
        f"{LONGEST}\n",
        f"Merge branch '{'x' * 80}'\n",
        f'Revert "{LONGEST}"\n',
    ],
)
def test_it_passes(message: str) -> None:
    assert passes(message)


@pytest.mark.parametrize(
    "message",
    [
        "Say what is missing\n",
        "add a field\n",
        "Add\n",
        "Add a field.\n",
        "Adds a field\n",
        f"{LONGEST}x\n",
        "Improve prepare\n\nFix the retry of uploads\n",
        "\nAdd a field\n",
        "",
    ],
)
def test_it_rejects(message: str) -> None:
    assert not passes(message)
