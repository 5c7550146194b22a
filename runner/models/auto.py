"""model=auto: the architecture that a checkpoint's own config.json describes. Torch-free, and config.json alone is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.errors import UserError
from runner.models.config_file import CONFIG, family_fields, read_json

KEY = "model.hf_checkpoint"
GROUP_SIZES = (128, 64, 32)  # of INT4 weights, the usual one first


def architecture(checkpoint: str | None) -> dict[str, Any]:
    """Every field of the model group but `hf_checkpoint`, as the config.json of a folder or hub id says.

    UserError when there is none, and when no family reads it.
    """
    if checkpoint is None:
        raise UserError(
            "model=auto takes the architecture from a checkpoint, and none is named",
            key=KEY,
            fix=f"{KEY}=<a folder with config.json, or a hub id>",
        )
    path = _config_of(checkpoint)
    name = Path(checkpoint).expanduser().resolve().name
    try:
        family, fields = family_fields(read_json(path), path.parent)
    except UserError as error:
        raise UserError(error.problem, key=error.key or KEY, fix=error.fix) from None
    group = {"int4_group_size": GROUP_SIZES[0], "toy_twin": name, "name": name, "hf_checkpoint": checkpoint}
    model = ModelConfig(**fields | group)
    role = Role.routed_expert if model.num_experts else Role.dense_mlp
    columns = {p.shape[1] for p in family.parameters(model) if p.role is role and len(p.shape) == 2}
    model.int4_group_size = dividing_group(columns) or GROUP_SIZES[0]
    return {field: value for field, value in vars(model).items() if field != "hf_checkpoint"}


def dividing_group(columns: Iterable[int]) -> int | None:
    """The largest group size that divides the input dimensions of all quantized matrices; None: none does."""
    widths = set(columns)
    return next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), None)


def is_path(checkpoint: str) -> bool:
    """Whether a name is of this machine, as against a hub id `owner/name`."""
    return checkpoint.startswith(("/", "./", "../", "~")) or checkpoint.count("/") != 1


def _config_of(checkpoint: str) -> Path:
    """config.json of a local folder, or of a hub id: from the hub's cache, else fetched."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder / CONFIG
    if is_path(checkpoint):
        raise UserError(f"there is no folder {checkpoint}", key=KEY, fix=f"{KEY}=<a folder with config.json, or a hub id>")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, CONFIG))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {CONFIG} of '{checkpoint}': {(str(error).splitlines() or [type(error).__name__])[0]}",
            key=KEY,
            fix="give a local folder, or a hub id that this machine can reach",
        ) from None
