"""Images get the names that the kubelet pulls, and builds see the machine's pip configuration."""

import configparser
from pathlib import Path

from devcluster import images


def test_pip_in_a_build_sees_files_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\ntimeout = 5\nextra-index-url =\n  one\n  two\n[install]\nno-compile = true\n")
    parsed = configparser.RawConfigParser()
    parsed.read_string(images.pip_configuration({"PIP_TIMEOUT": "180", "PIP_CERT": "/here", "HOME": "/"}, [file]))
    assert parsed.get("global", "timeout") == "180"
    assert parsed.get("global", "extra-index-url").split() == ["one", "two"]
    assert parsed.get("global", "cert") == "/etc/ssl/certs/ca-certificates.crt"
    assert parsed.get("install", "no-compile") == "true"
