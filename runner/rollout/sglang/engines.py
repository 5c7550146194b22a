"""What the fleet knows of its engines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.launcher import EngineProcess
from runner.config.choices import PauseMode
from runner.errors import UserError
from runner.rollout.sglang.client import Client


@dataclass
class Settings:
    startup_seconds: float
    request_seconds: float
    health_seconds: float
    max_retries: int
    pause_mode: PauseMode
    repacks: bool  # whether engines lay quantized weights out for a kernel: they are then checked by whole layers
    draft: frozenset[str]  # weights of the policy's export that the draft model takes


class Engine:
    """A server and what the pool knows about it. `synced`: number of the weight update that is resident; 0 is none."""

    def __init__(self, server: EngineProcess) -> None:
        self.server = server
        self.client: Client | None = None
        self.up = False
        self.synced = 0
        self.asleep = False  # without GPU memory, paused
        self.outstanding = 0  # tokens of requests it works on
        self.restarting: asyncio.Task[None] | None = None
        self.broken: UserError | None = None


@dataclass
class EngineUpdate:
    """What one engine answered to a weight update."""

    engine: Engine
    arrived: int = 0
    checked: int = 0
    problems: list[str] = field(default_factory=list)
    died: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        self.problems += answer.get("problems", [])
        self.arrived += answer.get("arrived", 0)
        self.checked += answer.get("checked", 0)


def label(update: int, version: int) -> str:
    """SGLang's weight_version: it must change with every update, also when the trainer's version does not."""
    return f"{version}.{update}"


def version_of_label(text: str) -> int:
    return int(text.partition(".")[0])
