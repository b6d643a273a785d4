"""A plugin of mypy that checks `replace` and `replace_known`: a wrong name or type of a field is an error."""

from collections.abc import Callable
from functools import partial

from mypy.expandtype import expand_type_by_instance
from mypy.maptype import map_instance_to_supertype
from mypy.nodes import ARG_NAMED_OPT, ARG_POS, Var
from mypy.plugin import FunctionSigContext, Plugin
from mypy.types import (
    AnyType,
    CallableType,
    FunctionLike,
    Instance,
    NoneType,
    Type,
    TypeVarType,
    UnionType,
    get_proper_type,
)
from pydantic.mypy import METADATA_KEY

_REPLACE = "qlora_api.schema.replace"
_REPLACE_KNOWN = "qlora_api.schema.replace_known"


def plugin(version: str) -> type[Plugin]:
    """Return the plugin's class to mypy."""
    return _ReplacePlugin


class _ReplacePlugin(Plugin):
    def get_function_signature_hook(self, fullname: str) -> Callable[[FunctionSigContext], FunctionLike] | None:
        if fullname == _REPLACE:
            return _signature
        return partial(_signature, or_none=True) if fullname == _REPLACE_KNOWN else None


def _signature(context: FunctionSigContext, *, or_none: bool = False) -> CallableType:
    """Return the signature with one optional keyword parameter for each field, as mypy's own of dataclasses.

    `or_none`: whether None is a value of each.
    """
    default = context.default_signature
    if len(context.args[0]) != 1:
        return default  # mypy reports the missing model
    given = get_proper_type(context.api.get_expression_type(context.args[0][0]))
    model = get_proper_type(given.upper_bound) if isinstance(given, TypeVarType) else given
    if isinstance(model, AnyType):
        return default
    if not isinstance(model, Instance) or METADATA_KEY not in model.type.metadata:
        context.api.fail(f"{default.name}() cannot check {given}: pass one model of pydantic", context.context)
        return default
    fields = {
        name: UnionType.make_union([kind, NoneType()]) if or_none else kind for name, kind in _fields(model).items()
    }
    return default.copy_modified(
        arg_names=[None, *fields],
        arg_kinds=[ARG_POS, *[ARG_NAMED_OPT] * len(fields)],
        arg_types=[given, *fields.values()],
        ret_type=given,
        variables=[],
        name=f"{default.name} of {model.type.name}",
    )


def _fields(model: Instance) -> dict[str, Type]:
    """Types of the model's fields by name, with the arguments of a generic model."""
    fields = {}
    for name in model.type.metadata[METADATA_KEY]["fields"]:
        symbol = model.type.get(name)
        if symbol is not None and isinstance(symbol.node, Var) and symbol.node.type is not None:
            owner = map_instance_to_supertype(model, symbol.node.info)
            fields[name] = expand_type_by_instance(symbol.node.type, owner)
    return fields
