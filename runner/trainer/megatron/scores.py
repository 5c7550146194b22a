"""Logprobs where the vocabulary is divided over tensor-parallel ranks and the tokens over context-parallel ranks.

Shape legend: N response tokens, V' vocabulary rows of this rank, S tokens of this rank's sequence shard, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from runner.trainer.megatron.packing import Packed
from runner.trainer.microbatch import TokenScores, score_tokens


class VocabularySoftmax:
    """fp32 logits [N, V'] of this rank's rows -> (logprobs [N] of the targets, entropies [N] in nats), equal on every tp rank.

    Three all-reduces of [N] numbers each; no rank ever holds a row of the whole vocabulary.
    """

    def __init__(self, vocab_size: int, local_rows: int) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        self.group = group
        self.first = group.rank() * local_rows
        self.valid = min(max(vocab_size - self.first, 0), local_rows)  # rows behind are padding

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.valid < logits.shape[1]:
            padding = torch.arange(logits.shape[1], device=logits.device) >= self.valid
            logits = logits.masked_fill(padding, float("-inf"))
        highest = logits.detach().amax(dim=1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        shifted = logits - highest.unsqueeze(1)
        exponents = shifted.exp()
        total = reduce_from_tensor_model_parallel_region(exponents.sum(dim=1))
        column = targets - self.first
        mine = (column >= 0) & (column < logits.shape[1])
        chosen = shifted.gather(1, column.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        chosen = reduce_from_tensor_model_parallel_region(torch.where(mine, chosen, 0.0))
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            # exp(-inf) * -inf is nan at padding columns
            weighted = (exponents * shifted.masked_fill(exponents == 0, 0.0)).sum(dim=1)
            entropy = total.log() - reduce_from_tensor_model_parallel_region(weighted) / total
        return chosen - total.log(), entropy


class _SumOverContext(torch.autograd.Function):
    """All-reduce over context-parallel ranks; the gradient stays, since every rank has the whole loss."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        dist.all_reduce(rows, group=parallel_state.get_context_parallel_group())
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def output_weight(model: GPTModel) -> torch.Tensor:
    """The output layer's rows [V', H] of this rank; the embedding's where they are tied."""
    tied = model.share_embeddings_and_output_weights
    weight: torch.Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight


def response_scores(
    model: GPTModel, hidden: torch.Tensor, packed: Packed, *, vocab_size: int, temperature: float, chunk: int, entropy_grad: bool
) -> TokenScores:
    """Hidden states [S, 1, H] behind the last norm -> scores of its N response tokens, equal on every tp and cp rank.

    `chunk` rows of fp32 logits [chunk, V'] exist at one time. The gathered hidden states' gradient is summed over
    tensor-parallel ranks here, so the output layer itself needs no communication.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    weight = output_weight(model)
    softmax = VocabularySoftmax(vocab_size, weight.shape[0])
    rows = hidden.squeeze(1).index_select(0, packed.local_positions)
    scores = score_tokens(
        rows,
        lambda x: torch.nn.functional.linear(x, weight),
        packed.local_targets,
        temperature,
        chunk,
        entropy_grad,
        softmax,
    )
    if parallel_state.get_context_parallel_world_size() == 1:
        return scores
    count = len(packed.micro.targets)
    whole = [torch.zeros(count, device=x.device).index_put((packed.local_order,), x) for x in (scores.logprobs, scores.entropy)]
    return TokenScores(*(_SumOverContext.apply(x) for x in whole))
