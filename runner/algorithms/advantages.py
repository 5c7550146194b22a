"""From rewards to advantages: one number per sample, or per turn, spread over its response tokens. The estimators have the
formulas.

GRPO            A_i = (r_i - mean(group)) / (std(group) + 1e-6)      DeepSeekMath, arXiv 2402.03300, section 4.1.2
GRPO, no std    A_i = r_i - mean(group)                              Dr. GRPO, arXiv 2503.20783, section 3
REINFORCE++     A_i = (r_i - mean(tokens)) / sqrt(var(tokens) + 1e-8) arXiv 2501.03262v9, REINFORCE++ without a baseline
GSPO, CISPO     the GRPO advantage (arXiv 2507.18071, section 4.1; arXiv 2506.13585, section 3.1)

With algorithm.turn_credit=returns a turn k of a conversation has a reward of its own, the discounted sum of those from it on:

    R_k = r_k + discount r_(k+1) + discount^2 r_(k+2) + ...           Kevin, arXiv 2507.11948: per-turn rewards, sum, 0.4

and the estimators above compare turns as they compare samples: all turns of all samples of a prompt are one group, as Kevin
trains on each turn as a sample. Unlike Kevin's, turns stay in the conversation in which they were said, and are one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runner.algorithms.estimators import estimator_of
from runner.config.choices import TurnCredit
from runner.config.schema import AlgorithmConfig
from runner.data import Sample
from runner.errors import UserError


def compute_advantages(algorithm: AlgorithmConfig, groups: Sequence[Sequence[Sample]]) -> list[torch.Tensor]:
    """Advantages [R] fp32 per sample, in the order of the groups laid end to end.

    `groups` holds the samples of one prompt each; every sample needs a finite reward (UserError otherwise). Tokens
    outside the loss mask get the sample's advantage too: the mask is applied in the loss.
    """
    if algorithm.turn_credit != TurnCredit.none:
        return _of_turns(algorithm, groups)
    rewards = [torch.tensor([_reward(sample) for sample in group], dtype=torch.float32) for group in groups]
    counts = [torch.tensor([int(sample.loss_mask.sum()) for sample in group]) for group in groups]
    values = estimator_of(algorithm.estimator).advantages(algorithm, rewards, counts)
    return [
        torch.full((sample.response_length,), float(value))
        for group, row in zip(groups, values, strict=True)
        for sample, value in zip(group, row, strict=True)
    ]


def _reward(sample: Sample) -> float:
    if sample.reward is None or sample.reward != sample.reward or abs(sample.reward) == float("inf"):
        raise UserError(
            f"sample {sample.sample_index} of prompt {sample.prompt_id} has reward {sample.reward}",
            fix="the task's reward function must return a finite number for every sample",
        )
    return float(sample.reward)


def _of_turns(algorithm: AlgorithmConfig, groups: Sequence[Sequence[Sample]]) -> list[torch.Tensor]:
    """As `compute_advantages`, a turn in the place of a sample; tokens between two turns have the advantage of the one before."""
    found = []
    rewards, counts = [], []
    for group in groups:
        returns = [turn_returns(sample, algorithm.turn_discount) for sample in group]
        rewards.append(torch.tensor([value for row in returns for value in row], dtype=torch.float32))
        counts.append(torch.tensor([stop - start for sample in group for start, stop in turns(sample)]))
    values = estimator_of(algorithm.estimator).advantages(algorithm, rewards, counts)
    for group, row in zip(groups, values, strict=True):
        rest = iter(row.tolist())
        for sample in group:
            advantages = torch.zeros(sample.response_length)
            for start, _ in turns(sample):
                advantages[start:] = next(rest)
            found.append(advantages)
    return found


def turns(sample: Sample) -> list[tuple[int, int]]:
    """[start, stop) of the model's turns among the response tokens: what lies between them is outside the loss mask."""
    mask = torch.cat([torch.tensor([False]), sample.loss_mask.cpu().bool(), torch.tensor([False])]).int()
    change = mask.diff()
    return list(zip((change == 1).nonzero()[:, 0].tolist(), (change == -1).nonzero()[:, 0].tolist(), strict=True))


def turn_returns(sample: Sample, discount: float) -> list[float]:
    """Of every turn: what was given for it and, each turn further on weighing `discount` times as much, for those after it.

    What belongs to no turn (the task's own reward, parts that are added to it) belongs to the last. UserError as
    `compute_advantages`.
    """
    own = turns(sample)
    given = [0.0] * len(own)
    rest = _reward(sample)
    for place, name, value in sample.turn_rewards:
        if name not in sample.rewards or not own:
            continue
        turn = max(0, sum(start < place for start, _ in own) - 1)
        given[turn] += value
        rest -= value
    total = 0.0
    found = []
    for number, value in reversed(list(enumerate(given))):
        total = value + (rest if number == len(own) - 1 else 0.0) + discount * total
        found.append(total)
    return found[::-1]
