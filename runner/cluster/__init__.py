"""Where a run's processes live: the placement, and whoever starts them (`cluster=local`, `cluster=ray`)."""

from __future__ import annotations

from runner.cluster.launcher import Launcher
from runner.config.schema import Config


def launcher_of(cfg: Config) -> Launcher:
    """Of `cluster.launcher`. cluster=local imports no Ray."""
    from runner.cluster.local import LocalLauncher

    return LocalLauncher()
