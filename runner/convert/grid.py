"""Which format and which groups a conversion writes: what the user named, else what fits the source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from runner.config.schema import Config, ModelConfig, PrecisionConfig
from runner.config.searchpath import CONFIG_DIR, files_of, shown
from runner.errors import UserError
from runner.models import family_of
from runner.models.auto import GROUP_SIZES, dividing_group
from runner.precision.formats import all_formats
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat

NAMED_BY = ("precision.group_size", "precision.rollout.group_size", "model", "model.int4_group_size", "recipe")
IDENTITY = ("family", "num_layers", "hidden_size", "ffn_size", "num_experts", "expert_ffn_size")  # what tells models apart


def target_format(cfg: Config) -> TensorFormat:
    """What the quantized weights become: convert.format, or else the rollout format of `precision`."""
    grid = cfg.precision.rollout
    if cfg.convert.format is None:
        return TensorFormat.of(grid)
    for spec in all_formats():
        if cfg.convert.format in spec.variants:
            return spec.grid(grid.group_size, grid.convention, spec.variants[cfg.convert.format])
    known = [name for spec in all_formats() for name in spec.variants]
    raise UserError(f"unknown format {cfg.convert.format!r}", key="convert.format", fix=f"one of {', '.join(known)}")


def with_groups_of(
    tensor_format: TensorFormat, model: ModelConfig, precision: PrecisionConfig, overrides: list[str]
) -> tuple[TensorFormat, str | None]:
    """(the format with the group size for this model, one line that says which and why; None where nothing was chosen).

    The config's own default belongs to the run's model, which the model of a folder is not. So a group size that
    `overrides` do not name comes from the model of conf/model that the folder's config.json describes, or is the largest
    of 128, 64 and 32 that divides every quantized matrix.
    """
    if not tensor_format.spec.group_sizes:
        return tensor_format, None
    if {override.partition("=")[0].lstrip("+") for override in overrides} & set(NAMED_BY):
        return tensor_format, None
    size, why = default_group_size(model, precision)
    strategy = replace(tensor_format, group_size=size, strategy="group")
    return strategy, f"{tensor_format.format} in groups of {size}: {why}; precision.group_size=N chooses another"


def default_group_size(model: ModelConfig, precision: PrecisionConfig) -> tuple[int, str]:
    """(weights per group, why)."""
    base = yaml.safe_load((CONFIG_DIR / "shared" / "model.yaml").read_text())
    for path in files_of("model"):
        known: dict[str, Any] = base | yaml.safe_load(path.read_text())
        if all(known.get(key) == getattr(model, key) for key in IDENTITY):
            return known["int4_group_size"], f"what {shown(path)} has"
    roles = quantized_roles(model, precision)
    columns = {p.shape[1] for p in family_of(model).parameters(model) if p.role in roles and len(p.shape) == 2}
    if size := dividing_group(columns):
        return size, "the largest of 128, 64 and 32 that divides every quantized matrix"
    return GROUP_SIZES[0], "the usual size"  # which the plan refuses, naming the weight
