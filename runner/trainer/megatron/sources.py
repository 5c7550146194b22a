"""Where a rank's first weights come from: a random start, or an HF folder in BF16, INT4, FP8 or FP4, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runner.convert.jobs import inputs_of
from runner.convert.source import Source, open_shard, open_source
from runner.errors import UserError
from runner.models.build import build_model, disk_tensors, named_weights
from runner.models.family import Family
from runner.precision import formats
from runner.precision.plan import PrecisionPlan
from runner.samples import ExportedTensor
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
    source = open_source(_folder(model.hf_checkpoint))
    architectures = source.config.get("architectures") or []
    if not set(architectures) & set(family.architectures):
        raise UserError(
            f"'{model.hf_checkpoint}' holds {', '.join(architectures) or 'no named architecture'}; "
            f"family {family.name} reads {', '.join(family.architectures)}",
            key="model.hf_checkpoint",
            fix="choose the model group or the family that matches the checkpoint",
        )
    plan = PrecisionPlan.from_quantization_config(model, source.config.get("quantization_config"))
    return lambda name: _read(source, plan, name), source.config


def _folder(checkpoint: str) -> Path:
    """A local folder, or a hub id's snapshot (downloaded where the hub can be reached)."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load '{checkpoint}': {str(error).splitlines()[0]}",
            key="model.hf_checkpoint",
            fix="give a local folder or a hub id that this machine can reach",
        ) from None


def _read(source: Source, plan: PrecisionPlan, name: str) -> torch.Tensor:
    tensor_format = plan.format_of(name)
    stored = inputs_of(source, name, tensor_format)
    if not stored:
        raise UserError(
            f"'{source.folder}' lacks {name}",
            key="model.hf_checkpoint",
            fix="use a complete checkpoint; weights are never filled in at random",
        )
    parts = {}
    for tensor in stored:
        with open_shard(source.folder / tensor.shard) as handle:
            parts[tensor.name] = handle.get_tensor(tensor.name)
    if not tensor_format.quantized or (len(parts) == 1 and name in parts and parts[name].dtype.itemsize > 1):
        return parts[name]
    return formats.decode(ExportedTensor(name, tensor_format.format.name, parts), tensor_format)
