"""Golden files: one full file, and the others hold only what differs from another one (`base`).

A file is a flat mapping of dotted keys. RUNNER_UPDATE_GOLDEN=1 pytest -k golden writes them anew (without -n: a base goes first).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ABSENT = "(absent)"  # the base has this key, and this one has not


def check(file: Path, found: dict[str, Any], base: str | None = None) -> None:
    """Raises AssertionError with every key in which `found` differs from the file; `base`: the stem of a file beside it."""
    base = None if base == file.stem else base
    flat = dict(_flat(found))
    if os.environ.get("RUNNER_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        below = read(file.with_stem(base)) if base else {}
        values = {"base": base} if base else {}
        values |= {key: flat.get(key, ABSENT) for key in sorted(differing(flat, below))}
        file.write_text("".join(map(_line, values.items())))
    golden = read(file)
    told = [f"{key}: {flat.get(key, ABSENT)!r}, golden {golden.get(key, ABSENT)!r}" for key in differing(flat, golden)]
    assert not told, f"{file.name} says otherwise:\n" + "\n".join(told)


def read(file: Path) -> dict[str, Any]:
    """The whole mapping of dotted keys, bases applied."""
    values = yaml.safe_load(file.read_text())
    base = values.pop("base", None)
    whole = (read(file.with_stem(base)) if base else {}) | values
    return {key: value for key, value in whole.items() if value != ABSENT}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys, sorted, whose values or types differ."""
    missing = object()
    keys = sorted(one.keys() | other.keys())
    return [key for key in keys if repr(one.get(key, missing)) != repr(other.get(key, missing))]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _line(item: tuple[str, Any]) -> str:
    text = yaml.safe_dump({item[0]: item[1]}, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip()[1:-1] + "\n"
