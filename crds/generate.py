"""Writes the CustomResourceDefinitions into crds/ and into the chart; run by `make generate`."""

from pathlib import Path

import yaml

from qlora_api.crd import definitions

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT / "crds", ROOT / "helm" / "qlora-operator" / "files")
HEADER = "# Generated from crds/qlora_api by `make generate`; do not edit.\n"


def render() -> dict[Path, str]:
    """Every copy: its file, and the definition as YAML."""
    texts = {
        f"{definition['metadata']['name']}.yaml": HEADER
        + yaml.safe_dump(definition, sort_keys=False, width=120, allow_unicode=True)
        for definition in definitions().values()
    }
    return {folder / name: text for folder in FOLDERS for name, text in texts.items()}


def main() -> None:
    """Write every copy."""
    for target, text in render().items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
