"""Checkpoint folders as trainers start from them: checked from headers, then read weight by weight, dequantized."""

from __future__ import annotations

from pathlib import Path

import torch

from runner.config.schema import ModelConfig
from runner.convert.source import Source, of_model, open_shard, open_source, read
from runner.convert.stored import check, check_scales, inputs_of, is_plain
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models.config_file import check_model
from runner.precision import codec
from runner.precision.plan import PrecisionPlan
from runner.precision.quantization_config import nested_quantization_config

KEY = "model.hf_checkpoint"


def open_checkpoint(model: ModelConfig, key: str = KEY) -> tuple[Source, PrecisionPlan]:
    """(the folder of `model.hf_checkpoint`, the plan that its quantization_config gives). Nothing but headers has been read, and
    a tied lm_head.

    `key`: the option that named the folder.
    UserError when it cannot be read, holds another architecture or other sizes than `model`, or tensors that its config.json
    does not explain.
    """
    assert model.hf_checkpoint is not None
    source, _ = of_model(open_source(local_folder(model.hf_checkpoint), key), model)
    check_model(model, source.config, source.folder)
    plan = PrecisionPlan.from_quantization_config(model, nested_quantization_config(source.config))
    check(source, plan, key)
    return source, plan


def read_weight(source: Source, plan: PrecisionPlan, name: str) -> torch.Tensor:
    """One on-disk weight, or a bias or buffer, on the CPU; `plan` is the source's own, and `stored.check` found no problem. What
    is stored in bf16 keeps its dtype, also where the plan calls it quantized. UserError when it cannot be decoded."""
    tensor_format = plan.format_of(name)
    stored = inputs_of(source, name, tensor_format)
    parts = {}
    for tensor in stored:
        with open_shard(source.folder / tensor.shard) as handle:
            parts[tensor.name] = read(handle, tensor)
    if is_plain(stored, name):
        return parts[name]
    check_scales(name, parts, KEY)
    decoded = codec.decode(ExportedTensor(name, tensor_format.format, parts), tensor_format)
    if tuple(decoded.shape) != plan.parameters[name].shape or not torch.isfinite(decoded).all():
        found = f"holds {tuple(decoded.shape)} weights" if decoded.isfinite().all() else "holds values that are not finite"
        raise UserError(f"{name} in '{source.folder}' {found}", key=KEY, fix="the checkpoint is damaged; download it again")
    return decoded


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
