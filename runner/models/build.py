"""Building transformers models, and the way between on-disk weights and their places in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

from runner.config.schema import ModelConfig
from runner.convert.reading import open_checkpoint, read_weight
from runner.convert.source import Source
from runner.errors import UserError
from runner.models import family_of
from runner.models.family import Family
from runner.models.published import (
    KEY,
    LOADING_ERRORS,
    REACHABLE,
    checkpoint_config,
    config_values,
    copy_tokenizer,
    first_line,
    location,
)
from runner.models.tokenizer import byte_tokenizer, load_tokenizer
from runner.precision.plan import PrecisionPlan
from runner.precision.quantization_config import QUANTIZATION_KEYS, nested_quantization_config

__all__ = [
    "build_model",
    "build_structure",
    "byte_tokenizer",
    "disk_tensors",
    "load_tokenizer",
    "memory_tensors",
    "memory_view",
    "named_weights",
    "save_config",
]


def build_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    experts: str = "grouped_mm",
) -> PreTrainedModel:
    """The transformers model in `dtype` on `device`, in eval mode (no dropout anywhere).

    Without a checkpoint the weights are a random start from `seed`, drawn in fp32 and then rounded, so that every dtype starts
    from the same numbers; a GPU draws its own, which are not a CPU's. `attention` and `experts` name implementations that are
    registered with transformers (attention None: the one that it chooses itself, SDPA where the model has it). The global random
    state is left as it was.
    UserError when the checkpoint cannot be read, or its architecture or tensors are not those of the family's table.
    """
    family, device = family_of(model), torch.device(device)
    auto_class, kernels = _choices(model, family, attention, experts)
    built: Any
    if model.hf_checkpoint is not None:
        built = _from_checkpoint(model, family, auto_class, dtype, kernels)
    elif device.type == "cpu":
        config = checkpoint_config(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = auto_class.from_config(config, dtype=torch.float32, **kernels)
        family.adapt(built)
        built = built.to(dtype)
    else:
        built = _drawn(_unwritten(auto_class, checkpoint_config(model), torch.float32, device, kernels), seed, device)
        family.adapt(built)
        built = built.to(dtype)
    _check_table(model, family, built)
    return built.to(device).eval()


def build_structure(
    model: ModelConfig, *, dtype: torch.dtype, device: torch.device, attention: str | None, experts: str
) -> PreTrainedModel:
    """`build_model` with parameters of unwritten memory, for who loads every weight: nothing is drawn, and no checkpoint read."""
    family = family_of(model)
    auto_class, kernels = _choices(model, family, attention, experts)
    config = checkpoint_config(model)
    if model.hf_checkpoint is None:  # a random start's buffers are rounded with its weights
        built = _unwritten(auto_class, config, torch.float32, device, kernels).to(dtype)
    else:
        built = _unwritten(auto_class, config, dtype, device, kernels)
    family.adapt(built)
    _check_table(model, family, built)
    return built.eval()


def _choices(model: ModelConfig, family: Family, attention: str | None, experts: str) -> tuple[Any, dict[str, str]]:
    """The class that builds the model, and what it is told to compute with."""
    kernels = {} if attention is None else {"attn_implementation": attention}
    if family.moe_layers(model):
        kernels["experts_implementation"] = experts  # transformers refuses the argument for dense models
    return AutoModelForImageTextToText if model.vision else AutoModelForCausalLM, kernels


# A PreTrainedModel is Any where it moves: transformers wraps `to` in a way that type checkers take for another function.
def _unwritten(auto_class: Any, config: Any, dtype: torch.dtype, device: torch.device, kernels: dict[str, str]) -> Any:
    """The modules: parameters of unwritten memory on the device, and buffers as they are computed on the CPU."""
    with no_init_weights():
        built = auto_class.from_config(config, dtype=dtype, **kernels)
    built.tie_weights()  # which goes with the initialization that is left out: a tied lm_head would be memory of its own
    if device.type != "cpu":
        built._apply(lambda tensor: _memory(tensor, device) if isinstance(tensor, torch.nn.Parameter) else tensor.to(device))
    return built


def _memory(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(like, device=device)


def _drawn(built: Any, seed: int, device: torch.device) -> Any:
    """A random start in the place of unwritten parameters, by the device's own generator."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.no_grad():
        torch.manual_seed(seed)
        built.init_weights()
    return built


def _from_checkpoint(
    model: ModelConfig, family: Family, auto_class: Any, dtype: torch.dtype, kernels: dict[str, str]
) -> PreTrainedModel:
    assert model.hf_checkpoint is not None
    source, plan = open_checkpoint(model)
    config = checkpoint_config(model)
    in_stacks = any(parameter.stack for parameter in plan.parameters.values())
    if nested_quantization_config(source.config) is not None or not source.named or in_stacks:
        return _weight_by_weight(model, family, auto_class, config, dtype, kernels, source, plan)
    try:
        built, report = auto_class.from_pretrained(
            location(model.hf_checkpoint),
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **kernels,
        )
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load '{model.hf_checkpoint}': {first_line(error)}", key=KEY, fix=REACHABLE) from error
    # a second look by transformers; the first one, of headers, was open_checkpoint's
    unexpected = [name for name in report["unexpected_keys"] if name in source.tensors]
    for kind, found in (("lacks", report["missing_keys"]), ("has weights that the model does not use:", unexpected)):
        if found:
            raise UserError(
                f"'{model.hf_checkpoint}' {kind} {len(found)} weights, first {min(found)}",
                key=KEY,
                fix="use a complete checkpoint of this architecture; weights are never filled in at random, nor left out",
            )
    return built


