"""Asynchronous rollouts that ask for more prompts than they need: the surplus is aborted, and groups stay whole."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from test_collect import FakeTask
from test_local_engine import FP32, exported
from test_turns import EchoPool

from runner.config.compose import load
from runner.config.schema import Config
from runner.data import Request, Sample, Status
from runner.models.build import load_tokenizer
from runner.rollout.local import LocalPool
from runner.run.collect import Collector
from runner.run.surplus import Surplus
from runner.tasks.protocol import Prompt
from runner.turns.context import Context, Engine
from tests.configs import problems

HERE = __name__
ASYNC = ["algorithm.schedule=async", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=2"]


class Stepwise:
    """A pool that answers requests in the order of `speed` (lower first) and knows which were never answered."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, int]] = []
        self.aborted: list[tuple[str, int]] = []

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        asked = [request for request in requests if request is not None]
        waiting = sorted(asked, key=lambda request: (-int(request.prompt_id.split("/")[-1]), request.sample_index))
        try:
            while waiting:
                request = waiting.pop(0)
                self.answered.append((request.prompt_id, request.sample_index))
                yield Sample(
                    request.prompt_id, request.sample_index, torch.tensor([*request.tokens, 4]), 1,
                    torch.ones(1, dtype=torch.bool), torch.zeros(1), Status.completed, "stop",
                )  # fmt: skip
        finally:
            self.aborted = [(request.prompt_id, request.sample_index) for request in waiting]


def collector(pool: Any, *overrides: str, task: Any = None) -> Collector:
    cfg = load([*ASYNC, *overrides], check_rules=False).config
    tokenizer = load_tokenizer(cfg.model)
    return Collector(cfg, task or FakeTask(), pool, lambda ids: "text", (1,), lambda: False, pytest.fail, tokenizer)  # type: ignore[arg-type]


def test_the_first_groups_that_are_complete_are_taken_and_the_rest_is_aborted() -> None:
    pool = Stepwise()
    rollout = collector(pool, "algorithm.oversample_prompts=6").collect(step=3)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["3/0/4", "3/0/5"]  # prompt order; 5 was the fastest
    assert [sample.sample_index for sample in rollout.samples] == [0, 1] * 2
    assert len(pool.answered) == 4 and len(pool.aborted) == 8 and not set(pool.answered) & set(pool.aborted)
    assert rollout.metrics["rollout/aborted"] == 8 and rollout.metrics["rollout/samples"] == 4


def test_flat_groups_are_no_use_where_they_are_dropped() -> None:
    """Even prompts are always right: three groups more have to come in."""
    pool = Stepwise()
    rollout = collector(pool, "algorithm.oversample_prompts=6", "algorithm.dynamic_sampling=true").collect(step=0)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["0/0/3", "0/0/5"] and rollout.metrics["rollout/rounds"] == 1
    assert len(pool.answered) == 6 and rollout.metrics["rollout/aborted"] == 6


def test_other_schedules_wait_for_everything() -> None:
    for overrides in (["algorithm.schedule=sync"], ["algorithm.schedule=one_step_off"]):
        pool = Stepwise()
        both = ["algorithm.oversample_prompts=6", "algorithm.dynamic_sampling=true", *overrides]
        rollout = collector(pool, *both).collect(step=0)
        assert len(pool.answered) == 12 and "rollout/aborted" not in rollout.metrics
        assert [group.prompt.prompt_id for group in rollout.groups] == ["0/0/1", "0/0/3"]
    pool = Stepwise()
    collector(pool).collect(step=0)  # asynchronous, and nothing more is asked for
    assert len(pool.answered) == 4


def test_a_group_counts_once_all_of_its_samples_are_there() -> None:
    prompts = [Prompt(f"p{i}", "", (1,), "") for i in range(3)]
    seen: list[tuple[str, int]] = []
    surplus = Surplus(
        prompts, 2, 1, lambda prompt, group: bool(seen.append((prompt.prompt_id, len(group))) or prompt.prompt_id != "p1")
    )
    one = Sample("p", 0, torch.zeros(1), 1, torch.ones(1), torch.zeros(1), Status.completed, "stop")
    assert not surplus.add("p1", 1, [one]) and not surplus.add("p0", 0, [one]) and not surplus.add("p1", 0, [one, one])
    assert surplus.add("p0", 1, [one]) and seen == [("p1", 3), ("p0", 2)]
    assert len(surplus.samples) == 5 and surplus.aborted == 2


async def slow_for_some(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """Conversations of the first prompts never end by themselves."""
    talk = context.start(prompt)
    await engine.generate(talk, max_tokens=3)
    if int(prompt.prompt_id.split("/")[-1]) < 2:
        await asyncio.sleep(600)
    talk.reward(1.0)
    return talk.sample()


def test_conversations_that_are_surplus_are_cancelled() -> None:
    cfg = load([*ASYNC, "task=calculator", "algorithm.oversample_prompts=4", "router_replay=none"], check_rules=False).config
    section = dataclasses.replace(cfg.task.rollout, _target_=f"{HERE}.slow_for_some", environment=None, arguments={})
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, rollout=section))
    tokenizer = load_tokenizer(cfg.model)
    made = Collector(cfg, FakeTask(), EchoPool(), tokenizer.decode, (1,), lambda: False, pytest.fail, tokenizer)  # type: ignore[arg-type]
    for step in range(2):
        rollout = made.collect(step)
        assert [group.prompt.prompt_id for group in rollout.groups] == [f"{step}/0/2", f"{step}/0/3"]
        assert rollout.metrics["rollout/aborted"] == 4 and rollout.metrics["rollout/failed"] == 0


def test_the_in_process_engine_goes_on_after_a_surplus() -> None:
    cfg: Config = load(
        [*ASYNC, *FP32, "model.num_layers=2", "task=arithmetic", "algorithm.oversample_prompts=8", "rollout.max_concurrency=4",
         "rollout.sampling.max_response_tokens=24"], check_rules=False
    ).config  # fmt: skip
    pool = LocalPool(cfg)
    assert pool.update_weights(0, iter(exported(cfg, spread=1.5)[1])).problems == []
    made = Collector(cfg, FakeTask(), pool, lambda ids: "text", (1,), lambda: False, pytest.fail)  # type: ignore[arg-type]
    for step in range(2):
        rollout = made.collect(step)
        assert len(rollout.groups) == 2 and all(len(group.samples) == 2 for group in rollout.groups)
        assert 0 < rollout.metrics["rollout/aborted"] <= 12 and not pool.engine.busy


def test_the_rule_allows_what_drops_something() -> None:
    load(["algorithm.oversample_prompts=64", "algorithm.schedule=async", "rollout=sglang"])
    (error,) = problems("algorithm.oversample_prompts=64", "algorithm.schedule=one_step_off")
    assert error.key == "algorithm.oversample_prompts" and "algorithm.schedule=async" in (error.fix or "")
