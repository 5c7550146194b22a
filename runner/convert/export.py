"""`python -m runner export run=RUN target=DIR [format=bf16|int4|...] [step=N] [key=value ...]`: a run's weights as an HF folder.

The source is always bf16(master), never the quantized weights of the trainer: a BF16 export loses nothing, and an INT4 export
has the integers and scales that the run's engine computed with. A torch run's checkpoint holds bf16(master) under HF names
and is read directly; a Megatron run's is loaded by Megatron ranks in the run's layout, or in another one that the command
names (`parallelism=single` on one machine).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from runner import checkpoint
from runner.convert.jobs import reader_notes
from runner.convert.source import CONFIG, INDEX, SINGLE
from runner.errors import UserError
from runner.precision import codec
from runner.precision.formats import all_formats
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from runner.samples import ExportedTensor
from runner.schema import Config

USAGE = "python -m runner export run=<run folder> target=<folder to make> format=bf16|int4"
SHARD_BYTES = 4 << 30
OWN_KEYS = ("run", "target", "format", "step")
FORMATS = tuple(spec.name for spec in all_formats() if not spec.converter_only)


@dataclass(frozen=True)
class Request:
    """A parsed command. `step` None: the newest complete checkpoint; `format` None: the rollout format of the run."""

    run: str
    target: Path
    format: str | None
    step: int | None
    overrides: list[str]


def main(argv: list[str]) -> int:
    """Write the folder and print what it holds; returns 0. Raises UserError for a run, step or target that does not fit."""
    from runner import compose
    from runner.cli.overrides import expand_home, given, override
    from runner.folder import find_run

    request = parse(argv)
    if request.target.exists():
        raise UserError(f"{request.target} is already there", key="target", fix="target=<a folder to be made>")
    outputs_dir = given(request.overrides, "outputs_dir") or compose.default_outputs_dir()
    run = find_run(expand_home(request.run), expand_home(outputs_dir))
    cfg = compose.load([*request.overrides, override("resume", str(run))]).config
    folder = _checkpoint(run, request.step) / "trainer"
    plan = plan_of(cfg, request.format)
    started = time.perf_counter()
    size = write(cfg, plan, _weights(cfg, folder), request.target)
    seconds = time.perf_counter() - started
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{request.target}: {plan.summary()}, from {folder.parent.name} of {run}", markup=False)
    for note in reader_notes(plan):
        console.print(f"note: {note}", markup=False)
    console.print(f"{size / 1e6:.1f} MB in {seconds:.1f} s")
    return 0


def parse(argv: list[str]) -> Request:
    """Own keys and overrides of the run's config. UserError for a word without `=` and for missing or unknown values."""
    own: dict[str, str] = {}
    overrides = []
    for item in argv:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not key=value", fix=USAGE)
        if key in OWN_KEYS:
            own[key] = value
        else:
            overrides.append(item)
    for key in ("run", "target"):
        if not own.get(key):
            raise UserError(f"export needs {key}=", key=key, fix=USAGE)
    if own.get("format", FORMATS[0]) not in FORMATS:
        raise UserError(f"unknown format {own['format']!r}", key="format", fix=f"format={' or '.join(FORMATS)}")
    if not own.get("step", "0").isdigit():
        raise UserError(f"{own['step']!r} is not a step", key="step", fix="step=40")
    step = int(own["step"]) if "step" in own else None
    return Request(own["run"], Path(own["target"]).expanduser(), own.get("format"), step, overrides)


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
        with safe_open(folder / SINGLE, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                yield name, handle.get_tensor(name)
        return
    from hydra.utils import get_class

    trainer = get_class(cfg.trainer._target_)(cfg)
    try:
        trainer.load(folder)
        for exported in trainer.export("bf16"):
            yield from exported.parts.items()
    finally:
        trainer.close()


def write(cfg: Config, plan: PrecisionPlan, weights: Iterable[tuple[str, torch.Tensor]], target: Path) -> int:
    """Encode and write a folder that transformers and engines load; returns its weights' bytes. It appears in one rename.

    Holds one shard of 4 GiB in memory. Raises UserError when a weight of the family's table did not come.
    """
    from runner.models.build import save_config

    partial = target.with_name(f".{target.name}.partial.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shards = _Shards(partial)
        missing = set(plan.parameters)
        for exported in codec.encode_all(weights, plan):
            missing.discard(exported.name)
            shards.add(exported)
        if missing:
            raise UserError(f"{len(missing)} weights are not in the checkpoint, first {min(missing)}", key="run")
        size = shards.finish()
        save_config(cfg.model, partial)
        _add_quantization_config(plan, partial / CONFIG)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", key="target", fix="target=<a folder with space>") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size


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

    def add(self, exported: ExportedTensor) -> None:
        num_bytes = sum(part.numel() * part.element_size() for part in exported.parts.values())
        if self._held and self._held_bytes + num_bytes > SHARD_BYTES:
            self._write()
        self._held |= {name: part.contiguous() for name, part in exported.parts.items()}
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
