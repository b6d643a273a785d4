"""Writes the CustomResourceDefinition into crds/ and into the chart; run by `make generate`."""

from pathlib import Path

import yaml

from qlora_api.crd import custom_resource_definition

ROOT = Path(__file__).parent.parent
NAME = "qlorajobs.qlora.dev.yaml"
TARGETS = (ROOT / "crds" / NAME, ROOT / "helm" / "qlora-operator" / "files" / NAME)
HEADER = "# Generated from crds/qlora_api by `make generate`; do not edit.\n"


def render() -> str:
    """The definition as YAML."""
    return HEADER + yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120, allow_unicode=True)


def main() -> None:
    """Write every copy."""
    text = render()
    for target in TARGETS:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
