"""How token losses become one number: what a token weighs against the others, and what the sum is divided by.

    token_mean                     sum over all tokens / number of tokens                    DAPO, arXiv 2503.14476, section 3.3
    sequence_mean                  mean over sequences of the sum over their tokens          verl's seq-mean-token-sum
    sequence_mean_of_token_means   mean over sequences of the mean over their tokens         GRPO, arXiv 2402.03300, equation 3
    constant_length                sum over all tokens / (sequences * longest response)      Dr. GRPO, arXiv 2503.20783, section 3

Tokens are those inside the loss masks, sequences those with at least one, both of a whole optimizer step. The weights are
computed once from all of its samples, before it is divided into micro-batches, packed sequences and ranks: a micro-batch's loss
is a sum over its own tokens, and the sums of all of them add up to the step's loss, whatever the division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runner.config.schema import LossAggregation


@dataclass(frozen=True)
class LossWeights:
    """Of one optimizer step.

    rows         [R] fp32 of each sample: a token's weight, 0 outside the loss mask
    normalizer   what the weighted sum over all tokens is divided by
    tokens       how many tokens count, at least 1
    """

    rows: list[torch.Tensor]
    normalizer: float
    tokens: float


def loss_weights(aggregation: LossAggregation, masks: Sequence[torch.Tensor], max_response_tokens: int) -> LossWeights:
    """The weights of samples with loss masks [R] bool; `max_response_tokens` is the constant of constant_length.

    Where no token counts, all weights are 0 and the normalizer is that of one token.
    """
    counts = [int(mask.sum()) for mask in masks]
    tokens, sequences = max(float(sum(counts)), 1.0), max(float(sum(count > 0 for count in counts)), 1.0)
    rows = [mask.to(torch.float32) for mask in masks]
    match aggregation:
        case LossAggregation.token_mean:
            return LossWeights(rows, tokens, tokens)
        case LossAggregation.sequence_mean:
            return LossWeights(rows, sequences, tokens)
        case LossAggregation.sequence_mean_of_token_means:
            rows = [row / max(count, 1) for row, count in zip(rows, counts, strict=True)]
            return LossWeights(rows, sequences, tokens)
        case LossAggregation.constant_length:
            return LossWeights(rows, sequences * max_response_tokens, tokens)
    raise ValueError(f"loss_aggregation is {aggregation!r}; it must be one of {', '.join(LossAggregation.__members__)}")
