"""How a conversation fails: it ends its sample, with a reason, and never the run."""

from __future__ import annotations


class Failed(Exception):
    """`kind` is counted as rollout/failed_<kind>: environment, rollout, timeout, flood, rubbish, context or engine."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def told(error: BaseException) -> str:
    """An exception in one line of at most 300 characters, whatever its own text does."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # its __str__ raises
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
