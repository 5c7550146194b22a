"""The doors of the options: what an engine, a trainer or a task is to the rest of the program, told by its own room. Torch-free.

conf/<group>/<name>.yaml names a class of this project as `_target_`. Where that class lies is the option's room, and the room's
`OPTION` is its door: the attribute of the module itself, or of `option.py` inside where the room is a package. Compose, rules,
preflight, planner, doctor and run iterate the doors; nothing is listed by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml

from runner.config import limits, searchpath
from runner.config.schema import Config
from runner.errors import UserError
from runner.findings import Finding

Rule = Callable[[Config], Iterator[UserError]]


@dataclass(frozen=True)
class EngineLayout:
    """How the engines of a rollout lie on the machine, and what one of them holds."""

    engines: int
    ranks: int  # tensor-parallel processes of each engine; 1 for one inside the trainer's process
    ranks_key: str  # the config key that decides `ranks`
    on_gpu: bool
    nodes: int = 1  # that each engine lies on, with equal parts of its ranks
    in_process: bool = False  # computes in the process of the loop
    shares_gpus: bool = False  # other processes on the trainer's GPUs, which share them in turns
    prefill_tokens: int = 0  # of one forward
    cache_tokens: int = 0  # KV cache slots of an engine; 0: the longest sequence, max_concurrency times
    memory_fraction: float | None = None  # rollout.memory_fraction of a GPU is filled with weights and cache; None: as asked
    runtime_bytes: int | None = None  # of a rank beside weights and cache; None: logits and the activations of a layer


@dataclass(frozen=True)
class TrainerLayout:
    """How a trainer holds its model; its parallel sizes are those of cfg.parallelism."""

    in_process: bool  # one process, that of the loop
    fused: bool  # attention and mlp kernels keep no more than their formulas say, and recompute=selective is core attention's
    masters: bool  # fp32 beside the model's weights
    shards_states: bool = False  # masters and Adam states are divided over data-parallel ranks
    padded_vocabulary: int | None = None  # rows of the embedding over all ranks; None: those of the model
    resident_reference: bool = True  # reference weights stay on the device
    keeps_quantized: bool = False  # copies of the weights, in the format that they are multiplied in, lie beside them
    max_restarts: int = 0  # from the last checkpoint after the trainer was lost


@dataclass(frozen=True)
class Need:
    """A package that an option stands on. `problem` and `fix` are what a run says without it; `key` None: the option's own.
    `loads`: a module that a run on GPUs imports beforehand, because kernels that are there may be built for another torch."""

    distribution: str
    module: str
    problem: str
    fix: str
    key: str | None = None
    when: Callable[[Config], bool] = lambda cfg: True
    loads: str | None = None


@dataclass(frozen=True)
class Option:
    """One room's door.

    schema   the dataclass of its section of the config; conf/ lists it as `<name>_schema`
    rules    what cannot go together, asked where the option is chosen, `plan` included
    unbuilt  what can be planned and not run yet, on whatever machine: `plan` notes it, a `run` is refused
    machine  what this machine must have, asked before a `run`: files, devices, memory
    needs    packages, for `run` and `doctor`
    engines, trainer   the layout, for an engine or a trainer
    checks   what `doctor` says of this machine where the option is chosen
    probe    of an engine: the class with which `doctor engine` looks into its kernels
    shows_images       of a task: its prompts have one, so that the model must see
    """

    schema: type
    rules: tuple[Rule, ...] = ()
    unbuilt: tuple[Rule, ...] = ()
    machine: tuple[Rule, ...] = ()
    needs: tuple[Need, ...] = ()
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = ()
    engines: Callable[[Config], EngineLayout] | None = None
    trainer: Callable[[Config], TrainerLayout] | None = None
    probe: str | None = None
    shows_images: bool = False


@dataclass(frozen=True)
class Choice:
    """`<group>=<name>`, as conf/ offers it."""

    group: str
    name: str
    target: str
    option: Option

    def __str__(self) -> str:
        return f"{self.group}={self.name}"


def option_of(section: Any) -> Option:
    """The door of a section of a config, whose `_target_` is one that conf/ names (a rule says where it is not)."""
    return _door(section._target_)


def engine_layout(cfg: Config) -> EngineLayout:
    layout = option_of(cfg.rollout).engines
    assert layout is not None, f"{cfg.rollout._target_} has no layout of engines"
    return layout(cfg)


def trainer_layout(cfg: Config) -> TrainerLayout:
    layout = option_of(cfg.trainer).trainer
    assert layout is not None, f"{cfg.trainer._target_} has no layout of a trainer"
    return layout(cfg)


def shares_gpus(cfg: Config) -> bool:
    """Whether trainer and engines are processes with the same GPUs (colocation.py)."""
    return engine_layout(cfg).shares_gpus


def one_process(cfg: Config) -> bool:
    """Trainer and engine share the loop's process and hold their memory at the same time."""
    return trainer_layout(cfg).in_process and engine_layout(cfg).in_process


def choices() -> list[Choice]:
    """Every option of conf/ with a door, in the order of groups and names. UserError for one whose room is not there."""
    return [Choice(*named, _door(named[2])) for named in _named(tuple(searchpath.trees()))]


def chosen(cfg: Config) -> Iterator[Choice]:
    """The options with a door that a config is made of."""
    for group in groups():
        section = getattr(cfg, group)
        yield Choice(group, section.name, section._target_, option_of(section))


def packages() -> tuple[str, ...]:
    """Distributions that some option stands on, each once."""
    return tuple(dict.fromkeys(need.distribution for choice in choices() for need in choice.option.needs))


@cache
def groups() -> tuple[str, ...]:
    """Groups of the config whose options are classes: those with a `_target_`."""
    types = get_type_hints(Config)
    return tuple(item.name for item in fields(Config) if "_target_" in getattr(types[item.name], "__dataclass_fields__", ()))


def typed_keys() -> dict[str, Any]:
    """Dotted key -> type of every key, those of all options included."""
    for choice in choices():
        assert choice.option  # a schema is known when its room is imported
    return limits.typed_keys(Config)


@cache
def _named(trees: tuple[Path, ...]) -> tuple[tuple[str, str, str], ...]:
    """(group, name, `_target_`) of every option file in `trees` that names a class of this project."""
    found = []
    for group in groups():
        for file in searchpath.files_of(group):
            target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
            if isinstance(target, str) and target.startswith("runner."):
                found.append((group, file.stem, target))
    return tuple(found)


def _door(target: str) -> Option:
    room = target.rpartition(".")[0]
    try:
        module = importlib.import_module(room)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{room}.option")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(room):
            raise
        raise UserError(f"this version of runner does not have {room}", key="_target_", fix="another option") from None
    return cast(Option, module.OPTION)
