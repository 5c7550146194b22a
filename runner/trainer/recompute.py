"""Activation recomputation: forget activations in the forward and compute them again in the backward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from runner.config.choices import Recompute


def install_recompute(model: PreTrainedModel, kind: Recompute) -> None:
    """none; full: every decoder layer; selective: only the mlp (dense or experts) of every layer, the largest activations.

    Router replay and fake quantization live in module hooks, so a recomputed forward does what the first one did.
    """
    if kind == Recompute.none:
        return
    if kind == Recompute.full:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            _checkpointed(module)


def _checkpointed(module: nn.Module) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    module.forward = forward
