"""config.json of a folder that somebody else made: read within limits, or refused in words. Torch-free."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import FAMILIES, agreement, family_of
from runner.models.common import short
from runner.models.family import Family

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20  # published ones have 1 KB to 200 KB; those that list every unquantized module, a few MB


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file; UserError for one that is missing, larger than `limit` bytes, nested too deeply or no object."""
    if not path.is_file():  # a pipe or a device would never end
        raise UserError(f"{path} is missing", fix="give a folder in Hugging Face layout")
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path} has {size} bytes; at most {limit} are read", fix="download it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="make it readable") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", fix="download it again") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", fix="download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", fix="download it again")
    return value


def architectures_of(config: dict[str, Any], where: object) -> list[str]:
    """`architectures`, [] where it is absent or null."""
    found = config.get("architectures")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: `architectures` is {short(found)}; it must be a list of names")
    return found


def family_fields(config: dict[str, Any], folder: Path) -> tuple[Family, dict[str, Any]]:
    """(the family that reads this config.json, the ModelConfig fields in it); UserError for an architecture that no family reads
    and for numbers that are missing, of another type or beyond all limits."""
    where = folder / CONFIG
    family = recognized(config, where)
    try:
        return family, agreement.fields_of(family, config, folder.name)
    except ValueError as error:
        raise UserError(str(error), fix=f"correct {where}, or download it again") from None


def recognized(config: dict[str, Any], where: object) -> Family:
    """The family whose model_type and architecture a config.json names; UserError with the nearest one where there is none."""
    architectures, model_type = architectures_of(config, where), config.get("model_type")
    family = next((f for f in FAMILIES.values() if set(f.architectures) & set(architectures)), None)
    if family is not None and model_type in (None, *family.model_types):
        return family
    found = f"{short(', '.join(architectures)) or 'none'}, of model_type {short(model_type)}"
    types = {name: f for f in FAMILIES.values() for name in f.model_types}
    of_type = types.get(model_type) if isinstance(model_type, str) else None
    if of_type is not None:
        raise UserError(
            f"unknown architecture in {where}: {found}", fix=f"family {of_type.name} reads {', '.join(of_type.architectures)}"
        )
    near = difflib.get_close_matches(str(model_type), types, n=1)
    nearest = f"the nearest is {near[0]} ({', '.join(types[near[0]].architectures)}); " if near else ""
    raise UserError(f"unknown architecture in {where}: {found}", fix=f"{nearest}known model_types: {', '.join(types)}")


def check_model(model: ModelConfig, config: dict[str, Any], folder: Path) -> None:
    """UserError unless a folder's config.json is of the model's family and says the same about it."""
    key, family = "model.hf_checkpoint", family_of(model)
    architectures = architectures_of(config, folder / CONFIG)
    if not set(architectures) & set(family.architectures):
        raise UserError(
            f"'{model.hf_checkpoint}' holds {short(', '.join(architectures)) or 'no named architecture'}; "
            f"family {family.name} reads {', '.join(family.architectures)}",
            key=key,
            fix="choose the model group or the family that matches the checkpoint",
        )
    agreement.check(model, family, config)
