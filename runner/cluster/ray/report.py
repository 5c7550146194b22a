"""What a node has, as it says itself; and what of it stands in the way of a run, over all nodes at once."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import runner
from runner.cluster.ray.store import needed_bytes
from runner.config.option import chosen
from runner.config.schema import Config
from runner.errors import UserError

PACKAGES = ("torch", "ray", "transformers", "safetensors", "numpy")  # of every run, beside those of its options
CLOCK_SECONDS = 5.0  # that clocks of nodes may differ
OPEN_FILES = 65536
GIB = 1024**3


@dataclass(frozen=True)
class NodeReport:
    """One node. Bytes and seconds; `code` is a hash of the program's files, `canary` what it read of the run's outputs."""

    name: str
    address: str
    python: str
    packages: dict[str, str]
    code: str
    gpus: list[str]  # name, driver and free memory of each, as nvidia-smi says it
    memory_free: int
    shm_free: int
    open_files: int
    locked_memory: int  # -1: no limit
    clock: float
    store: int  # of Ray's objects
    missing: list[str] = field(default_factory=list)  # paths of the config that do not exist there
    canary: str = ""

    @property
    def who(self) -> str:
        return f"{self.name} ({self.address})"


def report(cfg: Config, address: str, canary: Path | None) -> NodeReport:
    """Of this machine. `canary`: a file under the run's outputs, which the driver has written."""
    shm = Path("/dev/shm")
    return NodeReport(
        name=platform.node(),
        address=address,
        python=platform.python_version(),
        packages={name: _version(name) for name in needed_packages(cfg)},
        code=code_hash(),
        gpus=_gpus() if cfg.parallelism.gpus + cfg.parallelism.rollout_gpus else [],
        memory_free=psutil.virtual_memory().available,
        shm_free=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        clock=time.time(),
        store=_store(),
        missing=[f"{key}: {path}" for key, path in paths(cfg).items() if not Path(path).expanduser().exists()],
        canary=canary.read_text() if canary is not None and canary.is_file() else "",
    )


def paths(cfg: Config) -> dict[str, str]:
    """Key -> folder or file that every node must see, hub ids left out."""
    named = {
        "model.hf_checkpoint": cfg.model.hf_checkpoint,
        "speculative.draft_model": cfg.speculative.draft_model,
        "trainer.initial_checkpoint": getattr(cfg.trainer, "initial_checkpoint", None),
    }
    return {key: path for key, path in named.items() if path and path.startswith(("/", "./", "../", "~"))}


@cache
def code_hash() -> str:
    """Of the program's own files: nodes with other code would compute something else, or not understand each other."""
    root, state = Path(runner.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        state.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return state.hexdigest()


def problems(cfg: Config, nodes: list[NodeReport], driver: NodeReport, canary: str) -> Iterator[UserError]:
    """Everything that differs from the driver or is too little, each naming its node."""
    gpus, installed = cfg.parallelism.gpus + cfg.parallelism.rollout_gpus, needed_packages(cfg)
    for node in nodes:
        if node.python.split(".")[:2] != driver.python.split(".")[:2]:
            yield UserError(f"{node.who} has Python {node.python}, the driver {driver.python}", key="cluster")
        for name in installed:
            if node.packages[name] != driver.packages[name]:
                what = node.packages[name] or "no"
                yield UserError(
                    f"{node.who} has {what} {name}, the driver {driver.packages[name]}", key="cluster", fix="one image"
                )
        if node.code != driver.code:
            yield UserError(f"{node.who} has other code of runner (hash {node.code}, the driver {driver.code})", key="cluster")
        if abs(node.clock - driver.clock) > CLOCK_SECONDS:
            yield UserError(f"the clock of {node.who} is off by {node.clock - driver.clock:+.0f} s", key="cluster", fix="NTP")
        for path in node.missing:
            yield UserError(f"{node.who} does not see {path}", key=path.partition(":")[0], fix="a shared file system")
        if canary and node.canary != canary:
            yield UserError(
                f"{node.who} does not see what the driver writes under {cfg.outputs_dir}",
                key="outputs_dir",
                fix="outputs_dir=<a folder of a file system that all nodes share>",
            )
        if gpus:
            yield from _gpu_problems(cfg, node, nodes[0])


def warnings(cfg: Config, nodes: list[NodeReport]) -> Iterator[str]:
    """What may go wrong later."""
    on_gpus = bool(cfg.parallelism.gpus + cfg.parallelism.rollout_gpus)
    needed = needed_bytes(cfg)
    for node in nodes:
        if node.store < needed:
            yield (
                f"{node.who} has an object store of {node.store / GIB:.1f} GiB, a step's routes may need {needed / GIB:.1f}: "
                f"Ray writes the rest to disk (ray start --object-store-memory={needed})"
            )
        if on_gpus and node.open_files < OPEN_FILES:
            yield f"{node.who} allows {node.open_files} open files: ulimit -n {OPEN_FILES}"
        if on_gpus and node.locked_memory != -1:
            yield f"{node.who} limits locked memory: RDMA pins more (ulimit -l unlimited)"


def needed_packages(cfg: Config) -> list[str]:
    """Those that this run stands on."""
    wanted = [need.distribution for choice in chosen(cfg) for need in choice.option.needs if need.when(cfg)]
    return list(dict.fromkeys([*PACKAGES, *wanted]))


def _gpu_problems(cfg: Config, node: NodeReport, first: NodeReport) -> Iterator[UserError]:
    if len(node.gpus) < cfg.cluster.gpus_per_node:
        yield UserError(
            f"{node.who} has {len(node.gpus)} GPUs, cluster.gpus_per_node is {cfg.cluster.gpus_per_node}", key="cluster"
        )
        return
    kinds = [{tuple(line.split(", ")[:2]) for line in each.gpus} for each in (node, first)]
    if kinds[0] != kinds[1]:
        shown = [", ".join(" driver ".join(kind) for kind in sorted(each)) for each in kinds]
        yield UserError(f"{node.who} has {shown[0]}; {first.who} has {shown[1]}", key="cluster", fix="nodes of one kind")


def _store() -> int:
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return sum(int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["NodeID"] == mine)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """A line per GPU: name, driver version, free MiB."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True, env=_all_devices())
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def _all_devices() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
