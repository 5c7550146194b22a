"""The small files of a published checkpoint, read as data. Code that lies beside them (`auto_map`) is never imported or run:
models are built from the family's own class, tokenizers from files of ids and texts."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils.hub import cached_file

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import family_of
from runner.precision.quantization_config import QUANTIZATION_KEYS

KEY = "model.hf_checkpoint"
# what transformers makes of a file with values that it does not expect
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)
REACHABLE = "give a local folder or a hub id that this machine can reach"
TOKENIZER_CONFIG = "tokenizer_config.json"
# what belongs to a tokenizer, its chat template and the ends of its turns; code is found through tokenizer_config.json
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")  # of images


def location(checkpoint: str) -> str:
    """What transformers takes: it does not know `~`."""
    return str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint


def file_of(checkpoint: str, name: str) -> Path | None:
    """One file of a local folder or of a hub repository (fetched where the hub can be reached); None where it has none."""
    found = cached_file(
        location(checkpoint),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def config_values(model: ModelConfig) -> dict[str, Any]:
    """The checkpoint's config.json in the words of transformers' own class: without `auto_map`, `model_type` the class's.

    UserError when it cannot be read or describes a model of another family.
    """
    checkpoint, family = str(model.hf_checkpoint), family_of(model)
    family.register()
    try:
        values, _ = PreTrainedConfig.get_config_dict(location(checkpoint))
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load '{checkpoint}': {first_line(error)}", key=KEY, fix=REACHABLE) from error
    architectures, model_type = values.get("architectures") or [], values.get("model_type") or family.model_types[0]
    if not set(architectures) & set(family.architectures) or model_type not in family.model_types:
        raise UserError(
            f"'{checkpoint}' holds {', '.join(architectures) or 'no named architecture'} of model_type {model_type!r}; "
            f"family {family.name} reads {', '.join(family.architectures)} of {' or '.join(map(repr, family.model_types))}",
            key=KEY,
            fix="choose the model group or the family that matches the checkpoint",
        )
    values = {name: value for name, value in values.items() if name not in ("auto_map", "_commit_hash")}
    if "num_nextn_predict_layers" in values:  # DeepSeek-V3 has one that nothing here computes
        values["num_nextn_predict_layers"] = model.num_mtp_layers
    parts = values.get("text_config")
    if not model.vision and isinstance(parts, dict) and set(parts) <= set(QUANTIZATION_KEYS):
        del values["text_config"]  # where some programs put the quantization of a model of one part; transformers fails on it
    return _without_nulls(values | {"model_type": family.model_types[0]})


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json without the nulls that transformers' class refuses: it has defaults for keys that are absent, and config.json
    is read so everywhere else here."""
    values = copy.deepcopy(values)
    while True:
        try:
            CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
            return values
        except StrictDataclassError as error:
            field = re.search(r"field '(\w+)'", str(error))
            holders = [holder for holder in (values, values.get("text_config")) if isinstance(holder, dict)]
            null = next((holder for holder in holders if field and holder.get(field[1], field) is None), None)
            if field is None or null is None:
                return values
            del null[field[1]]
        except LOADING_ERRORS:  # which `checkpoint_config` reports
            return values


def checkpoint_config(model: ModelConfig) -> PreTrainedConfig:
    """`config_values` as transformers' config object; of a model without a checkpoint, that of the model group."""
    family = family_of(model)
    family.register()
    values = family.hf_config(model) if model.hf_checkpoint is None else config_values(model)
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except LOADING_ERRORS as error:
        raise UserError(
            f"config.json of '{model.hf_checkpoint}' is not one of {family.name}: {first_line(error)}",
            key=KEY,
            fix="the config.json that belongs to the weights",
        ) from error
    return config


def tokenizer_settings(checkpoint: str) -> dict[str, Any]:
    """tokenizer_config.json; {} where there is none. ValueError for something else than a JSON object."""
    path = file_of(checkpoint, TOKENIZER_CONFIG)
    if path is None:
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{TOKENIZER_CONFIG} does not hold a JSON object")
    return settings


def tokenizer_code(settings: dict[str, Any]) -> str | None:
    """The file with a tokenizer's own class, "tokenization_kimi.py", as tokenizer_config.json names it."""
    auto_map = settings.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    classes = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    module = classes[0].rpartition("--")[2].partition(".")[0] if classes else ""
    return f"{module}.py" if re.fullmatch(r"\w+", module) else None


def copy_tokenizer(checkpoint: str, folder: Path) -> None:
    """Put the files of the tokenizer and the image processor into `folder` as published; code among them is copied, never run."""
    names = [*TOKENIZER_FILES, *PROCESSOR_FILES]
    if code := tokenizer_code(tokenizer_settings(checkpoint)):
        names.append(code)
    while names:
        name = names.pop()
        path = file_of(checkpoint, name)
        if path is None:
            continue
        if not _stays_inside(path):
            raise UserError(f"{path} is a link that leads out of its folder", key=KEY, fix="put the file itself there")
        shutil.copyfile(path, folder / name)
        if path.suffix == ".py":  # what it imports from beside itself
            beside = re.findall(r"^\s*from \.(\w+) import", path.read_text(errors="replace"), re.MULTILINE)
            names += [f"{module}.py" for module in beside if not (folder / f"{module}.py").exists()]


def _stays_inside(path: Path) -> bool:
    """Whether a file is where it seems to be: a link may lead to another file of its folder, or into a hub cache."""
    found = path.resolve()
    in_a_cache = found.parent.name == "blobs" and found.parent.parent.name.startswith("models--")
    return in_a_cache or found.is_relative_to(path.parent.resolve())


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
