"""The jobs of a sweep: what `key=a,b,c` lists, each job's folder and its process. Nothing is started here."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException

from runner.config import option as options
from runner.config.overrides import override, override_key, readable
from runner.config.schema import Config
from runner.errors import UserError, UserErrors
from runner.tracking.folder import plain_config, run_state

MAX_NAME = 120  # characters of a job's folder name; a longer one is cut and hashed


@dataclass(frozen=True)
class Job:
    """One point of the sweep. `point`: the swept keys and this job's values; `overrides`: all of the job's overrides."""

    name: str
    point: dict[str, str]
    overrides: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "sweep.log"

    @property
    def state(self) -> str:
        """As in status.json; a process that ended before it wrote one has failed."""
        state = run_state(self.folder)
        return "failed" if state == "not started" and self.log.exists() else state


def expand(overrides: list[str]) -> list[tuple[dict[str, str], list[str]]]:
    """(swept keys and values, all overrides) of every job: the product of `a=1,2`, `a=choice(..)` and `a=range(..)`.

    The last swept key varies fastest. A value that is named twice, however it is spelt, is one value; a key that is swept twice
    takes all its values. Raises UserError for an override that does not parse or cannot be listed, and for a key that is both
    swept and set.
    """
    swept, fixed = swept_values(overrides)
    jobs = []
    for values in itertools.product(*(choices.values() for choices in swept.values())):
        point = dict(zip(swept, values, strict=True))
        jobs.append((point, [*fixed, *(f"{key}={value}" for key, value in point.items())]))
    return jobs


def swept_values(overrides: list[str]) -> tuple[dict[str, dict[Any, str]], list[str]]:
    """(swept key -> {what a value means: how it is written}, the overrides that are not swept)."""
    swept: dict[str, dict[Any, str]] = {}
    fixed: list[str] = []
    kinds = options.typed_keys()
    for text, item in _parsed(overrides):
        if not item.is_sweep_override():
            fixed.append(text)
        elif item.is_discrete_sweep() and not isinstance(item.value(), Glob) and not _holds_a_sweep(item.value()):
            choices = swept.setdefault(item.get_key_element(), {})
            for value in item.sweep_iterator():
                choices.setdefault(_meaning(value, kinds.get(item.get_key_element())), Override._get_value_element_as_str(value))
        else:
            raise UserError(f"{text!r} cannot be listed", fix=f"name the values: {item.get_key_element()}=a,b,c")
    for key in sorted({override_key(item) for item in fixed} & {override_key(key) for key in swept}):
        raise UserError("is swept, and set to one value too", key=key, fix="leave one of the two out")
    return swept, fixed


def _holds_a_sweep(value: Any) -> bool:
    """`range(1,4),8`: Hydra reads it and cannot list it."""
    return isinstance(value, ChoiceSweep) and any(isinstance(entry, Sweep | Glob) for entry in value.list)


def _parsed(overrides: list[str]) -> Iterator[tuple[str, Override]]:
    parser = OverridesParser.create()
    for text in readable(overrides):
        try:
            yield text, parser.parse_override(text)
        except (HydraException, ValueError) as error:
            raise UserError(f"cannot read {text!r}: {str(error).splitlines()[0]}", fix="key=value,value,...") from error


def _meaning(value: Any, kind: Any) -> Any:
    """Equal for spellings of one value: 1e-4 and 0.0001, a and 'a', for a key of whole numbers 1 and 01; not for true and 1."""
    plain = value.text if isinstance(value, QuotedString) else value
    if kind in (int, Optional[int]) and isinstance(plain, str) and re.fullmatch(r"[+-]?\d{1,18}", plain):
        plain = int(plain)  # Hydra's grammar has no leading zeros, the schema takes them
    return (isinstance(plain, bool), plain) if isinstance(plain, Hashable) else repr(plain)


def merged(overrides: list[str]) -> list[str]:
    """What `expand` made of values named twice and keys swept twice, in words."""
    named: dict[str, list[int]] = {}  # how many values each override of a key names
    for _, item in _parsed(overrides):
        if item.is_sweep_override():
            named.setdefault(item.get_key_element(), []).append(sum(1 for _ in item.sweep_iterator()))
    notes = []
    for key, choices in swept_values(overrides)[0].items():
        if len(named[key]) > 1:
            notes.append(f"{key} is swept {len(named[key])} times; its values together: {', '.join(choices.values())}")
        elif named[key][0] > len(choices):
            notes.append(f"{key} names a value more than once, which is one run: {', '.join(choices.values())}")
    return notes


def job_name(point: dict[str, str]) -> str:
    """`key=value,key=value` as a folder name; characters that a shell or a file system minds become `_`."""
    name = ",".join(f"{key.lstrip('+~')}={value}" for key, value in point.items()) or "job"
    safe = re.sub(r"[^\w.=,+@-]+", "_", name)
    if safe == name and len(safe) <= MAX_NAME:
        return safe
    return f"{safe[:MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"  # two values must not share a folder


def plan(overrides: list[str], load: Callable[[list[str]], Config]) -> tuple[Path, list[Job]]:
    """The sweep's folder and its jobs, every config composed and checked by `load` first.

    Raises UserErrors with the problems of every job (each problem once).
    """
    problems: dict[str, UserError] = {}
    points, configs = expand(overrides), []
    for _, job_overrides in points:
        try:
            configs.append(load(job_overrides))
        except UserError as error:
            for one in error.errors if isinstance(error, UserErrors) else [error]:
                problems.setdefault(str(one), one)
    if problems:
        raise UserErrors(list(problems.values()))
    identity = json.dumps([sorted(overrides), [plain_config(cfg, secrets=True) for cfg in configs]], sort_keys=True)
    keys = "+".join(key.lstrip("+~") for key in points[0][0]) or "single"
    name = f"sweep_{re.sub(r'[^A-Za-z0-9_.+-]+', '_', keys)[:80]}_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    folder = Path(configs[0].outputs_dir) / name
    jobs = []
    for point, job_overrides in points:
        name = job_name(point)
        jobs.append(Job(name, point, job_overrides, folder / name))
    return folder, jobs


def run_command(job: Job) -> list[str]:
    """The process of a job: a new run in its folder, or the continuation of one that has a complete checkpoint."""
    from runner.run.checkpoint import complete

    start = [sys.executable, "-m", "runner", "run"]
    if complete(job.folder):
        return [*start, override("resume", str(job.folder))]
    # The sweep's folder is part of the name, not of outputs_dir: cached warm starts under outputs_dir stay shared.
    return [*start, *job.overrides, override("run_name", f"{job.folder.parent.name}/{job.name}"), *group_override(job)]


def group_override(job: Job) -> list[str]:
    """The runs of a sweep are one wandb group, unless the user named one."""
    named = any(text.lstrip("+").startswith("tracking.group=") for text in job.overrides)
    return [] if named else [override("tracking.group", job.folder.parent.name)]
