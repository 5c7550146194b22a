"""What the loop needs of a rollout pool. Implementations: local/ (in-process), sglang/ (server pool)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from runner.data import Request, Sample, WeightStream
from runner.models.images import Images


@dataclass
class SyncReport:
    """One weight sync. `problems` names every tensor that failed verification; non-empty is an error of the sync.

    seconds, wire_bytes; tensors checked on arrival and for residency; the share of integers and of scales that changed
    since the previous sync (0 to 1; None at the first, or when nothing is quantized).
    """

    version: int
    seconds: float
    wire_bytes: int
    arrived: int
    resident_checked: int
    changed_integers: float | None = None
    changed_scales: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class EngineDescription:
    """What an engine computes with: HF weight name -> format, and the grid of the quantized ones."""

    formats: dict[str, str]
    group_size: int
    convention: str
    product_rounding: str  # "fp32" or "bf16": how the kernel rounds integer * scale
    info: dict[str, Any] = field(default_factory=dict)


class RolloutPool(Protocol):
    """Built as `pool(cfg, run_dir)`: files that belong to a run go into its folder; None: there is no run."""

    version: int  # of the resident weights; -1 before the first sync

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        """Yield samples as they finish, in any order; one per request, none lost or doubled.

        `requests` may be a Feed (feed.py): its None says that there is none now, while others run. What an engine computed for
        the turns of one conversation it may keep between them.
        """
        ...

    def update_weights(self, version: int, stream: WeightStream) -> SyncReport:
        """Pause, flush caches, load every tensor, verify (hash on arrival, residency), continue."""
        ...

    def score(self, sequences: list[torch.Tensor], images: list[Images] | None = None) -> list[torch.Tensor]:
        """Teacher-forced logprobs [T - 1] fp32 at temperature 1 of each token sequence [T]; `images`: one per sequence."""
        ...

    def describe(self) -> list[EngineDescription]:
        """What each engine of the pool computes with, as read back from it; every run compares it with its plan at the start."""
        ...

    def metrics(self) -> dict[str, float]:
        """`rollout/spec_*` and `perf/*` counters since the last call."""
        ...

    def notices(self) -> list[str]:
        """What a reader of the run must know and no metric says, since the last call: engines that ended, were started again."""
        ...

    def state(self) -> dict[str, Any]:
        """Decisions (speculation switched off) and what they will be made from; a copy, JSON-serializable."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def decide(self) -> dict[str, Any] | None:
        """At the end of a step: put a decision that was measured into effect and return it; None when there is none.
        Its `summary` is the line that the user reads."""
        ...

    def apply(self, decision: dict[str, Any]) -> None:
        """Put a decision of an earlier attempt into effect, as `decide` returned it."""
        ...

    def close(self) -> None: ...
