"""The pages of docs/ and README as blocks: what tests/test_docs.py runs, and what a title says is not run here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"extending.md": "tests/test_extending.py", "turns.md": "tests/test_turns_docs.py"}  # run every block of theirs
NOT_RUN = ("needs ", "after ", "once, ", "long: ")  # how the title of a block begins that is not run
PRINTS = "prints "  # ... of one that ends with 1 or 2, as the text after it shows
QUICK = ("--cfg", "--help", "--version", "--dry-run")
SMALL = [
    "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=4", "warm_start.max_steps=2",
    "warm_start.check_interval_steps=2", "evaluation.interval_steps=0",
]  # fmt: skip
KINDS = ("sh", "python", "yaml", "text", "diff")


@dataclass(frozen=True)
class Block:
    """`number`: its place in the page. `shows`: the text block right behind it, or nothing."""

    page: str
    number: int
    kind: str
    title: str
    body: str
    shows: str = ""

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"

    @property
    def is_run(self) -> bool:
        return not self.title.startswith(NOT_RUN)

    @property
    def commands(self) -> list[Command]:
        lines = self.body.replace("\\\n", " ").splitlines()
        return [Command(line.partition("  #")[0].rstrip()) for line in lines if line.strip() and not line.startswith("#")]

    @property
    def file(self) -> str:
        """The path that its first line names, or nothing."""
        found = re.match(r"# (\S+\.(?:py|yaml|jsonl))\n", self.body)
        return found[1] if found and self.kind in ("python", "yaml") else ""


@dataclass(frozen=True)
class Command:
    line: str

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self._split()[0])

    @property
    def words(self) -> list[str]:
        """What follows the variables: `python`, `-m`, `runner`, ..."""
        return self._split()[1]

    @property
    def arguments(self) -> list[str]:
        """Of runner. Empty for another program."""
        return self.words[3:] if self.words[:3] == ["python", "-m", "runner"] else []

    @property
    def verb(self) -> str:
        first = self.arguments[0] if self.arguments else ""
        return "run" if not first or "=" in first or first.startswith("-") else first

    @property
    def quick(self) -> bool:
        return self.words[:3] == ["python", "-m", "runner"] and (
            self.verb == "plan" or any(word in QUICK for word in self.arguments)
        )

    def _split(self) -> tuple[list[str], list[str]]:
        words = shlex.split(self.line, comments=True)
        count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
        return words[:count], words[count:]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text, found = path.read_text(), list[Block]()
    matches = list(re.finditer(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', text, flags=re.MULTILINE | re.DOTALL))
    for number, match in enumerate(matches):
        after = matches[number + 1] if number + 1 < len(matches) else None
        beside = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        shows = after[3] if after is not None and beside else ""
        found.append(Block(path.name, number, match[1], match[2] or "", match[3], shows))
    return found


def all_blocks() -> list[Block]:
    return [block for path in pages() if path.name not in ELSEWHERE for block in blocks(path)]


def small(command: Command, steps: int) -> list[str]:
    """The words of a command; a run in it takes few steps of small batches, and a run that is resumed is made that long."""
    words = [sys.executable if word == "python" else word for word in command.words]
    if "runner" not in words or command.verb not in ("run", "sweep"):
        return words
    words = [word for word in words if not word.startswith("steps=")] + [f"steps={steps}"]
    if any(word.startswith("resume=") for word in words):
        return words
    words += [item for item in SMALL if item.split("=")[0] not in " ".join(words)]
    return words if any(word.startswith("tracking=") for word in words) else [*words, "tracking=none"]


def run(command: Command, folder: Path, steps: int) -> str:
    """What a command prints in `folder`, made small. AssertionError with the end of it where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "RUNNER_CONFIG_DIR"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"} | command.environment
    words = small(command, steps)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command.line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr
