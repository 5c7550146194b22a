"""MTP layers on Megatron ranks: every rank of a tensor- and context-parallel group holds them whole and computes the same.

Hidden states are gathered without gradient, so the layers need no parallel form: one layer's work done tp * cp times, beside
a model of dozens. Gradients are summed over data-parallel ranks. The output layer is divided over the vocabulary as always.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch.nn import functional as F

from runner.config.schema import Config
from runner.models import family_of
from runner.trainer import attention
from runner.trainer.megatron.model import DTYPES
from runner.trainer.megatron.packing import Packed
from runner.trainer.megatron.scores import VocabularySoftmax, output_weight
from runner.trainer.megatron.sources import Read
from runner.trainer.megatron.specs import local_rows
from runner.trainer.microbatch import score_tokens
from runner.trainer.mtp import MtpTraining, NoMtp, build_layers, layers_of, trained_online


def build(cfg: Config, model: GPTModel, read: Read, device: torch.device) -> NoMtp | MtpTraining:
    """The layers with the weights that `read` gives, where they are trained. The model must be whole on this rank's stage."""
    if not trained_online(cfg):
        return NoMtp()
    dtype = DTYPES[cfg.precision.base_dtype]
    layers, rotary = build_layers(cfg.model, attention.register(), dtype)
    prefix = layers_of(family_of(cfg.model)).prefix
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.to(device).train()
            for name, parameter in layer.named_parameters():
                parameter.copy_(read(f"{prefix}{index}.{name}"))
    return MtpTraining(
        cfg,
        layers,
        rotary.to(device),
        embed=partial(_embed, model),
        score=partial(_score, cfg, model),
        master_weights=dtype is not torch.float32,
        reduce=lambda tensor: dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group()),
    )


def weights(training: NoMtp | MtpTraining) -> dict[str, torch.Tensor]:
    """HF name -> trained weight, sharing memory with the layers."""
    if not isinstance(training, MtpTraining):
        return {}
    return {f"{training.prefix}{name}": parameter.data for name, parameter in training.optimizer.params.items()}


@torch.no_grad()
def _embed(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """[...] -> [..., H], on every tensor-parallel rank whole."""
    weight = model.embedding.word_embeddings.weight
    group = parallel_state.get_tensor_model_parallel_group()
    local = tokens - group.rank() * weight.shape[0]
    mine = (local >= 0) & (local < weight.shape[0])
    found = F.embedding(local.clamp(0, weight.shape[0] - 1), weight) * mine.unsqueeze(-1)
    dist.all_reduce(found, group=group)  # one rank's row and zeros: exact
    return found


def _score(cfg: Config, model: GPTModel, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N, H], [N] -> logprobs [N]; the gradient of `rows` is summed over the vocabulary's ranks."""
    weight = output_weight(model).detach()
    softmax = VocabularySoftmax(cfg.model.vocab_size, weight.shape[0])
    rows = copy_to_tensor_model_parallel_region(rows)
    return score_tokens(
        rows, lambda x: F.linear(x, weight), targets, 1.0, cfg.trainer.logprob_chunk_tokens, False, softmax
    ).logprobs


@torch.no_grad()
def sample_states(hidden: torch.Tensor, packed: Packed, lengths: list[int], *, sequence_parallel: bool) -> list[torch.Tensor]:
    """This rank's hidden states [S, 1, H] -> [T, H] of every sample of the micro-batch, of `lengths` tokens, on every rank."""
    rows = hidden.detach().squeeze(1)
    if sequence_parallel:
        rows = _gathered(rows, parallel_state.get_tensor_model_parallel_group())
    context = parallel_state.get_context_parallel_group()
    if context.size() > 1:
        bounds = packed.sequences.cu_seqlens_q_padded.tolist()
        padded = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        places = torch.cat([local_rows(padded, rank, context.size()) for rank in range(context.size())])
        rows = _gathered(rows, context)[places.argsort().to(rows.device)]
    return [rows[start : start + length] for start, length in zip(packed.starts, lengths, strict=True)]


def _gathered(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[S, H] of every rank of a group, end to end."""
    whole = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
    return whole
