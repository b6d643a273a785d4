"""Writes the settings of Argo CD from the Lua files in the same folder; run by `make generate`."""

from pathlib import Path

import yaml

ARGO_CD = Path(__file__).parent / "argocd"
VALUES = ARGO_CD / "values.yaml"
_KIND = "qlora.dev_QLoRAJob"
# Its conditions are those of a job.
_SWEEP = "qlora.dev_QLoRASweep"
_HEADER = """\
# Values of the chart argo-cd: the health of QLoRAJobs and QLoRASweeps, and the actions of jobs: suspend, resume, retry.
# Without the chart: the keys below `cm` belong to `data` of the ConfigMap argocd-cm.
# Generated from the Lua files in this folder by `make generate`; do not edit.
"""


class _Block(str):
    """A text of several lines, written as it is."""


class _Dumper(yaml.SafeDumper):
    pass


def _represent_block(dumper: yaml.SafeDumper, text: _Block) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")


_Dumper.add_representer(_Block, _represent_block)


def settings() -> dict[str, str]:
    """The entries of the ConfigMap argocd-cm."""
    actions = ARGO_CD / "actions"
    definitions = [
        {"name": file.stem, "action.lua": _Block(file.read_text())}
        for file in sorted(actions.glob("*.lua"))
        if file.stem != "discovery"
    ]
    offered = {"discovery.lua": _Block((actions / "discovery.lua").read_text()), "definitions": definitions}
    health = (ARGO_CD / "health.lua").read_text()
    return {
        f"resource.customizations.health.{_KIND}": health,
        f"resource.customizations.health.{_SWEEP}": health,
        f"resource.customizations.actions.{_KIND}": _dump(offered),
    }


def render() -> str:
    """The file of values."""
    return _HEADER + _dump({"configs": {"cm": {key: _Block(value) for key, value in settings().items()}}})


def _dump(content: object) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    VALUES.write_text(render())
