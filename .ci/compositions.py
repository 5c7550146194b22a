"""`python .ci/compositions.py BASE`: what the configs of this checkout and of another commit resolve to, key by key.

Composed are the defaults, every option of every group, every recipe and every model with every precision, and each of them at
scale=laptop, too. Exit 0: all that both have resolve equally; 1: the differences are printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main(base: str) -> int:
    with tempfile.TemporaryDirectory(prefix="runner-compositions-") as scratch:
        tree = Path(scratch) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), base], cwd=ROOT, check=True, capture_output=True)
        try:
            before, after = resolved_in(tree), resolved_in(ROOT)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True, capture_output=True)
    same = [name for name in before if before[name] == after.get(name)]
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"only in {'this checkout' if name in after else base}: {name or 'the defaults'}")
        elif before[name] != after[name]:
            print(f"differs: {name or 'the defaults'}")
            for line in differences(before[name], after[name]):
                print(f"    {line}")
    print(f"{len(same)} compositions resolve equally, of {len(before)} then and {len(after)} now")
    return int(len(same) < len(before.keys() & after.keys()))


def resolved_in(tree: Path) -> dict[str, Any]:
    """Overrides -> the resolved config, or the error, by the code of `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, "--here"]
    return json.loads(subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def here() -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from runner.config import compose

    folders = {folder.name: folder for folder in Path("conf").iterdir() if folder.is_dir()} | {"recipe": Path("recipes")}
    options = {group: sorted(file.stem for file in folders[group].glob("*.yaml")) for group in sorted(folders)}
    names = ["", *(f"{group}={option}" for group in options if group != "shared" for option in options[group])]
    names += [f"model={model} precision={precision}" for model in options["model"] for precision in options["precision"]]
    found: dict[str, Any] = {}
    for name in [*names, *(f"{name} scale=laptop" for name in names if not name.startswith("scale="))]:
        try:
            raw = compose.compose_raw(name.split())
            found[name] = OmegaConf.to_container(raw, resolve=True, enum_to_str=True)
        except OmegaConfBaseException as error:
            found[name] = str(error)
    return found


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{key}: {before} is now {after}"]
    lines = []
    for name in sorted(before.keys() | after.keys()):
        below = f"{key}.{name}".lstrip(".")
        lines += differences(before.get(name, "absent"), after.get(name, "absent"), below)
    return lines


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        json.dump(here(), sys.stdout)
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(__doc__)
