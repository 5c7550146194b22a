"""The weight sync of a run: one retry, then the run stops with the tensors' names; probes compare both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runner.errors import UserError
from runner.rollout.protocol import SyncReport
from runner.run.sync import ATTEMPTS, WeightSync


class Trainer:
    version = 3

    def __init__(self) -> None:
        self.asked: list[str] = []

    def export(self, format: str) -> Iterator[Any]:
        self.asked.append("export")
        yield from ()

    def logprobs(self, batch: Any, **options: Any) -> list[torch.Tensor]:
        self.asked.append("logprobs")
        return [torch.full((len(sample.tokens) - 1,), -1.0) for sample in batch.samples]


class Pool:
    """Its first `failures` syncs find a wrong tensor."""

    def __init__(self, failures: int) -> None:
        self.failures, self.versions = failures, list[int]()

    def update_weights(self, version: int, stream: Iterator[Any]) -> SyncReport:
        assert list(stream) == []
        self.versions.append(version)
        problems = ["model.layers.0.mlp: bytes differ"] if len(self.versions) <= self.failures else []
        return SyncReport(version, 1.5, 100, 7, 5, problems=problems)

    def score(self, sequences: list[torch.Tensor], images: Any) -> list[torch.Tensor]:
        return [torch.full((len(tokens) - 1,), -1.25) for tokens in sequences]


class Tracker:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, kind: str, message: str, details: Any) -> None:
        self.events.append((kind, message))


def sync(failures: int, probe: list[torch.Tensor]) -> tuple[Any, Trainer, Pool, Tracker]:
    trainer, pool, tracker = Trainer(), Pool(failures), Tracker()
    return WeightSync(trainer, pool, probe, tracker), trainer, pool, tracker  # type: ignore[arg-type]


@pytest.mark.promise("a failed sync is tried again, then stops the run")
def test_a_sync_that_fails_is_tried_again_with_everything() -> None:
    syncing, trainer, pool, tracker = sync(1, [torch.arange(4), torch.arange(6)])
    metrics = syncing()
    assert pool.versions == [3, 3]
    assert trainer.asked == ["logprobs", "export", "export"]  # the probe first: a trainer that takes turns sleeps afterwards
    assert [kind for kind, _ in tracker.events] == ["sync_failed"] and "attempt 1" in tracker.events[0][1]
    assert metrics["probe/logprob_abs_diff"] == 0.25 and metrics["perf/update_weights_wire_bytes"] == 100


@pytest.mark.promise("a failed sync is tried again, then stops the run")
def test_the_run_stops_with_the_tensors_name_when_the_retry_fails_too() -> None:
    syncing, _, pool, tracker = sync(ATTEMPTS, [])
    with pytest.raises(UserError, match=r"(?s)version 3 did not arrive intact.*model\.layers\.0\.mlp: bytes differ"):
        syncing()
    assert len(pool.versions) == ATTEMPTS == len(tracker.events)
