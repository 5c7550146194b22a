"""The options of SGLang's servers: name -> kinds of value, so that a config is checked where SGLang is not installed.

options.json was written from SGLang 0.5.23 by `installed`; a test compares the two.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Table = dict[str, list[Any]]
KINDS = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict", NoneType: "null"}


@functools.cache
def options() -> Table:
    """Name -> kinds: "bool", "int", ..., "null", "any", or {"one of": [values]}."""
    table: Table = json.loads(Path(__file__).with_name("options.json").read_text())
    return table


def problem_of(name: str, value: Any) -> str | None:
    """Why this value cannot be given to this option; None when it can."""
    kinds = options()[name]
    choices = [choice for kind in kinds if isinstance(kind, dict) for choice in kind["one of"]]
    if "any" in kinds or value in choices or KINDS.get(type(value)) in kinds or (type(value) is int and "float" in kinds):
        return None
    expected = [repr(choice) for choice in choices] + [kind for kind in kinds if isinstance(kind, str)]
    return f"{value!r} is not one of: {', '.join(expected)}"


def installed() -> Table:
    """The table of the SGLang that is installed here; needs SGLang."""
    from sglang.srt.server_args import ServerArgs

    hints = get_type_hints(ServerArgs)
    return {name: _kinds(hints[name]) for name in ServerArgs.__struct_fields__ if not name.startswith("_")}


def _kinds(hint: Any) -> list[Any]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        found: list[Any] = []
        for piece in get_args(hint):
            found += [kind for kind in _kinds(piece) if kind not in found]
        return found
    if origin is Literal:
        return [{"one of": list(get_args(hint))}]
    return [KINDS.get(origin or hint, "any")]
