"""What a rank gets of a batch: the samples that it computes, and what it must know of all others together.

Whoever sees the whole batch divides it (`steps`, `lessons`); a rank is sent its own part and never holds another's samples.

Shape legend: T tokens of a sample, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runner.algorithms.aggregation import LossWeights
from runner.config.schema import Config
from runner.data import Batch
from runner.models.images import Images
from runner.trainer import mtp, policy_step
from runner.trainer.mtp import Sequences


@dataclass(frozen=True)
class Share:
    """Which samples one data-parallel rank computes.

    indices        where they stand among all samples
    micro_batches  [micro-batch] -> places in `indices`, where ranks must agree on how many there are; None: a trainer of one
                   rank divides its samples itself
    """

    indices: list[int]
    micro_batches: list[list[int]] | None = None


Divide = Callable[[Sequence[int]], list[Share]]  # T of every sample -> the share of each data-parallel rank


@dataclass(frozen=True)
class Step:
    """One optimizer step as a rank sees it.

    batch        its samples
    share        where they stand in the rollout
    weights      rows [R] of its samples; normalizer and tokens are those of all samples of the step
    predictions  of MTP layers, over all samples of the step
    """

    batch: Batch
    share: Share
    weights: LossWeights
    predictions: int


@dataclass(frozen=True)
class Lesson:
    """One supervised step as a rank sees it: its (tokens [T], prompt length) and images.

    response_tokens, predictions  over all samples of the step
    """

    sequences: Sequences
    images: Sequence[Images]
    share: Share
    response_tokens: int
    predictions: int


def alone(lengths: Sequence[int]) -> list[Share]:
    """`Divide` of a trainer that has one rank."""
    return [Share(list(range(len(lengths))))]


def steps(cfg: Config, batch: Batch, divide: Divide = alone) -> list[list[Step]]:
    """[data-parallel rank][optimizer step] of one rollout."""
    updates = policy_step.split_updates(len(batch), cfg.algorithm.updates_per_rollout)
    divided = [_step(cfg, batch, indices, divide) for indices in updates]
    return [list(of_rank) for of_rank in zip(*divided, strict=True)]


def _step(cfg: Config, batch: Batch, indices: list[int], divide: Divide) -> list[Step]:
    part = batch.select(indices)
    weights, predictions = policy_step.loss_weights(cfg, part), mtp.predictions(cfg, *mtp.sequences_of(part))

    def of(share: Share) -> Step:
        rows = [weights.rows[place] for place in share.indices]
        there = replace(share, indices=[indices[place] for place in share.indices])
        return Step(part.select(share.indices), there, replace(weights, rows=rows), predictions)

    return [of(share) for share in divide([len(sample.tokens) for sample in part.samples])]


def lessons(cfg: Config, sequences: Sequences, images: Sequence[Images] | None = None, divide: Divide = alone) -> list[Lesson]:
    """[data-parallel rank] of one supervised step."""
    tokens = sum(len(row) - prompt for row, prompt in sequences)
    predictions = mtp.predictions(cfg, sequences, mtp.all_tokens(sequences))
    shown = images or [()] * len(sequences)

    def of(share: Share) -> Lesson:
        own = [sequences[place] for place in share.indices]
        return Lesson(own, [shown[place] for place in share.indices], share, tokens, predictions)

    return [of(share) for share in divide([len(row) for row, _ in sequences])]
