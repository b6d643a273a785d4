"""Records and the workspace keep their formats: jobs outlive the release that began them.

After an intended change: `python -m tests.unit.qlora_trainer.test_formats > tests/support/formats.txt`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_api.contract import ExitCode, ProgressRecord, ResultRecord, WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord

FORMATS = Path(__file__).parents[2] / "support" / "formats.txt"
RECORDS = (ProgressRecord, ResultRecord, PrepareRecord, TrainRecord, PublishRecord)


def formats() -> list[str]:
    """List all fields of records, folders of the workspace and exit codes."""
    root = Path("/workspace")
    folders = [name for name, kind in vars(WorkspaceLayout).items() if isinstance(kind, property)]
    lines = [f"{name} {getattr(WorkspaceLayout(root), name)}" for name in folders]
    lines += [f"exit {code.value} {code.name} {code.reason} permanent={code.permanent}" for code in ExitCode]
    for record in RECORDS:
        lines += fields(record)
    return sorted(set(lines))


def fields(record: type[BaseModel]) -> Iterator[str]:
    """List the fields of a record and of its parts, by their keys in JSON."""
    schema = record.model_json_schema(by_alias=True)
    parts = schema.get("$defs", {})

    def walk(part: dict[str, Any], path: str) -> Iterator[str]:
        found = parts[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        nested = [*found.get("anyOf", ()), *found.get("prefixItems", ())]
        for each in (*nested, *([found["items"]] if isinstance(found.get("items"), dict) else ())):
            yield from walk(each, path)
        for name, field in found.get("properties", {}).items():
            yield f"{path}.{name}"
            yield from walk(field, f"{path}.{name}")

    yield from walk(schema, record.__name__)


def test_records_and_the_workspace_keep_their_formats() -> None:
    assert formats() == FORMATS.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(formats()))  # noqa: T201
