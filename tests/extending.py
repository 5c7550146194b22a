"""docs/extending.md as files: what its fenced blocks hold, section by section."""

from __future__ import annotations

import re
import shutil
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"


@dataclass
class Section:
    """`files`: path -> text of each block that begins with its path as a comment. `edits`: path -> (lines, lines in their place).
    `commands`: lines of the blocks for a shell."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    edits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def touched(self) -> list[str]:
        """What adding such a thing touches, its tests aside."""
        return [path for path in [*self.files, *self.edits] if not path.startswith("tests/")]


def sections() -> dict[str, Section]:
    """Title -> section. Raises ValueError for a block that nobody would run."""
    found: dict[str, Section] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        section = found.setdefault(part.partition("\n")[0], Section(part.partition("\n")[0]))
        for kind, body in re.findall(r"^```(\S*)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL):
            path = re.match(r"# (\S+\.(?:py|yaml))\n", body)
            if kind in ("python", "yaml") and path:
                section.files[path[1]] = body[path.end() :]
            elif kind == "diff" and path:
                lines = body[path.end() :].splitlines()
                section.edits[path[1]] = [(old[1:], new[1:]) for old, new in zip(lines[::2], lines[1::2], strict=True)]
            elif kind == "sh":
                section.commands += body.splitlines()
            else:
                raise ValueError(f"{section.title}: a block of {kind or 'no kind'} that names no file: {body[:60]!r}")
    return found


def write(tree: Path) -> None:
    """A copy of the tree with everything that the page adds. Raises ValueError for a file that is there already, and for a line
    to be changed that is not."""
    for folder in ("runner", "conf", "recipes", "tests"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy2(ROOT / "pyproject.toml", tree)
    for section in sections().values():
        for path, text in section.files.items():
            if (tree / path).exists():
                raise ValueError(f"{path} of {PAGE.name} is there already")
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        for path, edits in section.edits.items():
            text = (tree / path).read_text()
            for old, new in edits:
                if text.count(f"{old}\n") != 1:
                    raise ValueError(f"{path} has no line {old!r}")
                text = text.replace(f"{old}\n", f"{new}\n")
            (tree / path).write_text(text)


def module(path: str) -> types.ModuleType:
    """A file of the page, imported under its name: for tests that go on with one of its examples in their own process."""
    (text,) = (section.files[path] for section in sections().values() if path in section.files)
    name = path.removesuffix(".py").replace("/", ".")
    if name not in sys.modules:
        made = types.ModuleType(name)
        sys.modules[name] = made
        exec(compile(text, path, "exec"), made.__dict__)
    return sys.modules[name]
