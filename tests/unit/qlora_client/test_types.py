"""A user's type checker, which has no plugin of pydantic: it sees types, and optional arguments."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import qlora_api
import qlora_client
from qlora_api.spec.job import QLoRAJobSpec


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(kind):
        yield from models(part)


@pytest.mark.parametrize("package", [qlora_api, qlora_client])
def test_installed_packages_have_types(package: Any) -> None:
    assert Path(package.__file__).with_name("py.typed").is_file()


def test_a_type_checker_accepts_a_spec_without_its_optional_fields() -> None:
    # By PEP 681 it takes a field for required unless its default is named.
    unnamed = [
        f"{model.__name__}.{ast.unparse(field.target)}"
        for model in set(models(QLoRAJobSpec))
        for field in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(model))))
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call) and field.value.args
    ]
    assert unnamed == []
