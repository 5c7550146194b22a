"""Collection, orchestration only: a fake pool and task show grouping, dynamic sampling, failures and interrupts."""

from collections.abc import Iterable, Iterator

import pytest
import torch

from runner.config.compose import load
from runner.data import Request, Sample, Status, request_seed
from runner.errors import UserError
from runner.run.collect import Collector, Interrupted
from runner.run.evaluation import evaluate, pass_at_k
from runner.tasks.protocol import Prompt


class FakeTask:
    """Even prompts of a round are always right, odd ones in their odd samples."""

    name = "fake"

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        return [Prompt(f"{step}/{round}/{i}", "p", (1, 2), "a", {"flat": i % 2 == 0}) for i in range(count)]

    def eval_prompts(self, count: int) -> list[Prompt]:
        return self.train_prompts(0, count)

    def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
        assert sample is not None
        return 1.0 if prompt.info["flat"] else float(sample.sample_index % 2)


class FakePool:
    """Returns samples in reverse order; requests named in `failing` come back failed."""

    def __init__(self, failing: Iterable[str] = ()) -> None:
        self.failing, self.requests = set(failing), list[Request]()

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        self.requests += (batch := list(requests))
        for request in reversed(batch):
            status = Status.failed if request.prompt_id in self.failing else Status.completed
            tokens = torch.tensor([*request.tokens, 4])
            yield Sample(
                request.prompt_id,
                request.sample_index,
                tokens,
                1,
                torch.ones(1, dtype=torch.bool),
                torch.zeros(1),
                status,
                "it hung" if status is Status.failed else "stop",
            )


def collector(pool: FakePool, *overrides: str, stop: bool = False, warnings: list[str] | None = None) -> Collector:
    cfg = load(["algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=2", *overrides]).config
    warn = (warnings if warnings is not None else []).append
    return Collector(cfg, FakeTask(), pool, lambda ids: "text", (0,), lambda: stop, warn=warn)  # type: ignore[arg-type]


def test_groups_come_back_in_prompt_order_whatever_finished_first() -> None:
    rollout = collector(FakePool()).collect(step=3)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["3/0/0", "3/0/1", "3/0/2", "3/0/3"]
    assert [sample.sample_index for sample in rollout.samples] == [0, 1] * 4
    assert rollout.metrics["rollout/zero_std"] == 0.5 and rollout.metrics["rollout/raw_reward"] == 0.75


@pytest.mark.promise("oversampling with the dynamic filter")
def test_dynamic_sampling_replaces_flat_groups_and_fills_up_when_rounds_run_out() -> None:
    rollout = collector(FakePool(), "algorithm.dynamic_sampling=true").collect(step=0)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["0/0/1", "0/0/3", "0/1/1", "0/1/3"]
    assert rollout.metrics["rollout/rounds"] == 2 and rollout.metrics["rollout/samples"] == 16
    short = collector(FakePool(), "algorithm.dynamic_sampling=true", "algorithm.max_resample_rounds=0").collect(step=0)
    assert [group.is_flat for group in short.groups] == [False, False, True, True]


@pytest.mark.promise("oversampling with the dynamic filter")
def test_oversampling_asks_for_more_and_keeps_what_carries_an_advantage() -> None:
    pool = FakePool()
    rollout = collector(pool, "algorithm.dynamic_sampling=true", "algorithm.oversample_prompts=8").collect(step=0)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["0/0/1", "0/0/3", "0/0/5", "0/0/7"]
    assert rollout.metrics["rollout/rounds"] == 1 and len(pool.requests) == 16  # one round instead of two


def test_failed_samples_leave_their_group_and_a_step_without_any_is_an_error() -> None:
    warnings: list[str] = []
    rollout = collector(FakePool({"0/0/1"}), warnings=warnings).collect(step=0)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["0/0/0", "0/0/2", "0/0/3"]
    assert warnings == ["2 of 8 samples failed in the engine and are left out (prompt 0/0/1, sample 0: it hung)"]
    with pytest.raises(UserError, match="no sample of the rollout came back"):
        collector(FakePool({f"0/0/{i}" for i in range(4)})).collect(step=0)


def test_failed_samples_are_no_wrong_answers_of_an_evaluation() -> None:
    cfg = load(["evaluation.num_prompts=4", "evaluation.samples_per_prompt=2"]).config
    scores = [evaluate(cfg, collector(FakePool(failing)), step=0) for failing in ((), ("0/0/1", "0/0/3"))]
    assert [score["eval/arithmetic"] for score in scores] == [0.75, 1.0]
    with pytest.raises(UserError, match="every sample of the evaluation failed"):
        evaluate(cfg, collector(FakePool(f"0/0/{i}" for i in range(4))), step=0)


def test_an_interrupt_abandons_the_rollout() -> None:
    with pytest.raises(Interrupted):
        collector(FakePool(), stop=True).collect(step=0)


def test_seeds_differ_by_step_prompt_and_sample_and_are_stable() -> None:
    pool = FakePool()
    collector(pool).collect(step=0)
    collector(pool).collect(step=1)
    seeds = [request.seed for request in pool.requests]
    assert len(set(seeds)) == len(seeds) == 16
    assert request_seed(1, 2, "a", 3) == request_seed(1, 2, "a", 3) != request_seed(2, 2, "a", 3)


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    assert pass_at_k(4, 0, 2) == 0.0 and pass_at_k(4, 4, 2) == 1.0 and pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # one right among four, two drawn: 3 of 6 pairs hold it
