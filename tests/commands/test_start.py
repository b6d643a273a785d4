"""Imports of a command before it does anything: a person waits for them each time."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.__main__ import main

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "kopf", "qlora_operator", "matplotlib", "numpy")
ASKS = ("kubernetes", "qlora_client")
MODELS = ("pydantic", "qlora_api.spec.job")


def imported(*arguments: str) -> set[str]:
    """The modules that a run of the command has imported."""
    run = (
        "import sys\n"
        "from qlora_cli.__main__ import main\n"
        "try:\n"
        f"    main({list(arguments)!r}, prog_name='qlora')\n"
        "finally:\n"
        "    print('\\n' + '\\n'.join(sys.modules))\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "KUBECONFIG": "/nowhere", "HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "qlora_cli.__main__" in done.stdout, done.stderr
    return set(done.stdout.splitlines())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_help_imports_no_command(arguments: tuple[str, ...]) -> None:
    assert not imported(*arguments) & {*HEAVY, *ASKS, *MODELS, "rich", "ruamel.yaml"}


@pytest.mark.parametrize("arguments", [("list",), ("suspend", "job"), ("completion", "bash")])
def test_commands_that_read_a_cluster_do_not_import_the_resource_models(arguments: tuple[str, ...]) -> None:
    assert not imported(*arguments) & {*HEAVY, "qlora_api.spec.job", "qlora_trainer", "ruamel.yaml"}


@pytest.mark.parametrize("arguments", [("watch", "job"), ("logs", "job"), ("submit", "--help")])
def test_commands_that_follow_or_create_a_job_do_not_import_the_trainer(arguments: tuple[str, ...]) -> None:
    assert not imported(*arguments) & {*HEAVY, "qlora_trainer"}


def test_commands_without_a_cluster_do_not_import_its_client(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("kind: QLoRAJob")
    for command in ("plan", "data"):
        assert not imported(command, str(tmp_path / "job.yaml")) & {*HEAVY, *ASKS}


def test_the_table_of_commands_has_each_commands_help() -> None:
    import click

    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(limit=500)
    assert main.get_command(context, "nothing") is None
