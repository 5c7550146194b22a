"""Where a rank's first weights come from: a random start, or an HF folder in BF16, INT4, FP8 or FP4, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runner.config.schema import Config
from runner.convert.reading import open_checkpoint, read_weight
from runner.models.agreement import window_problem
from runner.models.build import build_model, disk_tensors, named_weights
from runner.models.family import Family
from runner.trainer.megatron.rules import WINDOWS

Read = Callable[[str], torch.Tensor]  # HF name -> weight [out, in], dequantized, on the CPU


def open_weights(cfg: Config, family: Family) -> tuple[Read, dict[str, Any]]:
    """(reader of single weights, the checkpoint's config.json, or the family's for a random start).

    A random start draws what trainer=torch draws from the same seed, in fp32, rounded to the base dtype.
    """
    model = cfg.model
    if model.hf_checkpoint is None:
        built = build_model(model, dtype=torch.float32, seed=cfg.seed)
        weights = dict(disk_tensors(family, model, named_weights(model, built)))
        return weights.__getitem__, family.hf_config(model)
    source, plan = open_checkpoint(model)
    if family.name not in WINDOWS and (error := window_problem(model, family, source.config)):
        raise error
    return lambda name: read_weight(source, plan, name), source.config
