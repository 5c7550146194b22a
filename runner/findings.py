"""What a check of this machine found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the table; `fix` says what to type or change when it is not ok."""

    name: str
    status: Status
    found: str
    fix: str = ""
