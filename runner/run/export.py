"""A run's weights as an HF folder.

The source is always bf16(master), never the quantized weights of the trainer: a BF16 export loses nothing, and an INT4 export
has the integers and scales that the run's engine computed with. A torch run's checkpoint holds bf16(master) under HF names
and is read directly, or adapters (trainer.lora), which are merged with their base; a Megatron run's is loaded by Megatron ranks
in the run's layout, or in another one that the command names (`parallelism=single` on one machine).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from hydra.utils import get_class
from rich.console import Console
from safetensors.torch import save_file

from runner import storage
from runner.config.schema import Config
from runner.convert.jobs import reader_notes
from runner.convert.source import INDEX, SINGLE, of_model, open_shard, open_source, read
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models import stacks
from runner.models.config_file import CONFIG
from runner.precision import codec
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from runner.run import checkpoint
from runner.trainer.adapters import PEFT

SHARD_BYTES = 4 << 30


def export(cfg: Config, run: Path, target: Path, *, format: str | None, step: int | None) -> None:
    """Write the folder and print what it holds. `step` None: the newest complete checkpoint; `format` None: the rollout format
    of the run, `peft`: its adapters alone. Raises UserError for a step or target that does not fit."""
    folder = _checkpoint(run, step) / "trainer"
    console = Console(soft_wrap=True, highlight=False)
    if format == PEFT:
        write_adapters = getattr(get_class(cfg.trainer._target_), "write_adapters", None)
        if write_adapters is None:
            raise UserError(f"trainer={cfg.trainer.name} has no adapters", key="format", fix="format=bf16")
        count, size = write_adapters(cfg, folder, target)
        console.print(f"{target}: {count} adapters from {folder.parent.name} of {run}, {size / 1e6:.1f} MB", markup=False)
        return
    plan = plan_of(cfg, format)
    started = time.perf_counter()
    size = write(cfg, plan, _weights(cfg, folder), target)
    seconds = time.perf_counter() - started
    console.print(f"{target}: {plan.summary()}, from {folder.parent.name} of {run}", markup=False)
    for note in reader_notes(plan):
        console.print(f"note: {note}", markup=False)
    console.print(f"{size / 1e6:.1f} MB in {seconds:.1f} s")


def _checkpoint(run: Path, step: int | None) -> Path:
    if step is None:
        return checkpoint.latest(run)
    folder = run / "checkpoints" / f"step_{step:06d}"
    if folder not in checkpoint.complete(run):
        there = ", ".join(str(int(path.name.removeprefix("step_"))) for path in checkpoint.complete(run)) or "none"
        raise UserError(f"{run} has no complete checkpoint of step {step}; there are: {there}", key="step", fix="one of these")
    problems = checkpoint.verify(folder)
    if problems:
        raise UserError(f"{folder} is damaged: {problems[0]}", key="step", fix="another step")
    return folder


def plan_of(cfg: Config, format: str | None) -> PrecisionPlan:
    """The plan of the exported folder: the run's group size, convention and roles with the wanted format."""
    grid = cfg.precision.rollout
    tensor_format = TensorFormat.named(format or grid.format, grid.group_size, grid.convention)
    return PrecisionPlan.with_format(cfg.model, tensor_format, quantized_roles(cfg.model, cfg.precision))


def _weights(cfg: Config, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, bf16(master)) of every weight in a trainer's checkpoint folder."""
    if (folder / SINGLE).is_file():
        source, _ = of_model(open_source(folder, "run"), cfg.model)
        with open_shard(folder / SINGLE) as handle:
            for name, stored in source.tensors.items():
                yield name, read(handle, stored)
        return
    trainer = get_class(cfg.trainer._target_)(cfg)
    try:
        trainer.load(folder)
        for exported in trainer.export("bf16"):
            yield from exported.parts.items()
    finally:
        trainer.close()


def write(cfg: Config, plan: PrecisionPlan, weights: Iterable[tuple[str, torch.Tensor]], target: Path) -> int:
    """Encode and write a folder that transformers and engines load; returns its weights' bytes. It appears in one rename.

    Holds one shard of 4 GiB in memory, and stacks of experts until they are complete. Raises UserError when a weight of the
    family's table did not come.
    """
    from runner.models.build import save_config

    try:
        with storage.new_folder(target) as partial:
            shards = _Shards(partial)
            missing = set(plan.parameters)
            for parts in _as_stored(codec.encode_all(weights, plan), plan, missing):
                shards.add(parts)
            if missing:
                raise UserError(f"{len(missing)} weights are not in the checkpoint, first {min(missing)}", key="run")
            size = shards.finish()
            save_config(cfg.model, partial)
            _add_quantization_config(plan, partial / CONFIG)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", key="target", fix="target=<a folder with space>") from error
    return size


def _as_stored(exported: Iterable[ExportedTensor], plan: PrecisionPlan, missing: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors as the folder holds them; what came is no longer `missing`."""

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        for item in exported:
            missing.discard(item.name)
            yield item.parts

    return stacks.laid(parts(), plan.parameters) if plan.in_stacks else parts()


def _add_quantization_config(plan: PrecisionPlan, path: Path) -> None:
    wanted = plan.quantization_config()
    if wanted is None:
        return
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": wanted}, indent=2))


class _Shards:
    """safetensors files of at most SHARD_BYTES, and their index when there is more than one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[list[str]] = []
        self.size = 0
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        """Tensors that stay together."""
        num_bytes = sum(part.numel() * part.element_size() for part in parts.values())
        if self._held and self._held_bytes + num_bytes > SHARD_BYTES:
            self._write()
        self._held |= {name: part.contiguous() for name, part in parts.items()}
        self._held_bytes += num_bytes
        self.size += num_bytes

    def _write(self) -> None:
        # copies: views of one buffer are refused as shared memory
        tensors = {name: tensor.clone() for name, tensor in sorted(self._held.items())}
        save_file(tensors, self.folder / f"part-{len(self.files):05d}.safetensors", {"format": "pt"})
        self.files.append(list(tensors))
        self._held, self._held_bytes = {}, 0

    def finish(self) -> int:
        """Names that say how many files there are; returns the bytes of all tensors."""
        if self._held:
            self._write()
        count, weight_map = len(self.files), dict[str, str]()
        for index, names in enumerate(self.files):
            final = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{index:05d}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            text = json.dumps({"metadata": {"total_size": self.size}, "weight_map": weight_map}, indent=2)
            (self.folder / INDEX).write_text(text)
        return self.size
