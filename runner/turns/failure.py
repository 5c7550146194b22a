"""How a conversation fails: it ends its sample, with a reason, and never the run."""

from __future__ import annotations


class Failed(Exception):
    """`kind` is counted as rollout/failed_<kind>: environment, rollout, timeout, flood, rubbish, context or engine."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
