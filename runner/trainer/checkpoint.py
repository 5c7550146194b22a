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
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runner.errors import UserError
from runner.models.build import disk_tensors, save_config
from runner.trainer.mtp import MtpTraining
from runner.weights.files import write_tensors

if TYPE_CHECKING:
    from runner.trainer.torch_trainer import TorchTrainer

METADATA = {"format": "pt"}
FORMAT = 1
MTP = "mtp.safetensors"


def save(trainer: TorchTrainer, folder: Path) -> None:
    """Write into an existing folder; the caller makes it atomic."""
    weights = dict(disk_tensors(trainer.family, trainer.cfg.model, trainer.unquantized_weights().items()))
    _write(weights, folder / "model.safetensors")
    _write({**trainer.optimizer.masters, **trainer._buffers}, folder / "masters.safetensors")
    state = trainer.optimizer.state_tensors()
    state["rng"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(trainer.device)
    _write(state, folder / "optimizer.safetensors")
    if isinstance(trainer.mtp, MtpTraining):
        _write(trainer.mtp.state_tensors(), folder / MTP)
    if trainer._reference is not None:
        _write(trainer._reference, folder / "reference.safetensors")
    counters = {
        "format": FORMAT,
        "version": trainer.version,
        "schedule_step": trainer.schedule_step,
        "nan_in_a_row": trainer.nan.in_a_row,
        "nan_total": trainer.nan.total,
        "master_weights": trainer.optimizer.has_masters,
    }
    (folder / "trainer.json").write_text(json.dumps(counters, indent=1))
    save_config(trainer.cfg.model, folder)


def load(trainer: TorchTrainer, folder: Path) -> None:
    """Restore what `save` wrote: masters, moments, counters; the model weights are then derived from the masters.

    Raises UserError naming the file that is missing or broken, or the weight that does not fit.
    """
    try:
        counters = json.loads((folder / "trainer.json").read_text())
        masters = load_file(folder / "masters.safetensors")
        state = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read the trainer's checkpoint {folder}: {error}", fix="resume from another checkpoint"
        ) from error
    if counters["master_weights"] != trainer.optimizer.has_masters:
        raise UserError(
            f"{folder} was saved with trainer.master_weights={str(counters['master_weights']).lower()}",
            key="trainer.master_weights",
            fix="resume with the same setting",
        )
    rng, rng_cuda = state.pop("rng"), state.pop("rng_cuda", None)
    try:
        _fill({**trainer.optimizer.masters, **trainer._buffers}, masters)
        trainer.optimizer.load_state_tensors(state)
        if isinstance(trainer.mtp, MtpTraining):
            if (folder / MTP).is_file():
                trainer.mtp.load_state_tensors(load_file(folder / MTP))
            else:
                trainer.mtp.adopt_weights()
        if (folder / "reference.safetensors").is_file() and trainer._reference is not None:
            _fill(trainer._reference, load_file(folder / "reference.safetensors"))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder} does not fit this model: {error}", key="model", fix="resume with the same model") from error
    trainer.version = counters["version"]
    trainer.schedule_step = counters["schedule_step"]
    trainer.nan.in_a_row, trainer.nan.total = counters["nan_in_a_row"], counters["nan_total"]
    torch.set_rng_state(rng)
    if rng_cuda is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(rng_cuda, trainer.device)
    trainer._write_weights()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # contiguous copies: views of one buffer are refused as shared memory
    write_tensors({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path, METADATA)


@torch.no_grad()
def _fill(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, target in targets.items():
        if name not in values:
            raise KeyError(f"{name} is missing")
        if values[name].shape != target.shape:
            raise RuntimeError(f"{name} has shape {list(values[name].shape)}, expected {list(target.shape)}")
        target.copy_(values[name])