def _weight_by_weight(
    model: ModelConfig,
    family: Family,
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    kernels: dict[str, str],
    source: Source,
    plan: PrecisionPlan,
) -> PreTrainedModel:
    """The bf16 model of a quantized checkpoint, dequantized here, whose decoding is tested bit for bit; and of one whose experts
    lie otherwise in memory than transformers has them.

    transformers 5.19 leaves out a scale of NVFP4 experts, and keeps weights of dense models packed.
    """
    try:
        built: PreTrainedModel = _unwritten(auto_class, config, dtype, torch.device("cpu"), kernels)
    except LOADING_ERRORS as error:
        reason = f"transformers builds no model from config.json of '{model.hf_checkpoint}': {first_line(error)}"
        raise UserError(reason, key=KEY, fix="the config.json that belongs to the weights") from error
    family.adapt(built)
    _check_table(model, family, built)
    with torch.no_grad():
        for name, view in disk_tensors(family, model, named_weights(model, built)):
            view.copy_(read_weight(source, plan, name))
    return built


def _without_quantization(values: dict[str, Any]) -> dict[str, Any]:
    """config.json without a word about quantization, in its parts (`text_config`) too."""
    return {
        name: _without_quantization(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in values.items()
        if name not in QUANTIZATION_KEYS
    }


def _check_table(model: ModelConfig, family: Family, built: PreTrainedModel) -> None:
    """UserError when names or shapes in memory differ from the family's table: the config's numbers are then wrong."""
    expected = {parameter.name: tuple(parameter.shape) for parameter in family.parameters(model)}
    found = {name: tuple(view.shape) for name, view in disk_tensors(family, model, named_weights(model, built))}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{model.name}: {name} is {found.get(name, 'absent')} in the model, {expected.get(name, 'absent')} in the config",
                key="model",
                fix="make the architecture numbers of the model group those of the checkpoint's config.json",
            )


def named_weights(model: ModelConfig, built: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(in-memory name, tensor sharing storage) of everything that belongs on disk.

    Parameters, and buffers that are saved (the selection bias of a sigmoid router); not a tied lm_head.
    """
    for name, tensor in built.state_dict().items():
        if not (model.tied_embeddings and name == "lm_head.weight"):
            yield name, tensor


def disk_tensors(
    family: Family, model: ModelConfig, named: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(on-disk name, view) of in-memory tensors: stacked experts come out one by one, as views, nothing is copied.

    Works on whatever lies in the parameters' shapes: weights, fp32 masters, gradients.
    """
    stacked = {parameter.name: parameter.pieces for parameter in family.stacked(model)}
    for name, tensor in named:
        if name not in stacked:
            yield name, tensor
            continue
        for disk_name, expert, start, stop in stacked[name]:
            yield disk_name, tensor if expert is None else tensor[expert, start:stop]


def memory_view(family: Family, model: ModelConfig, memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On-disk name -> writable view into `memory` (in-memory name -> tensor): `views[name].copy_(weight)` loads a weight."""
    return dict(disk_tensors(family, model, memory.items()))


def memory_tensors(family: Family, model: ModelConfig, disk: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(in-memory name, tensor) from on-disk tensors: experts are stacked into new tensors, the rest passes through.

    KeyError naming the weight when a piece of a stacked parameter is missing.
    """
    used: set[str] = set()
    for parameter in family.stacked(model):
        used.update(piece[0] for piece in parameter.pieces)
        first = disk[parameter.pieces[0][0]]
        if parameter.pieces[0][1] is None:
            yield parameter.name, first
            continue
        experts = 1 + max(expert or 0 for _, expert, _, _ in parameter.pieces)
        rows = max(stop for _, _, _, stop in parameter.pieces)
        tensor = torch.empty(experts, rows, *first.shape[1:], dtype=first.dtype, device=first.device)
        for disk_name, expert, start, stop in parameter.pieces:
            tensor[expert, start:stop] = disk[disk_name]
        yield parameter.name, tensor
    for name, tensor in disk.items():
        if name not in used:
            yield name, tensor


def save_config(model: ModelConfig, folder: Path) -> None:
    """Write config.json, without a quantization_config, the tokenizer's files, the checkpoint's generation_config.json (which
    says where a turn ends) and a vision model's preprocessor_config.json: an engine can start from it without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.hf_checkpoint is None:
        checkpoint_config(model).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    else:
        # the checkpoint's quantization; what is written beside this file says its own
        values = _without_quantization(config_values(model))
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        copy_tokenizer(model.hf_checkpoint, folder)
    if model.vision and not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(family_of(model).processor_config(model), indent=1))
