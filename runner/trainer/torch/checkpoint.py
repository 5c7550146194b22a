"""What the torch trainer writes into a checkpoint folder, and reads back bit for bit. safetensors and JSON, no pickle.

model.safetensors      bf16(master) under HF on-disk names, never the quantized weights
masters.safetensors    fp32 masters (or the trained weights, without masters) under in-memory names
optimizer.safetensors  Adam moments, step counts and torch's random state
mtp.safetensors        masters and moments of MTP layers that are trained online
reference.safetensors  the frozen reference policy, where there is a KL term
trainer.json           counters
config.json, tokenizer files: with model.safetensors a checkpoint that transformers and engines load

With trainer.lora there is no model.safetensors, masters.safetensors and reference.safetensors hold adapters (fp32), and
trainer.json says what they belong to: rank, alpha, roles, and a digest of the weights that they were trained beside.
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


def other_adapters(folder: Path, ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> UserError:
    """The problem of a checkpoint whose `lora` of trainer.json is not ours."""
    problem, key, fix = f"{folder} was saved without adapters", "trainer.lora.rank", "trainer.lora.rank=0"
    if theirs is not None:
        differs = [name for name in theirs if ours is None or theirs[name] != ours[name]]
        problem = f"the adapters of {folder} have {', '.join(f'{name} {theirs[name]}' for name in differs if name != 'base')}"
        fix = "resume with the same trainer.lora"
        if differs == ["base"]:
            problem, key = f"the adapters of {folder} were trained beside other weights", "model.hf_checkpoint"
            fix = "resume with the same checkpoint, and where there is none with the same seed"
    return UserError(problem, key=key, fix=fix)


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
