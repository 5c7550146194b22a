"""Folders of draft models (speculative.draft_model): read as every checkpoint is, held against their own config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from runner.config.schema import Config, ModelConfig
from runner.convert.reading import open_checkpoint
from runner.convert.source import ROTARY, open_source
from runner.convert.stored import UNQUANTIZED_DTYPES
from runner.errors import UserError
from runner.models import FAMILIES
from runner.models.config_file import CONFIG, architectures_of, family_fields, read_json
from runner.precision.plan import shorten

KEY = "speculative.draft_model"
# EAGLE (arXiv 2401.15077) as published for LlamaForCausalLMEagle and Qwen2ForCausalLMEagle, with and without `model.`
EAGLE_TOP = re.compile(r"(model\.)?(embed_tokens|fc|lm_head|norm)\.(weight|bias)")
EAGLE_LAYER = re.compile(
    r"(model\.)?layers\.(\d+)\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|input_layernorm|post_attention_layernorm|hidden_norm)\.(weight|bias)"
)


def draft_model(policy: ModelConfig, folder: str) -> ModelConfig:
    """The model of a draft's folder, with what `policy` says about the run; UserError for a family that is not read here."""
    path = Path(folder).expanduser()
    try:
        _, fields = family_fields(read_json(path / CONFIG), path)
    except UserError as error:
        raise UserError(error.problem, key=KEY, fix=f"use a draft model of a family that runner reads ({error.fix})") from None
    return replace(policy, **fields, hf_checkpoint=folder)


def check_folder(cfg: Config) -> None:
    """What an engine that reads the draft's folder by itself would pass over. A hub id is the engine's matter."""
    folder, method = cfg.speculative.draft_model, cfg.speculative.method
    if folder and Path(folder).expanduser().is_dir() and method in ("draft", "eagle"):
        check_whole(cfg.model, folder) if method == "draft" else check_eagle(folder)


def check_whole(policy: ModelConfig, folder: str) -> None:
    """UserError where a draft that is a language model holds anything that its config.json does not explain. One of a family
    that is not read here is its engine's matter."""
    config = read_json(Path(folder).expanduser() / CONFIG)
    known = {name for family in FAMILIES.values() for name in family.architectures}
    if known & set(architectures_of(config, folder)):
        open_checkpoint(draft_model(policy, folder), KEY)


def check_eagle(folder: str) -> None:
    """UserError where an EAGLE head's folder holds tensors that no such head has: SGLang passes over them with a warning."""
    source = open_source(Path(folder).expanduser(), KEY)
    layers = source.config.get("num_hidden_layers", 1)
    wrong = sorted(_not_of_a_head(source.tensors, layers if isinstance(layers, int) else 1))
    if wrong:
        raise UserError(
            f"{source.folder} has weights that an EAGLE head does not use: {len(wrong)} weights, first {wrong[0]}",
            key=KEY,
            fix="use a complete EAGLE head, whose config.json belongs to it",
        )
    quantized = sorted(name for name, stored in source.tensors.items() if stored.dtype not in UNQUANTIZED_DTYPES)
    if quantized:
        raise UserError(
            f"{source.folder} holds quantized weights, which EAGLE heads are not read in: {shorten(quantized)}",
            key=KEY,
            fix="use an EAGLE head in bf16",
        )


def _not_of_a_head(names: Iterable[str], layers: int) -> Iterator[str]:
    for name in names:
        layer = EAGLE_LAYER.fullmatch(name)
        if not (EAGLE_TOP.fullmatch(name) or ROTARY.search(name) or (layer and int(layer[2]) < layers)):
            yield name
