"""The command line that a run's folder keeps: what `resume=` starts from."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from runner.config.overrides import shell, typed
from runner.errors import UserError
from runner.storage import atomic_write

OVERRIDES = Path(".hydra") / "overrides.yaml"
_COUNT = re.compile(r"# (\d+) overrides?\n")  # its first line


def find_run(name: str, outputs_dir: str, key: str = "resume") -> Path:
    """The folder of a run given as a path or as a name under outputs_dir, by `key`; raises UserError with the nearest names."""
    places = (Path(name), Path(outputs_dir) / name)
    for path in places:
        if (path / OVERRIDES).is_file():
            return path
    for path in places:
        if (path / "checkpoints").is_dir() and (path / "resolved.yaml").is_file():
            raise _unknown_experiment(path, "is missing")
    root = Path(outputs_dir)
    known = sorted(path.name for path in root.iterdir() if (path / ".hydra").is_dir()) if root.is_dir() else []
    close = difflib.get_close_matches(name, known, n=3) or known[-3:]
    hint = (
        shell(typed(key, close[0])) + (f" (or {', '.join(close[1:])})" if close[1:] else "")
        if close
        else f"no run lies under {root} yet"
    )
    raise UserError(f"no run named {name!r} under {root}", key=key, fix=hint)


def write_overrides(run: Path, overrides: list[str]) -> None:
    """The command line of a run, without `resume=`, as Hydra writes it and with its length: a part of it would be another
    experiment."""
    kept = [item for item in overrides if item.partition("=")[0] != "resume"]
    count = f"# {len(kept)} override{'s' * (len(kept) != 1)}\n"
    text = yaml.safe_dump(kept, allow_unicode=True, width=1 << 20, default_style='"') if kept else "[]\n"
    atomic_write(run / OVERRIDES, count + text, durable=True)


def read_overrides(run: Path) -> list[str]:
    """What `write_overrides` wrote, or Hydra. UserError for a damaged or empty file: it would be another experiment."""
    try:
        text = (run / OVERRIDES).read_bytes().decode()
        found: Any = yaml.safe_load(text)
    except OSError as error:
        raise _unknown_experiment(run, f"cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise _unknown_experiment(run, f"is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _unknown_experiment(run, "is empty" if found is None else "is damaged: it is no list of key=value")
    count = _COUNT.match(text)
    if count and int(count[1]) != len(found):
        raise _unknown_experiment(run, f"is damaged: it has {len(found)} overrides and says {count[1]}")
    return found


def _unknown_experiment(run: Path, problem: str) -> UserError:
    return UserError(
        f"{run / OVERRIDES} {problem}; without it nobody knows what was typed to start this run",
        key="resume",
        fix=f"write it again, one `- key=value` per line ([] for none); {run / 'resolved.yaml'} has all values",
    )
