"""Errors that a user can fix: printed as a message with a fix and exit code 2, never as a traceback."""

from __future__ import annotations


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
