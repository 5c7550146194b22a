"""Two Ray nodes of this machine, once for all tests: starting them takes ten seconds and more."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("ray") is None:  # importing it would have it read its environment too early
    pytest.skip("make setup", allow_module_level=True)

from runner import cluster
from runner.cluster.ray import RayLauncher
from runner.cluster.ray.connect import Connection
from runner.config.schema import Config
from tests.megatron_trainer.configs import megatron_config


def two_nodes(layout: str = "tp2_sp", **changes: object) -> Config:
    """The Megatron tests' tiny model on two nodes."""
    on = {"cluster.name": "ray", "cluster.launcher": "ray", "cluster.nodes": 2, "cluster.gpus_per_node": 0}
    return megatron_config("moe", layout, format="int4", **{**on, "cluster.wait_seconds": 60.0, **changes})


@pytest.fixture(scope="session")
def connection() -> Iterator[Connection]:
    made = Connection(two_nodes())
    yield made
    made.close()


@pytest.fixture
def launched(connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cfg -> a launcher of its own on the nodes, which trainers and pools of this test then use."""
    made: list[RayLauncher] = []

    def launch(cfg: Config) -> RayLauncher:
        cfg.outputs_dir = str(tmp_path)
        made.append(RayLauncher(cfg, connection))
        monkeypatch.setattr(cluster, "_opened", made[-1])
        return made[-1]

    yield launch
    for launcher in made:
        launcher.close()
