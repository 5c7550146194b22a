"""The draft model of speculative=draft: a folder in HF format with the policy's vocabulary."""

from __future__ import annotations

import torch

from runner.config.schema import Config, ModelConfig
from runner.errors import UserError
from runner.models.build import build_model
from runner.models.draft_folder import KEY, check_whole, draft_model
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.attention import ATTENTION
from runner.rollout.local.model import EngineModel


def load_draft(cfg: Config, dtype: torch.dtype, device: torch.device) -> EngineModel:
    """Raises UserError when the folder is not named, cannot be read, or holds another vocabulary."""
    folder = cfg.speculative.draft_model
    if not folder:
        raise UserError("speculative=draft needs a draft model", key=KEY, fix=f"{KEY}=<folder in HF format>")
    model = draft_model(cfg.model, folder)
    if model.vocab_size != cfg.model.vocab_size:
        raise UserError(
            f"'{folder}' has {model.vocab_size} tokens, model {cfg.model.name} has {cfg.model.vocab_size}",
            key=KEY,
            fix="use a draft model of the same vocabulary, or speculative=ngram",
        )
    check_whole(cfg.model, folder)
    return draft_from_module(model, build_model(model, dtype=dtype, seed=0, device=device, attention=ATTENTION, experts="eager"))


def draft_from_module(model: ModelConfig, module: torch.nn.Module) -> EngineModel:
    """A draft engine over a model that already has its weights; `module` was built with attention=ATTENTION."""
    parameter = next(module.parameters())
    return EngineModel(
        model, PrecisionPlan.with_format(model, TensorFormat.bf16(), ()), parameter.dtype, parameter.device, module
    )
