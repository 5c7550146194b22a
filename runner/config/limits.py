"""What a field of the schema allows besides its type; rules/numbers.py checks it. Torch-free.

    steps: int = number(ge=1, le=10**9)
    weight_transport: str = one_of(among=transports)
    outputs_dir: str = path()

Every number has a lower and an upper limit, so neither inf nor nan nor a slip of the finger gets through. An upper limit lies far
above what is useful; what does not fit the machine at hand is a matter of preflight.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

LONGEST_SECONDS = 10**7  # 115 days; waiting for much longer overflows in the operating system
RANGE, CHOICES, PATH, LINES = "range", "choices", "path", "lines"


@dataclass(frozen=True)
class Range:
    """From `ge` (at least) or `gt` (above) up to `le` (at most)."""

    le: float
    ge: float | None = None
    gt: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with a number, in words; None for one that is allowed."""
        if not math.isfinite(value):
            return f"must be a finite number, {self}"
        if value > self.le:
            return f"must be {self.upper}"
        below = value < self.ge if self.ge is not None else value <= (self.gt or 0)
        return f"must be {self.lower}" if below else None

    @property
    def lower(self) -> str:
        return f"at least {self.ge:,}" if self.ge is not None else f"above {self.gt:,}"

    @property
    def upper(self) -> str:
        return f"at most {self.le:,}"

    def __str__(self) -> str:
        return f"{self.lower} and {self.upper}"

    def nearest(self, value: float) -> float | None:
        """The limit that a number has passed; None where the limit itself is not allowed, and for nan."""
        if math.isnan(value):
            return None
        return self.le if value > self.le else self.ge

    def inside(self, value: float) -> float:
        """An allowed number of the same type, to ask further rules with in place of one that is not."""
        near = self.nearest(value)
        return type(value)(min(1, self.le) if near is None else near)


def number(*, le: float, ge: float | None = None, gt: float | None = None, default: float | str | None = MISSING) -> Any:
    """A number of this range, mandatory without a `default`."""
    return field(default=default, metadata={RANGE: Range(le, ge, gt)})


def numbers(*, le: float, ge: float) -> Any:
    """A list of numbers of this range, empty unless conf/ says otherwise."""
    return field(default_factory=list, metadata={RANGE: Range(le, ge)})


def one_of(among: Callable[[], tuple[str, ...]]) -> Any:
    """A mandatory text that names one of a list that may grow by a file; `among` is asked for it when a value is checked. What is
    fixed is an enum: choices.py."""
    return field(default=MISSING, metadata={CHOICES: among})


def path() -> Any:
    """A mandatory path of this machine (some take a hub id as well), in which `~` is the home folder."""
    return field(default=MISSING, metadata={PATH: True})


def lines() -> Any:
    """A mandatory text in which a typed `\\n` is a new line."""
    return field(default=MISSING, metadata={LINES: True})


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """(dotted key, the object that holds it, its field) of every value of a config that is no group; entries of a dict of
    groups (watch.rules) included."""
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        elif isinstance(value, dict) and any(is_dataclass(entry) for entry in value.values()):
            for name, entry in value.items():
                yield from walk(entry, f"{key}.{name}.")
        else:
            yield key, node, item


@cache
def typed_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every field below a schema class that is no group, those of every option of a group included."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for item in fields(cls):
        kind = hints[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            for option in _with_subclasses(kind):
                found |= typed_keys(option, f"{prefix}{item.name}.")
        else:
            found[f"{prefix}{item.name}"] = kind
    return found


def is_text(kind: Any) -> bool:
    """`str` or Optional[str]."""
    return kind is str or set(get_args(kind)) == {str, type(None)}


def is_text_list(kind: Any) -> bool:
    return kind == list[str]


def _with_subclasses(cls: type) -> list[type]:
    subclasses: list[type] = cls.__subclasses__()
    return [cls, *(below for option in subclasses for below in _with_subclasses(option))]
