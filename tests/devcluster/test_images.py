"""Images get the names that the kubelet looks for, and builds see the machine's pip configuration."""

import configparser
from pathlib import Path

import pytest

from devcluster import images, toolchain
from devcluster.errors import ClusterError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("trainer", "docker.io/library/trainer:latest"),
        ("qlora/trainer:dev", "docker.io/qlora/trainer:dev"),
        ("localhost/trainer:dev", "localhost/trainer:dev"),
        ("example.org:5000/qlora/trainer", "example.org:5000/qlora/trainer:latest"),
    ],
)
def test_an_image_is_named_as_the_kubelet_names_it(given: str, expected: str) -> None:
    assert images.qualified(given) == expected


def test_a_digest_is_rejected() -> None:
    with pytest.raises(ClusterError, match="give a tag, not a digest"):
        images.qualified("trainer@sha256:00")


def test_pip_in_a_build_sees_files_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\ntimeout = 5\nextra-index-url =\n  one\n  two\n[install]\nno-compile = true\n")
    parsed = configparser.RawConfigParser()
    parsed.read_string(images.pip_configuration({"PIP_TIMEOUT": "180", "PIP_CERT": "/here", "HOME": "/"}, [file]))
    assert parsed.get("global", "timeout") == "180"
    assert parsed.get("global", "extra-index-url").split() == ["one", "two"]
    assert parsed.get("global", "cert") == "/etc/ssl/certs/ca-certificates.crt"
    assert parsed.get("install", "no-compile") == "true"


@pytest.mark.parametrize("name", [name for name, tool in toolchain.ALL_TOOLS.items() if tool.package != "."])
def test_every_program_has_one_version_and_its_module(name: str) -> None:
    tool = toolchain.ALL_TOOLS[name]
    go_mod = (toolchain.MODULES / tool.module / "go.mod").read_text()
    assert f"tool {tool.package}\n" in go_mod or f"\t{tool.package}\n" in go_mod
    flags = toolchain.linker_flags(tool, go_mod)
    assert all(f"-X {package}." in flags for package in tool.version_variables)
