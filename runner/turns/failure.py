"""How a conversation fails: it ends its sample, with a reason, and never the run."""

from __future__ import annotations

from typing import Literal

Kind = Literal["environment", "rollout", "timeout", "flood", "rubbish", "image", "context", "engine"]


class Failed(Exception):
    """`kind` is counted as rollout/failed_<kind>."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
