"""algorithm.turn_credit: what a turn is credited with, by hand, and that both trainers take it token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_loss_aggregation import _gradient, _trainer
from test_turns import Talker, conversation, run

from runner.algorithms.advantages import compute_advantages, turn_returns, turns
from runner.config.schema import LossAggregation, RewardConfig
from runner.data import Sample, Status
from runner.tasks import parts
from runner.tasks.protocol import Prompt
from tests.configs import composed, problems
from tests.trainer_configs import batch

HERE = __name__


def sample(mask: str, reward: float, given: list[tuple[int, str, float]], **rewards: float) -> Sample:
    """`mask`: x for a token of the model, . for one between turns."""
    own = torch.tensor([letter == "x" for letter in mask])
    return Sample(
        prompt_id="p",
        sample_index=0,
        tokens=torch.arange(3 + len(mask)),
        response_length=len(mask),
        loss_mask=own,
        rollout_logprobs=torch.zeros(len(mask)),
        status=Status.completed,
        finish_reason="stop",
        reward=reward,
        rewards=rewards,
        turn_rewards=given,
    )


def test_turns_are_the_runs_of_the_mask() -> None:
    assert turns(sample("xx..xxx.x", 0.0, [])) == [(0, 2), (4, 7), (8, 9)]
    assert turns(sample("xxx", 0.0, [])) == [(0, 3)] and turns(sample(".x", 0.0, [])) == [(1, 2)]


@pytest.mark.parametrize(
    ("discount", "expected"),
    # 1 after the first turn, -0.5 after the second, 2 after the third, and 3 of the task's that no turn got
    [(1.0, [5.5, 4.5, 5.0]), (0.5, [1 - 0.25 + 1.25, -0.5 + 2.5, 5.0]), (0.0, [1.0, -0.5, 5.0])],
)
def test_a_turn_has_what_was_given_for_it_and_a_discounted_share_of_what_came_later(
    discount: float, expected: list[float]
) -> None:
    given = [(2, "step", 1.0), (7, "step", -0.5), (9, "answer", 2.0), (9, "of no part", 100.0)]
    found = turn_returns(sample("xx..xxx.x", 5.5, given, step=0.5, answer=2.0, task=3.0), discount)
    assert found == pytest.approx(expected)


def test_advantages_compare_turns_of_the_whole_group() -> None:
    """By hand: returns at 0.5 are [1 + 0.5 * 0, 0], [0 + 0.5 * 2, 2] and [0]."""
    group = [
        sample("xx.x", 1.0, [(2, "r", 1.0)], r=1.0),
        sample("x..xx", 2.0, [(5, "r", 2.0)], r=2.0),
        sample("xxx", 0.0, []),
    ]
    algorithm = composed("task=calculator", **{"algorithm.turn_credit": "returns", "algorithm.turn_discount": 0.5}).algorithm
    returns = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0])
    whitened = (returns - returns.mean()) / (returns.std() + 1e-6)
    one, two, three = compute_advantages(algorithm, [group])
    torch.testing.assert_close(one, whitened[[0, 0, 0, 1]])
    torch.testing.assert_close(two, whitened[[2, 2, 2, 3, 3]])
    torch.testing.assert_close(three, whitened[[4, 4, 4]])


def test_reinforce_pp_counts_the_tokens_of_turns() -> None:
    group = [sample("xx.x", 1.0, [(2, "r", 1.0)], r=1.0), sample("xxx", 0.0, [])]
    overrides = ("task=calculator", "algorithm=reinforce_pp", "algorithm.turn_credit=returns")
    one, two = compute_advantages(composed(*overrides).algorithm, [group])
    tokens = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = ((tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()).float()
    torch.testing.assert_close(torch.cat([one[one.new_tensor([1, 1, 0, 1]).bool()], two]), expected)


def test_samples_of_one_turn_have_the_advantages_that_they_have_without() -> None:
    group = [sample("xxx", reward, []) for reward in (0.0, 1.0, 0.25)]
    with_turns = composed("task=calculator", **{"algorithm.turn_credit": "returns"}).algorithm
    plain = composed("task=calculator").algorithm
    for ours, theirs in zip(compute_advantages(with_turns, [group]), compute_advantages(plain, [group]), strict=True):
        assert torch.equal(ours, theirs)


def test_environments_say_for_which_turn_a_reward_is() -> None:
    (found,) = run(conversation(environment="test_turns.Talker"), ["hello"])
    places = [stop for _, stop in turns(found)]
    assert found.turn_rewards == [(place, "environment", 0.5) for place in places] and len(places) == 3
    found.reward = sum(found.rewards.values())
    assert turn_returns(found, 1.0) == [1.5, 1.0, 0.5]
    prompt = Prompt("p0", "hello", (), "a")
    assert parts.add({"environment": RewardConfig(weight=2.0)}, [(prompt, "", found)]) == []
    assert found.reward == 3.0 and turn_returns(found, 0.0) == [1.0, 1.0, 1.0]


class Charges(Talker):
    """A penalty after the second turn, beside the task's reward."""

    async def step(self, response: str) -> tuple[Any, bool, dict[str, Any]]:
        seen, done, _ = await super().step(response)
        return seen, done, {"penalties": {"words": -0.1}} if self.turns == 2 else {}


def test_penalties_belong_to_their_turn_and_the_tasks_reward_to_the_last() -> None:
    (found,) = run(conversation(environment=f"{HERE}.Charges"), ["hello"])
    found.reward, found.rewards = 0.9, {"task": 1.0, **found.info["penalties"]}
    assert turn_returns(found, 1.0) == pytest.approx([0.9, 0.9, 1.0])
    assert turn_returns(found, 0.0) == pytest.approx([0.0, -0.1, 1.0])


@pytest.mark.parametrize("estimator", ["grpo", "cispo"])
def test_the_torch_trainers_gradient_is_that_of_every_turn(estimator: str) -> None:
    """On policy the gradient is linear in the advantages: two turns of a sample add up, and neither is the other."""
    trainer = _trainer(LossAggregation.token_mean, 24, **{"algorithm.estimator": estimator})
    data = batch(trainer.cfg)
    halves: list[list[torch.Tensor]] = [[], []]
    for row in data.advantages:
        first = torch.arange(len(row)) < len(row) // 2
        halves[0].append(row.where(first, 0.0))
        halves[1].append(-0.5 * row.where(~first, 0.0))
    both = [one + two for one, two in zip(*halves, strict=True)]
    gradients = []
    for advantages in (*halves, both):
        gradients.append(_gradient(trainer, replace(data, advantages=advantages))[0])
        trainer.optimizer.zero_grad()
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-4, atol=1e-6)
    assert min(row.norm() for row in gradients) > 0.05 * gradients[2].norm()


def test_one_response_has_no_turns() -> None:
    (error,) = problems("algorithm.turn_credit=returns")
    assert error.key == "algorithm.turn_credit" and "no turns" in error.problem
