"""`python -m runner show RUN STEP SAMPLE`: one sample, to be read by a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import PROGRAM
from runner.cli.verb import Command, Parser, Verb
from runner.errors import UserError
from runner.tracking import pictures
from runner.tracking.page import FAR, NEAR

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"model": "bold green", "environment": "cyan"}


def start(command: Command) -> int:
    from runner.tracking.folder import read_jsonl, rollout_files
    from runner.tracking.report import find_runs, with_images

    if not command.words or len(command.words) > 3:
        raise UserError("show needs a run, and takes a step and a sample", fix=f"{PROGRAM} show outputs/<run> 10 0")
    (folder, *others) = find_runs(command.words[0])
    if others:
        raise UserError(f"{command.words[0]} is a sweep", fix=f"{PROGRAM} show {folder}")
    files = dict(rollout_files(folder))
    if not files:
        raise UserError(f"{folder} has no samples yet", fix="they are written at the end of a step")
    steps = f"a step from {min(files) + 1} to {max(files) + 1}"
    step = _whole(command.words[1], "step", steps) - 1 if len(command.words) > 1 else max(files)
    if step not in files:
        raise UserError(f"{folder.name} has no samples of step {step + 1}", fix=steps)
    rows = read_jsonl(files[step])
    samples = f"a number from 0 to {len(rows) - 1}"
    chosen = [_whole(command.words[2], "sample", samples)] if len(command.words) > 2 else list(range(len(rows)))
    if chosen and chosen[0] >= len(rows):
        raise UserError(f"step {step + 1} keeps {len(rows)} samples", fix=samples)
    if command.flags.out:
        page_rows = [with_images(files[step].parent, step, rows[number]) for number in chosen]
        print(_page(command.flags.out, folder.name, step, page_rows))
        return 0
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for number in chosen:
        found = pictures.of_row(files[step].parent, step, rows[number])
        images = [pictures.drawn(file) if console.is_terminal else Text(f"{'':>12}  {file}\n", "dim") for file in found]
        console.print(text_of(rows[number], f"step {step + 1}  sample {number}", images))
    return 0


def _whole(text: str, what: str, fix: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UserError(f"{text!r} is no {what}", fix=fix)
    return int(text)


def _page(path: Path, name: str, step: int, rows: list[dict[str, Any]]) -> Path:
    """The samples as a page that a browser opens without a network."""
    from runner.storage import atomic_write
    from runner.tracking import page

    body = page.header(name, f"step {step + 1}", [], []) + page.samples([(step, row) for row in rows], every_token=True)
    atomic_write(path, page.document(f"{name}, step {step + 1}", body))
    return path


def text_of(row: dict[str, Any], title: str, images: list[Text] | None = None) -> Text:
    """A sample's prompt, turns, images, parts of the reward, and the tokens on which engine and trainer disagree most."""
    from rich.text import Text

    text = Text()
    text.append(f"{title}  {row.get('prompt_id', '')}\n", "bold")
    facts = {key: row[key] for key in ("reward", "advantage", "status", "finish_reason") if key in row}
    text.append("  ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    for name, value in (row.get("rewards") or {}).items():
        text.append(f"  reward/{name} {value:g}\n", "yellow")
    text.append(f"{row.get('prompt', '')}\n", "dim")
    before, of_turns = pictures.by_turn(row, images or [])
    for image in before:
        text.append(image)
    for number, turn in enumerate(row.get("turns") or [{"by": "model", "text": row.get("response", "")}]):
        by = str(turn.get("by", ""))
        text.append(f"{by:>12}  ", "dim").append(f"{turn.get('text', '')}", STYLES.get(by, ""))
        notes = turn.get("notes") or {}
        if "advantage" in turn:
            notes = {"advantage": turn["advantage"], **notes}
        text.append(f"   {json.dumps(notes, ensure_ascii=False)}\n" if notes else "\n", "magenta")
        for image in of_turns[number] if of_turns else []:
            text.append(image)
    for token in row.get("worst") or []:
        apart = abs(token["engine"] - token["trainer"])
        style = "bold red" if apart > FAR else "red" if apart > NEAR else "dim"
        text.append(f"  token {token['position']} {token['token']!r}  ", style)
        text.append(f"engine {token['engine']:.4f}  trainer {token['trainer']:.4f}\n", style)
    return text


def flags(parser: Parser) -> None:
    parser.flag("--out", metavar="FILE", type=Path, help="write a page for a browser instead")


VERB = Verb(
    name="show",
    summary="samples of a step: turns, tool calls, parts of the reward",
    usage="RUN [STEP [SAMPLE]] [--out FILE]",
    about="""show RUN               the samples kept of the last step
show RUN STEP          those of another step, counted from 1
show RUN STEP SAMPLE   one of them, counted from 0
RUN is a run's folder, or its name under outputs/. Shows turns, tool calls and what they gave, parts of the reward, the advantage,
and the tokens on which engine and trainer disagree most. Exit code 0: shown; 2: there is no such sample.""",
    examples=(
        ("show outputs/<run> 10 0", "one sample"),
        ("show outputs/<run> 10 --out step10.html", "a page that a browser opens"),
    ),
    start=start,
    words=None,
    config=False,
    flags=flags,
)
