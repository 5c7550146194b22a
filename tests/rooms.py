"""Where names of options stand outside their rooms: `python -m tests.rooms`.

An option is known by its door (runner/config/option.py) or its registry; whoever else writes its name in a string, or imports
its modules, knows something of it that its own room should say. ALLOWED lists who may, with the reason, and tests/test_rooms.py
fails for any other. Not looked at: comments, docstrings, and what is given to a user as `fix=`, which tests/test_rooms.py
compares with conf/ instead.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.algorithms import estimators
from runner.config import option as options
from runner.models import FAMILIES
from runner.precision import formats
from runner.weights.transports import TRANSPORTS
from tests import layering

# (who, kind of option) -> why. Whoever: a module or a package of runner/.
ALLOWED = {
    ("cli", "*"): "examples of what to type",
    ("rollout.local", "format"): "which formats the engine has kernels for",
    ("rollout.sglang", "format"): "which formats SGLang has kernels for, and under which names",
    ("rollout.sglang", "family"): "which families were seen in its servers",
    ("trainer.megatron", "format"): "which formats Megatron has an implementation of its own for",
    ("trainer.megatron", "family"): "which families it was tested with",
    ("trainer.megatron", "trainer"): "what the torch trainer left is told by its files; FP8 on CPU ranks is the torch trainer's",
    ("doctor.gpu", "*"): "it measures the GPU kernels that there are, of one format each, and runs them as both trainers do",
    ("config.rules.parallelism", "*"): "advice for several nodes: another trainer, another engine",
    ("config.preflight", "*"): "advice for this machine",
    ("cluster", "trainer"): "a launcher starts Megatron's ranks, here or on nodes",
    ("cluster", "rollout"): "a launcher starts SGLang's servers, here or on nodes",
    ("weights.transports.p2p", "rollout"): "the type of the section that its options stand in, for checkers only",
    ("algorithms.estimators.reinforce_pp", "estimator"): "GRPO's loss with other advantages",
    ("trainer.megatron.process", "tracking"): "the package, which Megatron imports where it can: ranks log nothing",
    ("turns.tools", "task"): "a tool of the same name",
    ("tools.calculator", "task"): "a tool of the same name",
}
# Names that are words of their own, too: they count where the group stands before them, as in `trainer=torch`.
WORDS = {
    "none": "nothing; an option of other groups, too",
    "torch": "the package",
    "local": "this machine",
    "bf16": "the dtype",
    "tensor": "a tensor",
    "distributed": "torch.distributed",
    "ranks": "processes of a trainer",
}


@dataclass(frozen=True)
class Name:
    kind: str  # a group of the config, or format, family, estimator, transport
    name: str
    room: str  # without `runner.`


@dataclass(frozen=True)
class Place:
    module: str  # without `runner.`
    line: int
    name: Name
    text: str


def names() -> list[Name]:
    """Of every option that has a room."""
    found = [Name(choice.group, choice.name, choice.target.rpartition(".")[0]) for choice in options.choices()]
    found += [Name("format", name, "runner.precision") for name in formats.names()]
    found += [Name("estimator", name, f"runner.algorithms.estimators.{name}") for name in estimators.names()]
    found += [Name("family", name, "runner.models") for name in FAMILIES]
    found += [Name("transport", name, "runner.weights") for name in TRANSPORTS]
    return [Name(each.kind, each.name, each.room.removeprefix("runner.")) for each in found]


def outside(known: dict[str, Path]) -> Iterator[Place]:
    """Every place outside its room where the name of an option stands in a string, or its module is imported."""
    every = names()
    by_name: dict[str, list[Name]] = {}
    for each in every:
        by_name.setdefault(each.name, []).append(each)
    for module, path in known.items():
        own = module.removeprefix("runner.")
        for line, each, text in (*_strings(path, by_name), *_imports(path, known, every)):
            if not _inside(own, each.room):
                yield Place(own, line, each, text)


def allowed(place: Place) -> tuple[str, str] | None:
    """The key of ALLOWED that lets it stand."""
    for who, kind in ALLOWED:
        if kind in ("*", place.name.kind) and _inside(place.module, who):
            return who, kind
    return None


def advice(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, group, option) of every `group=option` in a string, what is given as `fix=` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for group, option in re.findall(r"(?<![\w.])(\w+)=([a-z]\w+)(?![\w.{])", node.value):
                yield node.lineno, group, option


def _inside(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def _strings(path: Path, by_name: dict[str, list[Name]]) -> Iterator[tuple[int, Name, str]]:
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg == "fix":
            skipped |= {id(child) for child in ast.walk(node.value)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in skipped:
            continue
        if node.value not in WORDS:
            yield from ((node.lineno, each, node.value) for each in by_name.get(node.value, ()))
        for group, option in re.findall(r"(?<![\w.])(\w+)=(\w+)", node.value):
            yield from ((node.lineno, each, node.value) for each in by_name.get(option, ()) if each.kind == group)


def _imports(path: Path, known: dict[str, Path], every: list[Name]) -> Iterator[tuple[int, Name, str]]:
    rooms = {each.room: each for each in every if each.kind in (*options.groups(), "estimator")}
    rooms |= {f"precision.formats.{each.name}": each for each in every if each.kind == "format"}
    rooms |= {f"models.families.{each.name}": each for each in every if each.kind == "family"}
    for other, _ in layering.imports(path, known):
        for room, each in rooms.items():
            if _inside(other.removeprefix("runner."), room):
                yield 1, each, f"import {other}"


def main() -> int:
    for place in outside(layering.modules()):
        why = ALLOWED.get(allowed(place) or ("", ""), "NOT ALLOWED")
        print(f"{place.module}:{place.line}: {place.name.kind} {place.name.name} in {place.text[:60]!r}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
