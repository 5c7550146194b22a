"""Where configs are found: conf/ and recipes/ of this project, then of the user's own folder. Torch-free.

A tree is a folder with conf/<group>/<option>.yaml and recipes/<name>.yaml. The first is the checkout, or the package where runner
was installed without one; RUNNER_CONFIG_DIR names a second, whose options are chosen as those of the first are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from runner.errors import UserError

VARIABLE = "RUNNER_CONFIG_DIR"
PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONFIG_DIR = HOME / "conf"
HIDDEN_GROUPS = ("shared", "hydra")  # building blocks, not choices of a user


class Tree(FileConfigSource):
    """A tree as Hydra reads it: recipes/ is the group `recipe`, everything else lies in conf/."""

    @staticmethod
    def scheme() -> str:
        return "tree"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_inside(config_path))

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return super().is_group(_inside(config_path))

    def is_config(self, config_path: str) -> bool:
        return super().is_config(_inside(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = Path(self.path, _inside(config_path))
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if not config_path and self.is_group("recipe"):
            names.append("recipe")
        found: list[str] = []
        for name in names:
            path = f"{config_path}/{name}".lstrip("/")
            self._list_add_result(files=found, file_path=path, file_name=name, results_filter=results_filter)
        return sorted(found)


def register() -> None:
    """Teach Hydra to read trees and OmegaConf which there are. Safe to call again."""
    SourcesRegistry.instance().register(Tree)
    OmegaConf.register_new_resolver("trees", lambda: [f"tree://{tree}" for tree in trees()], replace=True)


def trees() -> list[Path]:
    """This project's tree, then the user's. Raises UserError for a RUNNER_CONFIG_DIR without conf/ and recipes/."""
    own = os.environ.get(VARIABLE)
    if not own:
        return [HOME]
    tree = Path(own).expanduser().absolute()
    if not (tree / "conf").is_dir() and not (tree / "recipes").is_dir():
        fix = f"{VARIABLE}: a folder with conf/<group>/<option>.yaml or recipes/<name>.yaml in it"
        raise UserError(f"{tree} holds neither conf/ nor recipes/", key=VARIABLE, fix=fix)
    return [HOME, tree]


def groups() -> dict[str, list[str]]:
    """Config group -> its options, sorted."""
    found: dict[str, set[str]] = {}
    for tree in trees():
        folders = [folder for folder in tree.glob("conf/*") if folder.is_dir() and folder.name not in HIDDEN_GROUPS]
        for group, folder in [*((folder.name, folder) for folder in folders), ("recipe", tree / "recipes")]:
            found.setdefault(group, set()).update(file.stem for file in folder.glob("*.yaml"))
    return {group: sorted(found[group]) for group in sorted(found)}


def file_of(path: str) -> Path | None:
    """The file of `<group>/<option>`; None for what is not a file (a schema)."""
    files = (tree / f"{_inside(path)}.yaml" for tree in trees())
    return next((file for file in files if file.is_file()), None)


def files_of(group: str) -> Iterator[Path]:
    """The files of a group's options."""
    for option in groups()[group]:
        file = file_of(f"{group}/{option}")
        assert file is not None
        yield file


def shown(file: Path) -> str:
    """The path as the repository shows it (conf/model/x.yaml, recipes/x.yaml); in full for a file of the user."""
    return str(file.relative_to(HOME)) if file.is_relative_to(HOME) else str(file)


def _inside(path: str) -> str:
    group, _, option = path.partition("/")
    return f"recipes/{option}" if group == "recipe" else f"conf/{path}"
