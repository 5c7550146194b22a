"""Names that become folders: one component of a path, that cannot lead anywhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.config import limits
from runner.config.schema import Config
from runner.errors import UserError

MAX_BYTES = 255  # of a name, on the usual file systems
# A job of a sweep lies in the sweep's folder; sweep.py makes these names.
_SWEEP = re.compile(r"sweep_[^/\x00-\x1f\x7f\\]+")


def run_name(cfg: Config) -> Iterator[UserError]:
    """A resumed run has its folder already."""
    if cfg.run_name and not cfg.resume and (problem := name_problem(cfg.run_name)):
        yield UserError(
            f"{cfg.run_name!r} {problem}",
            key="run_name",
            fix="run_name=<letters, digits and any of . _ - = , + @>; the folder that runs lie in is outputs_dir=<a folder>",
        )


def name_problem(name: str) -> str | None:
    """What keeps `name` from being a run's: a folder in outputs_dir, or in the folder of a sweep in outputs_dir."""
    sweep, slash, job = name.partition("/")
    return component_problem(job if slash and _SWEEP.fullmatch(sweep) else name)


def component_problem(name: str) -> str | None:
    """What keeps `name` from being one component of a path; None where it is one."""
    if name in (".", "..") or "/" in name or "\\" in name:
        return "is a path, not a name"
    if not name.strip() or name != name.strip():
        return "begins or ends with a space"
    if name[0] in ".-~":
        return f"begins with {name[0]!r}: hidden, an option or a home folder to other programs"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not name.isprintable():
        return "has characters that cannot be seen"
    return f"has {size} bytes, a file system takes {MAX_BYTES}" if size > MAX_BYTES else None


def homes(cfg: Config) -> Iterator[UserError]:
    """Paths whose `~user` nobody here has: a folder of that name would appear in the current one."""
    for key, holder, field in limits.walk(cfg):
        value = getattr(holder, field.name)
        if field.metadata.get(limits.PATH) and isinstance(value, str) and value.startswith("~"):
            name = value.partition("/")[0]
            yield UserError(
                f"{value!r} begins with {name}, whose home folder is not known here", key=key, fix=f"{key}=<a whole path>"
            )
    if not cfg.outputs_dir.strip():
        yield UserError("is empty", key="outputs_dir", fix="outputs_dir=<a folder>; outputs_dir=. for this one")


RULES = (run_name, homes)
