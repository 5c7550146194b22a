"""Single weights of a checkpoint folder, dequantized: what trainers start from."""

from __future__ import annotations

from pathlib import Path

import torch

from runner.convert.jobs import inputs_of
from runner.convert.source import Source, open_shard
from runner.errors import UserError
from runner.precision import formats
from runner.precision.plan import PrecisionPlan
from runner.samples import ExportedTensor


def read_weight(source: Source, plan: PrecisionPlan, name: str) -> torch.Tensor:
    """One on-disk weight, or a bias or buffer, on the CPU; `plan` is the source's own. What is stored in bf16 keeps its dtype,
    also where the plan calls it quantized. UserError when it is not there."""
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


def local_folder(checkpoint: str) -> Path:
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
