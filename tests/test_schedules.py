"""Schedules: whose weights a rollout comes from, what a checkpoint holds of it, and that the order of work changes no number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.data import Sample, Status, WeightSpan
from runner.errors import UserError
from runner.models.families.qwen3_vl import tower
from runner.models.images import PlacedImage
from runner.run import mismatch, pending
from runner.run.collect import Group, Interrupted, Rollout
from runner.run.schedules import Rollouts
from runner.tasks.protocol import Prompt
from runner.trainer.torch.trainer import TorchTrainer
from tests.configs import composed, problems
from tests.trainer_configs import batch, config


@dataclass
class Weights:
    """A collector whose rollouts say which weights they began and ended with."""

    version: int = 0
    held: set[int] = field(default_factory=set)  # steps that wait for the gate
    failing: set[int] = field(default_factory=set)
    interruptible: bool = False
    concurrent: bool = False
    busy: bool = False
    should_stop: Callable[[], bool] = lambda: True
    pool: Any = None
    asked: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.pool = self

    def metrics(self) -> dict[str, float]:
        return {"version": float(self.version)}

    def collect(self, step: int) -> Rollout:
        self.asked.append(step)
        assert self.concurrent or not self.pool.busy, "the in-process engine generates for one caller at a time"
        self.pool.busy = True
        try:
            return self._collect(step)
        finally:
            self.pool.busy = False

    def _collect(self, step: int) -> Rollout:
        began = self.pool.version  # the collector is copied, its pool is not
        if step in self.held:
            assert self.gate.wait(10)
        if step in self.failing:
            raise UserError("no sample came back", key="rollout", fix="look")
        if self.interruptible and self.should_stop():
            raise Interrupted
        return Rollout([], [], {"began": began, "ended": self.pool.version, "stops": float(self.should_stop())})


def rollouts(schedule: str, weights: Weights, beside: bool = True, **changes: object) -> Rollouts:
    cfg = composed(**{"algorithm.schedule": schedule, "steps": 4, **changes})
    weights.concurrent = schedule == "async"
    made = Rollouts(cfg, weights)  # type: ignore[arg-type]
    made.beside = beside
    return made


def steps_of(made: Rollouts, weights: Weights, first: int = 0) -> list[tuple[float, float]]:
    """The loop's calls; the weights that each step's rollout began and ended with."""
    found = []
    for step in range(first, made.steps):
        metrics = made.take(step).rollout.metrics
        made.settle()
        weights.version = step + 1
        found.append((metrics["began"], metrics["ended"]))
    return found


@pytest.mark.parametrize("beside", [True, False])
def test_one_step_off_generates_with_the_weights_before_the_update(beside: bool) -> None:
    weights = Weights()
    assert steps_of(rollouts("one_step_off", weights, beside), weights) == [(0, 0), (0, 0), (1, 1), (2, 2)]
    assert sorted(weights.asked) == [0, 1, 2, 3]  # none after the last step


def test_sync_generates_with_the_newest_weights() -> None:
    weights = Weights()
    assert steps_of(rollouts("sync", weights), weights) == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("staleness", [1, 2])
def test_async_begins_no_earlier_than_its_staleness_allows(staleness: int) -> None:
    weights = Weights()
    made = rollouts("async", weights, **{"algorithm.max_staleness": staleness})
    assert [began for began, _ in steps_of(made, weights)] == [max(0, step - staleness) for step in range(4)]
    assert sorted(weights.asked) == [0, 1, 2, 3]


def test_async_lets_rollouts_go_on_over_an_update_and_one_step_off_does_not() -> None:
    for schedule, ended in (("async", 1), ("one_step_off", 0)):
        weights = Weights()
        made = rollouts(schedule, weights)
        weights.held = {1}
        made.take(0)
        opener = threading.Timer(0.2, weights.gate.set)
        opener.start()
        made.settle()  # async: returns at once
        assert weights.gate.is_set() is (schedule == "one_step_off")
        weights.version = 1
        assert made.take(1).rollout.metrics["ended"] == ended
        opener.join()


def test_a_stop_waits_for_what_could_not_be_made_again() -> None:
    weights = Weights()
    made = rollouts("one_step_off", weights)
    made.take(0)
    settled = made.waiting(1)
    assert settled is not None and settled.rollout.metrics["stops"] == 0.0
    assert settled is made.take(1)
    with pytest.raises(Interrupted):
        rollouts("async", Weights(interruptible=True)).take(0)


def test_another_trainer_finds_nothing_running() -> None:
    weights = Weights(interruptible=True, should_stop=lambda: False)
    made = rollouts("async", weights)
    made.take(0)
    weights.held = {2}
    weights.version = 1
    made.take(1)
    threading.Timer(0.1, weights.gate.set).start()
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout ")]


def test_an_error_of_a_pending_rollout_is_raised_where_it_is_asked_for() -> None:
    weights = Weights(failing={1})
    made = rollouts("one_step_off", weights)
    made.take(0)
    with pytest.raises(UserError, match="no sample came back"):
        made.settle()
    made.close()
    weights.failing = set()
    assert made.take(1).rollout.metrics["began"] == 0


@pytest.mark.parametrize("schedule", ["one_step_off", "async"])
def test_what_waits_is_part_of_the_checkpoint(tmp_path: Path, schedule: str) -> None:
    weights = Weights()
    made = rollouts(schedule, weights)
    made.take(0)
    made.waiting(1)
    made.save(tmp_path)
    resumed = rollouts(schedule, later := Weights(version=1))
    assert resumed.load(tmp_path, ["trainer.optimizer.lr"]) == []
    assert [began for began, _ in steps_of(resumed, later, first=1)] == [0, 1, 2]
    assert sorted(later.asked) == [2, 3]
    (note,) = rollouts(schedule, Weights()).load(tmp_path, ["task.digits", "seed"])
    assert "task.digits, seed changed" in note


def test_what_is_not_complete_is_made_again(tmp_path: Path) -> None:
    """Async saves without waiting: the step that was under way is generated anew, by the weights of the checkpoint."""
    weights = Weights(held={1})
    made = rollouts("async", weights)
    made.take(0)
    made.save(tmp_path)
    assert not list(tmp_path.iterdir())
    weights.gate.set()
    made.close()
    later = Weights(version=1)
    assert steps_of(rollouts("async", later), later, first=1)[0][0] == 1


def test_what_waited_was_not_generated_in_the_time_of_the_resumed_run(tmp_path: Path) -> None:
    sample = _sample((), served=[("engine 0", 1.0, 2.0)])
    group = Group(Prompt("p", "text", (1, 2), "answer"), [sample])
    pending.write(tmp_path / "rollout", [(1, Rollout([group], [group]), {}, 0.5, None)])
    made = rollouts("one_step_off", Weights())
    assert made.load(tmp_path, []) == []
    waiting = made.waiting(1)
    assert waiting is not None and [sample.served for sample in waiting.rollout.all_samples] == [[]]


def test_nothing_is_saved_where_nothing_waits(tmp_path: Path) -> None:
    made = rollouts("sync", Weights())
    made.take(0)
    made.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert rollouts("sync", Weights()).load(tmp_path, []) == []


def _sample(images: tuple[PlacedImage, ...], **changes: Any) -> Sample:
    sample = Sample(
        prompt_id="p",
        sample_index=1,
        tokens=torch.arange(5),
        response_length=3,
        loss_mask=torch.tensor([True, False, True]),
        rollout_logprobs=torch.tensor([-0.1, float("nan"), -1e-30]),
        status=Status.truncated,
        finish_reason="length",
        raw_logprobs=torch.arange(12.0).view(3, 4)[:, 1],  # a view that is not contiguous
        routes=torch.randint(0, 255, (4, 2, 2), dtype=torch.uint8),
        weight_spans=[WeightSpan(7, 0, 3)],
        reward=0.1 + 0.2,
        info={"prompt": 'a "quote"\n', "text": "ü", "ids": (1, 2)},
        images=images,
    )
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


def test_a_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)[::-1]
    image = PlacedImage(pixels, 2, tower(composed("model=tiny_vlm").model))
    crop = PlacedImage(pixels[:4, :8], 3, image.tower)
    samples = [_sample((image,)), _sample((image, crop)), _sample((), routes=None, reward=None)]
    group = Group(Prompt("p", "text", (1, 2), "answer", {"k": [1, None, True]}, (image,)), samples)
    written = Rollout([group], [group, Group(group.prompt, [])], {"rollout/raw_reward": 0.1})
    pending.write(tmp_path / "rollout", (3, written))
    step, read = pending.read(tmp_path / "rollout")
    assert step == 3 and read.metrics == written.metrics and read.groups[0] is read.generated[0]
    for before, after in zip(samples, read.samples, strict=True):
        for name, value in vars(before).items():
            found = getattr(after, name)
            if isinstance(value, torch.Tensor):
                assert found.dtype == value.dtype and torch.equal(found.nan_to_num(-9.0), value.nan_to_num(-9.0)), name
            elif name != "images":
                assert found == value, name
    (one,), (again, part), (shown,) = read.samples[0].images, read.samples[1].images, read.groups[0].prompt.images
    assert one is again is shown and not read.samples[2].images
    assert np.array_equal(one.pixels, pixels) and one.grid == image.grid
    assert np.array_equal(part.pixels, crop.pixels) and part.start == 3


def test_what_is_not_known_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path"):
        pending.write(tmp_path / "a", _sample((), info={"where": tmp_path}))
    pending.write(tmp_path / "b", _sample(()))
    objects = tmp_path / "b" / pending.OBJECTS
    intact = objects.read_text()
    for damage in (
        intact.replace('"kind": "Sample"', '"kind": "Popen"'),
        "{",
        "[]",
        intact.replace('"name": "0"', '"name": "99"'),
    ):
        objects.write_text(damage)
        with pytest.raises(UserError, match="no rollout that can be read"):
            pending.read(tmp_path / "b")


def test_staleness_is_a_part_of_the_mismatch_and_the_sum_stays_exact() -> None:
    cfg = config(**{"router_replay.trainer": True})
    trainer, data = TorchTrainer(cfg), batch(cfg, routes=True)
    then = mismatch.generation_logprobs(trainer, data, 4)
    fresh = mismatch.decompose(trainer, data, 4, [])
    plain = mismatch.decompose(trainer, data, 4)
    assert fresh.pop("mismatch/staleness") == fresh.pop("mismatch/staleness_abs") == 0.0 and fresh == plain
    trainer.step(data)
    found = mismatch.decompose(trainer, data, 4, then)
    parts = [found[f"mismatch/{name}"] for name in ("numerics", "staleness", "routing", "quantization")]
    assert found["mismatch/numerics"] == plain["mismatch/numerics"]  # counted against the weights of the generation
    assert found["mismatch/staleness_abs"] > 0 and found["mismatch/residual"] < 1e-12
    assert sum(parts) == pytest.approx(found["mismatch/total"], abs=1e-9)


def test_where_scores_of_the_engine_are_given_the_sum_is_exact_too() -> None:
    cfg = config(**{"router_replay.trainer": True})
    trainer, data = TorchTrainer(cfg), batch(cfg, routes=True)
    now = [sample.rollout_logprobs - 0.25 for sample in data.samples[:4]]
    found = mismatch.decompose(trainer, data, 4, engine_now=now)
    assert found["mismatch/staleness"] == pytest.approx(0.25, abs=1e-6) and found["mismatch/residual"] < 1e-12


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        ("model=qwen3_30b algorithm.schedule=one_step_off", "algorithm.schedule", "take turns"),
        ("algorithm.schedule=async", "algorithm.schedule", "in our own process"),
        (
            "rollout=sglang algorithm.schedule=async rollout.sampling.temperature=0.7",
            "mismatch.decompose_interval_steps",
            "temperature 0.7",
        ),
        ("rollout=sglang algorithm.schedule=async rollout.pause_mode=in_place", "rollout.pause_mode", "which weights"),
    ],
)
def test_what_a_schedule_cannot_have(overrides: str, key: str, text: str) -> None:
    (problem,) = problems(*overrides.split())
    assert problem.key == key and text in problem.problem and problem.fix
