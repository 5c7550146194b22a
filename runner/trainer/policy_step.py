"""The loss of one micro-batch and the metrics of one rollout; shared by trainers, whatever runs the forward.

Shape legend: N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runner.algorithms import aggregation, correction, losses
from runner.algorithms.aggregation import LossWeights
from runner.algorithms.estimators import inside
from runner.config.schema import AlgorithmConfig, Config, LossAggregation
from runner.data import Batch
from runner.errors import Failure
from runner.trainer.microbatch import MicroBatch


@dataclass
class Sums:
    """Sums over counted tokens, kept on the device until `means`: one synchronization per step."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: torch.Tensor | float = 0.0

    def add(self, mask: torch.Tensor, **rows: torch.Tensor) -> None:
        for name, row in rows.items():
            total = torch.where(mask, row.detach().to(torch.float32), 0.0).sum()
            self.values[name] = self.values[name] + total if name in self.values else total
        self.tokens = self.tokens + mask.sum()

    def means(self) -> dict[str, float]:
        count = max(float(self.tokens), 1.0)
        return {f"train/{name}": float(value) / count for name, value in self.values.items()}


@dataclass(frozen=True)
class TokenRows:
    """What the loss of a micro-batch needs besides its own logprobs, all [N]; ref_logprobs None without a KL term.

    `weights` are those of `LossWeights`: what a token's loss counts against those of the step's other tokens.
    """

    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    rollout_logprobs: torch.Tensor
    sample_ids: torch.Tensor
    num_samples: int
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch, micro: MicroBatch, weights: LossWeights) -> TokenRows:
        """The rows of the samples that a micro-batch of `batch` holds; `weights` are those of the samples of `batch`."""

        def gather(rows: list[torch.Tensor] | None) -> torch.Tensor | None:
            return None if rows is None else micro.gather(rows)

        return cls(
            advantages=micro.gather(batch.advantages),
            mask=micro.gather([sample.loss_mask for sample in batch.samples]),
            weights=micro.gather(weights.rows),
            rollout_logprobs=micro.gather([sample.rollout_logprobs for sample in batch.samples]),
            sample_ids=micro.sample_ids,
            num_samples=len(micro.indices),
            old_logprobs=gather(batch.old_logprobs),
            ref_logprobs=gather(batch.ref_logprobs),
        )


def loss_weights(cfg: Config, batch: Batch) -> LossWeights:
    """What every token of an optimizer step weighs in its loss; `batch` holds all of the step's samples."""
    kind = cfg.algorithm.loss_aggregation
    longest = cfg.rollout.sampling.max_response_tokens if kind is LossAggregation.constant_length else 0
    return aggregation.loss_weights(kind, [sample.loss_mask for sample in batch.samples], longest)


def micro_batch_loss(
    algorithm: AlgorithmConfig, logprobs: torch.Tensor, entropy: torch.Tensor, rows: TokenRows, weights: LossWeights, sums: Sums
) -> torch.Tensor:
    """Scalar loss: sum over counted tokens of weight * [w * policy loss + kl_coef * KL - entropy_coef * H] / normalizer.

    Weights and normalizer are those of the whole optimizer step, so micro-batch losses add up to the step's.
    old_logprobs None: this is the first update from these samples, and the old policy is the current one; its logprobs
    are then those of this very forward, detached. Same weights, same routes, same kernels: the ratio is exactly 1.

    `sums` gets token means, except for train/loss and train/pg_loss: those are weighted as the loss is.
    """
    mask = rows.mask
    logprobs, entropy = inside(mask, logprobs), inside(mask, entropy)
    old = logprobs.detach() if rows.old_logprobs is None else inside(mask, rows.old_logprobs)
    policy = losses.policy_loss(algorithm, logprobs, old, rows.advantages, mask, rows.sample_ids, rows.num_samples)
    correct = correction.correction_weights(algorithm, old, rows.rollout_logprobs, mask, rows.sample_ids, rows.num_samples)
    token_loss = policy.loss * correct.weights
    shown = weights.tokens / weights.normalizer  # `sums` are divided by the tokens; 1 for a mean over tokens
    sums.add(
        mask,
        pg_loss=token_loss * rows.weights * shown,
        pg_clipfrac=policy.clipped,
        ppo_kl=old - logprobs,
        entropy_loss=entropy,
        tis=correct.weights,
        tis_clipfrac=correct.changed,
    )
    if rows.ref_logprobs is not None:
        kl = losses.kl_estimate(algorithm.kl_estimator, logprobs, inside(mask, rows.ref_logprobs))
        sums.values["kl_loss"] = sums.values.get("kl_loss", torch.zeros((), device=kl.device)) + kl.detach()[mask].sum()
        token_loss = token_loss + algorithm.kl_coef * kl
    if algorithm.entropy_coef:
        token_loss = token_loss - algorithm.entropy_coef * entropy
    total = (token_loss * rows.weights).sum() / weights.normalizer
    sums.values["loss"] = sums.values.get("loss", torch.zeros((), device=total.device)) + total.detach() * weights.tokens
    return total


def split_updates(num_samples: int, updates: int) -> list[list[int]]:
    """Sample indices of each optimizer step: contiguous and even, so that a prompt's samples stay together."""
    bounds = [round(num_samples * i / updates) for i in range(updates + 1)]
    return [list(range(start, stop)) for start, stop in zip(bounds[:-1], bounds[1:], strict=True) if stop > start]


class NanGuard:
    """Counts optimizer steps that were skipped because something was not finite."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.total = 0

    def finite(self) -> None:
        self.in_a_row = 0

    def skipped(self, cause: str) -> None:
        """Raises Failure naming the cause at the last allowed step in a row."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.max_in_a_row:
            raise Failure(
                f"{self.in_a_row} optimizer steps in a row were not finite; the last one: {cause}",
                key="trainer.max_nan_steps",
                fix="lower trainer.optimizer.lr, and look at train/grad_norm before this step",
            )
