"""Errors that a user can fix: printed as a message with a fix and exit code 2, never as a traceback."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

MOST_CHARACTERS = 300  # of an exception's text


class UserError(Exception):
    """One problem in the user's words, and what to do about it.

    `key` is the config key (or file and line) it is about; `fix` says what to type or change; `where` is where the value
    came from (a file and line, or the command line).
    """

    def __init__(self, problem: str, *, fix: str | None = None, key: str | None = None, where: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.key = key
        self.where = where

    def __str__(self) -> str:
        text = f"{self.key}: {self.problem}" if self.key else self.problem
        text = f"{text}\n     from: {self.where}" if self.where else text
        return f"{text}\n     fix: {self.fix}" if self.fix else text


class Failure(UserError):
    """Something broke under a run whose config is right: a process died, a disk filled up, the outputs were deleted. A run ends
    with exit code 1 then, not 2."""


class UserErrors(UserError):
    """Everything wrong at once. `advice`: commands that do work, printed below the list."""

    def __init__(self, errors: list[UserError], advice: list[str] | None = None) -> None:
        super().__init__(f"{len(errors)} problems")
        self.errors = errors
        self.advice = advice or []

    def __str__(self) -> str:
        lines = [f"  {i}. {error}" for i, error in enumerate(self.errors, 1)]
        if self.advice:
            lines += ["what works instead:", *(f"    {line}" for line in self.advice)]
        return "\n".join(lines)


def told(error: BaseException, *, where: bool = False) -> str:
    """An exception in one line, its text cut at 300 characters, whatever its `__str__` does.

    `where`: followed by the file and line that the user's own code was at, as in `ValueError: no (rewards.py:12)`: the last frame
    that is neither this package's nor an installed one's. Nothing follows where there is none.
    """
    try:
        text = " ".join(str(error).split())[:MOST_CHARACTERS].encode(errors="replace").decode()  # half a character prints nowhere
    except Exception:  # its __str__ raises
        text = ""
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _place(error) if where else None
    return f"{line} ({place})" if place else line


def _place(error: BaseException) -> str | None:
    installed = [folder for name, folder in sysconfig.get_paths().items() if name.endswith("lib")]
    others = ("<", *(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *installed)))
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith(others):
            return f"{file.removeprefix(f'{Path.cwd()}{os.sep}')}:{line}"
    return None
