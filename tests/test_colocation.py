"""Trainer and engines that share GPUs: who is awake when. Fakes: tests/sglang_servers has real engines that sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config import compose
from runner.config.option import shares_gpus
from runner.rollout.protocol import RolloutPool, SyncReport
from runner.run import colocation
from runner.run.colocation import TimeShared
from runner.trainer.protocol import Trainer

BATCH: Any = None


class Gpus:
    """Whoever works must be awake, alone."""

    def __init__(self) -> None:
        self.awake = {"trainer", "pool"}
        self.log: list[str] = []

    def use(self, who: str, what: str) -> None:
        assert self.awake == {who}, f"{who} {what} while {self.awake} is awake"
        self.log.append(f"{who} {what}")


class FakeTrainer:
    def __init__(self, gpus: Gpus) -> None:
        self.gpus, self.version = gpus, 0

    def sleep(self) -> None:
        self.gpus.awake.discard("trainer")

    def wake(self) -> None:
        self.gpus.awake.add("trainer")

    def step(self, batch: Any) -> dict[str, float]:
        self.gpus.use("trainer", "step")
        self.version += 1
        return {}

    def save(self, folder: Path) -> None:
        self.gpus.use("trainer", "save")

    def logprobs(self, batch: Any, **options: Any) -> list[torch.Tensor]:
        self.gpus.use("trainer", "logprobs")
        return []

    def export(self, format: str = "rollout") -> Iterator[Any]:
        for index in range(2):
            self.gpus.use("trainer", "export")
            yield index

    def close(self) -> None:
        self.gpus.log.append("trainer closed")


class FakePool:
    def __init__(self, gpus: Gpus) -> None:
        self.gpus, self.version = gpus, -1

    def sleep(self) -> None:
        self.gpus.awake.discard("pool")

    def wake(self) -> None:
        self.gpus.awake.add("pool")

    def generate(self, requests: Any) -> Iterator[Any]:
        self.gpus.use("pool", "generate")
        yield from requests

    def score(self, sequences: Any, images: Any = None) -> list[torch.Tensor]:
        self.gpus.use("pool", "score")
        return []

    def update_weights(self, version: int, stream: Any) -> SyncReport:
        assert list(stream) == [0, 1]
        self.gpus.awake.add("pool")  # loading wakes engines
        self.gpus.use("pool", "load")
        self.version = version
        return SyncReport(version, 0.0, 0, 0, 0)

    def metrics(self) -> dict[str, float]:
        return {"x": 1.0}


@pytest.fixture
def both() -> tuple[Gpus, TimeShared]:
    gpus = Gpus()
    return gpus, TimeShared(FakeTrainer(gpus), FakePool(gpus))  # type: ignore[arg-type]


@pytest.mark.promise("engines sleep while the trainer has their GPUs")
def test_a_step_hands_the_gpus_over_in_the_middle_of_the_sync(both: tuple[Gpus, TimeShared]) -> None:
    gpus, shared = both
    trainer, pool = shared.trainer, shared.pool
    pool.update_weights(trainer.version, trainer.export())
    assert list(pool.generate([1, 2])) == [1, 2]  # type: ignore[list-item]
    trainer.step(BATCH)
    trainer.logprobs(BATCH)
    pool.update_weights(trainer.version, trainer.export())
    pool.score([])
    trainer.save(Path())
    assert list(pool.generate([])) == []
    order = ["trainer export", "trainer export", "pool load"]
    between = ["pool generate", "trainer step", "trainer logprobs"]
    assert gpus.log == [*order, *between, *order, "pool score", "trainer save", "pool generate"]
    assert trainer.version == pool.version == 1 and pool.metrics() == {"x": 1.0}


def test_an_update_that_fails_in_the_export_leaves_the_trainer_awake(both: tuple[Gpus, TimeShared]) -> None:
    gpus, shared = both

    def torn() -> Iterator[Any]:
        yield from shared.trainer.export()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shared.pool.update_weights(0, torn())
    shared.trainer.step(BATCH)
    shared.pool.update_weights(1, shared.trainer.export())
    assert gpus.awake == {"pool"}


def test_versions_are_the_trainers_own(both: tuple[Gpus, TimeShared]) -> None:
    _, shared = both
    shared.trainer.version = 7
    assert shared.trainer.version == 7 and shared._trainer.version == 7


def test_a_lost_trainer_is_replaced_while_the_engines_sleep(both: tuple[Gpus, TimeShared]) -> None:
    gpus, shared = both
    shared.pool.update_weights(0, shared.trainer.export())
    shared.trainer.close()
    shared.make_room()
    assert gpus.awake == set()
    gpus.awake.add("trainer")  # building one
    trainer = shared.replace_trainer(FakeTrainer(gpus))  # type: ignore[arg-type]
    trainer.step(BATCH)
    shared.pool.update_weights(1, trainer.export())
    assert list(shared.pool.generate([])) == []


@pytest.mark.parametrize(("protocol", "uses"), [(Trainer, colocation.TRAINER), (RolloutPool, colocation.POOL)])
def test_every_member_of_a_protocol_says_what_it_needs(protocol: type, uses: dict[str, Any]) -> None:
    members = {name for name in vars(protocol) if not name.startswith("_")} | protocol.__annotations__.keys()
    assert uses.keys() == members


def test_what_nobody_classified_is_not_reached(both: tuple[Gpus, TimeShared]) -> None:
    _, shared = both
    shared._trainer.added = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="added of FakeTrainer"):
        shared.trainer.added()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="added"):
        shared.trainer.added = None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=qwen3_30b", "precision=int4_qat"], True),
        (["model=qwen3_30b", "precision=int4_qat", "parallelism.colocate=false", "rollout.weight_transport=distributed"], False),
        (["model=tiny_moe", "rollout=sglang", "speculative=none"], False),
        ([], False),
    ],
)
def test_who_shares_gpus(overrides: list[str], expected: bool) -> None:
    assert shares_gpus(compose.load_config(overrides)) is expected
