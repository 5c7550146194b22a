"""What a tracker is, and one that does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from runner.tracking.timeline import Span

POOL_DECISION = "pool_decision"  # the kind of the event that a pool decided something by its own clock
# What a step's seconds go to. The loop's thread does one after the other, whatever runs beside it: their sum is perf/step_time.
STEP_PARTS = (
    "perf/rollout_time",  # generating and grading; where rollouts run beside updates, waiting for them
    "perf/train_time",
    "perf/update_weights_time",
    "perf/probe_time",
    "perf/decompose_time",
    "perf/eval_time",
    "perf/other_time",
)
State = Literal["running", "completed", "failed", "interrupted", "stopped"]  # of a run
NONE: Mapping[str, np.ndarray] = MappingProxyType({})  # no pictures


def said(status: State, message: str) -> str:
    """How a run ended, in one line; a message that is the state says no more."""
    return f"{status} {message}" if message and message != status else status


class Progress(Protocol):
    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more of the total is done; `note` replaces the text beside the bar."""
        ...


class Tracker(Protocol):
    """Metric names are those of the field (`train/grad_norm`, `rollout/raw_reward`, `eval/<name>`, ...)."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of one finished step, counted from 0. May be called again for the same step (evaluation)."""
        ...

    def log_samples(self, step: int, rows: list[dict[str, Any]], pictures: Mapping[str, np.ndarray] = NONE) -> None:
        """A few samples as JSON objects; `prompt`, `response` and `reward` are shown in the report. `pictures`: their images,
        uint8 [H, W, 3], by the names that the rows have for them."""
        ...

    def log_timeline(self, step: int, spans: list[Span]) -> None:
        """What the driver, the trainer's ranks and the engines did when, for one step."""
        ...

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Something a reader of the run must know: a watch rule fired, a step was skipped, speculation went off."""
        ...

    def rewind(self, first_step: int) -> None:
        """The run goes back to a checkpoint: `first_step` is done next, and what was logged of it and later is dropped."""
        ...

    def progress(self, label: str, total: int) -> Any:
        """A context manager that gives a `Progress` for a long part outside of the steps (warm start, evaluation)."""
        ...

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        """The last call. `status` is what the run ended as."""
        ...


class SilentProgress:
    def advance(self, amount: int = 1, note: str = "") -> None:
        return


class BaseTracker:
    """Does nothing: trackers override what concerns them. `in_folder`: writes files of the run's folder."""

    in_folder = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        return

    def log_samples(self, step: int, rows: list[dict[str, Any]], pictures: Mapping[str, np.ndarray] = NONE) -> None:
        return

    def log_timeline(self, step: int, spans: list[Span]) -> None:
        return

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        return

    def rewind(self, first_step: int) -> None:
        return

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        yield SilentProgress()

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        return
