"""What the torch trainer writes into a checkpoint folder, and reads back bit for bit. safetensors and JSON, no pickle.

model.safetensors      bf16(master) under HF on-disk names, never the quantized weights
masters.safetensors    fp32 masters (or the trained weights, without masters) under in-memory names
optimizer.safetensors  Adam moments, step counts and torch's random state
mtp.safetensors        masters and moments of MTP layers that are trained online
reference.safetensors  the frozen reference policy, where there is a KL term
trainer.json           counters
config.json, tokenizer files: with model.safetensors a checkpoint that transformers and engines load
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models.build import save_config
from runner.weights.files import write_tensors

METADATA = {"format": "pt"}
FORMAT = 1
COUNTERS = "trainer.json"
NEEDED, OPTIONAL = ("masters", "optimizer"), ("mtp", "reference")  # what `load` reads; `model` follows from the masters


@dataclass(frozen=True)
class State:
    """A trainer at one moment: file name without suffix -> tensor name -> tensor (which may share memory with the trainer),
    and the counters of trainer.json."""

    tensors: dict[str, dict[str, torch.Tensor]]
    counters: dict[str, Any]


def save(state: State, model: ModelConfig, folder: Path) -> None:
    """Write into an existing folder; the caller makes it atomic."""
    for name, tensors in state.tensors.items():
        # contiguous copies: views of one buffer are refused as shared memory
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        write_tensors(copies, folder / f"{name}.safetensors", METADATA)
    (folder / COUNTERS).write_text(json.dumps({"format": FORMAT, **state.counters}, indent=1))
    save_config(model, folder)


def load(folder: Path) -> State:
    """What `save` wrote, but for the model's weights. Raises UserError naming the file that is missing or broken."""
    try:
        counters = json.loads((folder / COUNTERS).read_text())
        names = [*NEEDED, *(name for name in OPTIONAL if (folder / f"{name}.safetensors").is_file())]
        return State({name: load_file(folder / f"{name}.safetensors") for name in names}, counters)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read the trainer's checkpoint {folder}: {error}", fix="resume from another checkpoint"
        ) from error


@torch.no_grad()
def fill(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy every value into its target; KeyError or RuntimeError naming what is missing, left over or of another shape."""
    if unused := sorted(values.keys() - targets.keys()):
        raise RuntimeError(f"it has weights that the model does not use: {len(unused)} weights, first {unused[0]}")
    for name, target in targets.items():
        if name not in values:
            raise KeyError(f"{name} is missing")
        if values[name].shape != target.shape:
            raise RuntimeError(f"{name} has shape {list(values[name].shape)}, expected {list(target.shape)}")
        target.copy_(values[name])
