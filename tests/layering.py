"""Rooms of runner/ (its folders), their floors, and which arrows between them run back up: `python -m tests.layering`.

An arrow is an import, inside a function or at the top of a module. FLOORS lists the rooms from the ground up: a room may import
what lies below it. What runs back up stands in BACK with its reason, and tests/test_layering.py fails for any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# modules of runner/ itself
GROUND = ("errors", "foreign", "storage", "lock", "scratch", "redaction", "cores", "findings", "data", "provenance")
FLOORS = (
    "config", "models", "models.families", "precision.kernels", "precision.formats", "precision", "routing",
    "algorithms.estimators", "algorithms", "tasks", "tools", "weights", "weights.transports", "config.rules", "convert",
    "cluster", "tracking", "rollout", "turns", "trainer", "trainer.torch", "trainer.megatron", "rollout.local.cpu_kernels",
    "rollout.local", "rollout.sglang.plugin", "rollout.sglang", "cluster.local", "cluster.ray", "planner", "doctor", "run",
    "sweep", "cli", "__main__",
)  # fmt: skip
BACK = {
    ("data", "models"): "the type of an image, for checkers only",
    ("data", "routing"): "a sample's routes may be a reference, for checkers only",
    ("config", "config.rules"): "a composition ends with its rules",
    ("config", "models"): "the families that model.family may name, and the config.json that a local checkpoint has",
    ("config", "precision.formats"): "the formats that a grid may name",
    ("config", "algorithms.estimators"): "the estimators that algorithm.estimator may name",
    ("models", "models.families"): "the table of families",
    ("models", "precision"): "a built model loads the weights of a quantized folder",
    ("models", "convert"): "... through the converter's reader of published folders",
    ("precision.formats", "precision"): "a format's file names the arithmetic of its family, which is older than the files",
    ("precision.kernels", "precision"): "kernels are checked against, and share constants with, the plain arithmetic",
    ("tasks", "tools"): "unit tests of code run in the sandbox of the Python tool",
    ("cluster", "cluster.local"): "the launcher that a config names",
    ("cluster", "cluster.ray"): "... and the other one",
    ("cluster.ray", "planner"): "how large the routes of a step are: a node's object store holds them",
    ("weights.transports", "rollout.sglang"): "the type of the section that p2p's options stand in, for checkers only",
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of runner/, the stubs of foreign packages left out."""
    found = {}
    for path in sorted((root / "runner").rglob("*.py")):
        if "stubs" not in path.parts:
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """(module of runner/, whether at the top of the file and not for type checkers alone) of every import."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            inner = inner or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module:
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                names = []
            for name in names:
                while name and name not in known:
                    name = name.rpartition(".")[0]
                if name:
                    yield name, not inner
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text()), False)


def room_of(module: str, known: dict[str, Path]) -> str:
    """`precision.kernels` of runner.precision.kernels.cpu; the name of a module that lies in runner/ itself."""
    parts = module.split(".")[1:]
    if parts and known[module].name != "__init__.py":
        parts = parts[:-1] or parts
    return ".".join(parts)


def arrows(known: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the modules' names."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, path in known.items():
        for other, _ in imports(path, known):
            rooms = room_of(module, known), room_of(other, known)
            if rooms[0] != rooms[1] and all(rooms):
                found.setdefault(rooms, []).append(f"{module} -> {other}")
    return found


def circles(known: dict[str, Path]) -> list[list[str]]:
    """Modules that import each other at the top of their files."""
    graph = {module: {other for other, top in imports(path, known) if top and other != module} for module, path in known.items()}
    left = dict(graph)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    while free := [module for module in left if not any(module in others for name, others in left.items() if name != module)]:
        for module in free:
            del left[module]
    return [sorted(left)] if left else []


def floor_of(room: str) -> int:
    return 0 if room in GROUND else 1 + FLOORS.index(room)


def back(found: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    return {pair: names for pair, names in found.items() if floor_of(pair[1]) > floor_of(pair[0])}


def main() -> int:
    known = modules()
    found = arrows(known)
    rooms = sorted({room_of(module, known) for module in known} - {""}, key=floor_of)
    print(f"{len(known)} modules, {len(rooms)} rooms, {len(found)} arrows, {len(circles(known))} circles of modules")
    for pair, names in back(found).items():
        print(f"back: {pair[0]} -> {pair[1]} ({len(names)}): {BACK.get(pair, 'NOT ALLOWED')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
