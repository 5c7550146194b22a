"""Where a rank's first weights come from: a random start, or an HF folder in BF16, INT4, FP8 or FP4, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runner.convert.reading import local_folder, read_weight
from runner.convert.source import open_source
from runner.errors import UserError
from runner.models import agreement
from runner.models.build import build_model, disk_tensors, named_weights
from runner.models.family import Family
from runner.precision.plan import PrecisionPlan
from runner.schema import Config

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
    source = open_source(local_folder(model.hf_checkpoint))
    architectures = source.config.get("architectures") or []
    if not set(architectures) & set(family.architectures):
        raise UserError(
            f"'{model.hf_checkpoint}' holds {', '.join(architectures) or 'no named architecture'}; "
            f"family {family.name} reads {', '.join(family.architectures)}",
            key="model.hf_checkpoint",
            fix="choose the model group or the family that matches the checkpoint",
        )
    agreement.check(model, family, source.config)
    plan = PrecisionPlan.from_quantization_config(model, source.config.get("quantization_config"))
    return lambda name: read_weight(source, plan, name), source.config
