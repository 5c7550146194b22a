"""Where a run's processes live: the placement, and whoever starts them (`cluster=local`, `cluster=ray`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runner.cluster.launcher import Launcher
from runner.config.choices import LauncherKind
from runner.config.schema import Config
from runner.errors import UserError

_opened: Launcher | None = None  # of cluster=ray: a process is in one cluster at a time


@contextmanager
def opened(cfg: Config) -> Iterator[Launcher]:
    """The cluster of a run, for as long as its processes live. cluster=local imports no Ray."""
    global _opened
    launcher = _open(cfg)
    try:
        _opened = launcher
        yield launcher
    finally:
        _opened = None
        launcher.close()


def launcher_of(cfg: Config) -> Launcher:
    """Whoever starts processes now. UserError for a cluster that nobody has opened."""
    if cfg.cluster.launcher == LauncherKind.local:
        return _open(cfg)
    if _opened is None:
        raise UserError(f"cluster={cfg.cluster.name} is for runs", key="cluster", fix="cluster=local")
    return _opened


def _open(cfg: Config) -> Launcher:
    if cfg.cluster.launcher == LauncherKind.local:
        from runner.cluster.local import LocalLauncher

        return LocalLauncher()
    if cfg.cluster.launcher == LauncherKind.ray:
        from runner.cluster.ray import RayLauncher

        return RayLauncher(cfg)
    raise UserError(f"cluster={cfg.cluster.name} has no launcher of its own", key="cluster", fix="python -m runner submit ...")
