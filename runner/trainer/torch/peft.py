"""The adapters of a run with trainer.lora as a folder in the format of PEFT, from its checkpoint alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from runner import storage
from runner.config.schema import Config
from runner.errors import UserError
from runner.trainer.torch.checkpoint import COUNTERS, METADATA
from runner.weights.files import write_tensors

PREFIX = "base_model.model."  # of PEFT's wrappers around a model


def write(cfg: Config, checkpoint: Path, target: Path) -> tuple[int, int]:
    """(adapters, bytes of their tensors). The folder appears in one rename.

    UserError for a checkpoint without adapters, and for adapters of stacked experts: PEFT lays those out another way.
    """
    try:
        lora = json.loads((checkpoint / COUNTERS).read_text()).get("lora")
        held = load_file(checkpoint / "masters.safetensors") if lora else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read the trainer's checkpoint {checkpoint}: {error}", fix="another step") from error
    if not lora:
        raise UserError(f"{checkpoint} has no adapters", key="format", fix="format=bf16")
    stacked = next((name for name, tensor in held.items() if tensor.dim() != 2), None)
    if stacked is not None:
        problem = f"{stacked} is of stacked experts, which PEFT's format has no place for"
        raise UserError(problem, key="format", fix="format=bf16, the merged weights")
    tensors = {}
    for name, tensor in held.items():
        module, _, kind = name.rpartition(".weight.")
        tensors[f"{PREFIX}{module}.{kind}.weight"] = tensor
    modules = sorted({name.rpartition(".weight.")[0] for name in held})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.model.hf_checkpoint,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    try:
        with storage.new_folder(target) as partial:
            write_tensors(tensors, partial / "adapter_model.safetensors", METADATA)
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", key="target", fix="target=<a folder with space>") from error
    return len(modules), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
