"""Checks of the machine a run would start on: versions, devices, memory, disk, limits."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from runner.config import option as options
from runner.config.choices import LauncherKind
from runner.config.packages import LOCK_CPU, LOCK_GPU, failures, from_lock, locked, tool, version_of
from runner.config.packages import installed as has_module
from runner.config.preflight import visible_gpus
from runner.config.schema import Config, CpuMatmul
from runner.cores import available_cores
from runner.findings import Finding, Status

GIB = 1024**3
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LEAST_FREE_DISK_GIB = 1.0  # a default run writes less than this
GOOD_FREE_DISK_GIB = 10.0
LEAST_MEMORY_GIB = 2.0  # torch, transformers and a tiny model
GOOD_SHM_GIB = 1.0  # NCCL and Ray move tensors between processes there; containers often give 64 MiB
GOOD_OPEN_FILES = 4096  # Ray opens some hundred files and sockets per worker
# distribution, module, and what it is for, beside what options need
OPTIONAL_PARTS = (
    ("triton", "triton", "fused quantization kernels on a GPU"),
    ("llmcompressor", "llmcompressor", "convert method=gptq"),
)


def check_machine(cfg: Config) -> Iterator[Finding]:
    """Every check in order. A check that itself breaks is a failure with its error, not a traceback."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        python_version,
        pinned_versions,
        locked_versions,
        devices,
        gpu_packages,
        cpu_and_memory,
        bf16_matmul,
        of_options,
        outputs_folder,
        optional_parts,
        shared_memory,
        open_files,
    )
    for check in checks:
        try:
            yield from check(cfg)
        except Exception as error:
            yield Finding(check.__name__.replace("_", " "), Status.fail, f"{type(error).__name__}: {error}")


def requirements() -> tuple[str, list[Requirement]]:
    """(requires-python, the mandatory dependencies), from pyproject.toml or the installed package's metadata."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        return project["requires-python"], [Requirement(text) for text in project["dependencies"]]
    wanted = [Requirement(text) for text in importlib.metadata.requires("runner") or []]
    return importlib.metadata.metadata("runner")["Requires-Python"], [r for r in wanted if r.marker is None]


def python_version(cfg: Config) -> Iterator[Finding]:
    wanted, _ = requirements()
    version = platform.python_version()
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    yield Finding("python", Status.ok if fits else Status.fail, f"{version} (wanted {wanted})", "" if fits else "make setup")


def pinned_versions(cfg: Config) -> Iterator[Finding]:
    """One line when all pins hold, else one per package that differs."""
    _, wanted = requirements()
    held = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, Status.fail, f"not installed (wanted {requirement.specifier})", "make setup")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            held.append(f"{requirement.name} {version}")
        else:
            fix = f"pip install '{requirement}'"
            yield Finding(requirement.name, Status.fail, f"{version} (wanted {requirement.specifier})", fix)
    yield Finding("pinned packages", Status.ok, f"{len(held)} of {len(wanted)} as pinned: {', '.join(held)}")


def locked_versions(cfg: Config) -> Iterator[Finding]:
    """Against the lock of this environment, which is the one whose torch is installed here."""
    torch = version_of("torch")
    file = LOCK_GPU if torch == locked(LOCK_GPU).get("torch") else LOCK_CPU
    versions = {name: version_of(name) for name in locked(file)}
    other = [from_lock(name, file) for name, found in versions.items() if found not in (None, locked(file)[name])]
    count = sum(version is not None for version in versions.values())
    found = f"{count - len(other)} of {count} packages as in {file}" + (f"; {', '.join(other)}" if other else "")
    fix = ("make setup-gpu" if file == LOCK_GPU else "make setup") + ": the tests passed with the locked versions"
    yield Finding("locked packages", Status.warn if other else Status.ok, found, fix if other else "")


def gpu_packages(cfg: Config) -> Iterator[Finding]:
    """Packages with kernels are imported and compilers looked for, where the config uses GPUs and this machine has some."""
    if not visible_gpus() or not max(cfg.parallelism.gpus, cfg.parallelism.rollout_gpus):
        return
    needs = [need for choice in options.chosen(cfg) for need in choice.option.needs if need.loads and need.when(cfg)]
    there = {need.loads: need for need in needs if need.loads and has_module(need.module)}
    broken = dict(failures(there))
    for module, need in there.items():
        status, fix = (Status.fail, "make setup-gpu") if module in broken else (Status.ok, "")
        yield Finding(f"import {module}", status, broken.get(module) or from_lock(need.distribution, LOCK_GPU), fix)
    for name, fix in (("nvcc", "install the CUDA 13 toolkit, or set CUDA_HOME"), ("ninja", "make setup-gpu")):
        path = tool(name)
        yield Finding(
            name, Status.ok if path else Status.warn, path or "not found; kernels are compiled with it", "" if path else fix
        )


def devices(cfg: Config) -> Iterator[Finding]:
    """GPUs against what the config asks of this node."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"torch {torch.__version__}, "
    if count:
        names = [torch.cuda.get_device_properties(i) for i in range(count)]
        gpus = ", ".join(f"{p.name} {p.total_memory / GIB:.0f} GiB sm{p.major}{p.minor}" for p in names)
        found += f"CUDA {torch.version.cuda}, {count} GPUs: {gpus}"
    else:
        found += "no GPU"
    wanted = min(max(cfg.parallelism.gpus, cfg.parallelism.rollout_gpus), cfg.cluster.gpus_per_node)
    if count >= wanted:
        yield Finding("GPUs", Status.ok, f"{found} (wanted {wanted})")
        return
    here = cfg.cluster.launcher == LauncherKind.local
    fix = "scale=laptop runs the same recipe on the CPU" if here else "start it from a node of the cluster, or scale=laptop"
    yield Finding("GPUs", Status.fail if here else Status.warn, f"{found} (wanted {wanted} per node)", fix)


def memory_limit() -> int:
    """Bytes this process may use: the machine's, or less where a cgroup says so."""
    total = int(psutil.virtual_memory().total)
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    for path in limits:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def cpu_and_memory(cfg: Config) -> Iterator[Finding]:
    cores = available_cores()
    status = Status.ok if cores >= 2 else Status.warn
    yield Finding("cores", status, str(cores), "" if cores >= 2 else "the default run is timed on 2 cores; expect twice as long")
    limit, free = memory_limit() / GIB, psutil.virtual_memory().available / GIB
    free = min(free, limit)
    found = f"{limit:.1f} GiB, {free:.1f} free"
    if free < LEAST_MEMORY_GIB:
        yield Finding("memory", Status.fail, found, f"free at least {LEAST_MEMORY_GIB:.0f} GiB")
    elif cfg.parallelism.gpus == 0 and limit < cfg.cluster.host_memory_gib:
        fix = f"cluster.host_memory_gib={int(limit)}, then python -m runner plan"
        yield Finding("memory", Status.warn, f"{found} (cluster.host_memory_gib={cfg.cluster.host_memory_gib:g})", fix)
    else:
        yield Finding("memory", Status.ok, found)


def bf16_matmul(cfg: Config) -> Iterator[Finding]:
    """Which way this CPU multiplies bf16 matrices, and why; nothing where no part of the run computes on a CPU."""
    from runner.precision import cpu_matmul

    if cfg.parallelism.gpus:
        return
    way, reason = cpu_matmul.choose(cfg.precision.cpu_matmul)
    slow = way is CpuMatmul.native and not cpu_matmul.has_bf16_instructions() and cpu_matmul.measure() >= cpu_matmul.SLOWER
    fix = "precision.cpu_matmul=auto: widened products are faster here" if slow else ""
    yield Finding("bf16 matmul", Status.warn if slow else Status.ok, f"{way.name}: {reason}", fix)


def outputs_folder(cfg: Config) -> Iterator[Finding]:
    """Free space and write permission where the runs go (the nearest folder that exists; nothing is left behind)."""
    folder = Path(cfg.outputs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    status = Status.fail if free < LEAST_FREE_DISK_GIB else Status.warn if free < GOOD_FREE_DISK_GIB else Status.ok
    yield Finding(
        "disk", status, f"{free:.1f} GiB free in {folder}", "" if status is Status.ok else "outputs_dir=<a larger disk>"
    )
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"runner")
        yield Finding("write permission", Status.ok, str(folder))
    except OSError as error:
        yield Finding("write permission", Status.fail, f"{folder}: {error.strerror}", "outputs_dir=<a folder you may write to>")


def of_options(cfg: Config) -> Iterator[Finding]:
    """What the options of this config look at themselves."""
    for choice in options.chosen(cfg):
        for check in choice.option.checks:
            yield from check(cfg)


def optional_parts(cfg: Config) -> Iterator[Finding]:
    parts = [(need.distribution, need.module, str(choice)) for choice in options.choices() for need in choice.option.needs]
    needed = [need.distribution for choice in options.chosen(cfg) for need in choice.option.needs if need.when(cfg)]
    absent = []
    for distribution, module, purpose in (*parts, *OPTIONAL_PARTS):
        if has_module(module):
            yield Finding(distribution, Status.ok, f"{version_of(distribution) or 'version unknown'}, for {purpose}")
        elif distribution in needed:
            yield Finding(distribution, Status.fail, "not installed, and this config uses it", f"pip install {distribution}")
        else:
            absent.append(f"{distribution} ({purpose})")
    if absent:
        yield Finding("optional parts", Status.ok, f"not installed and not needed: {', '.join(absent)}")


def shared_memory(cfg: Config) -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("/dev/shm", Status.warn, "absent", "needed by Ray and NCCL on Linux")
        return
    size = shutil.disk_usage(shm).total / GIB
    many = cfg.cluster.launcher != LauncherKind.local or cfg.parallelism.ranks > 1
    status = Status.warn if many and size < GOOD_SHM_GIB else Status.ok
    fix = f"containers: --shm-size={GOOD_SHM_GIB * 16:.0f}g" if status is Status.warn else ""
    yield Finding("/dev/shm", status, f"{size:.2f} GiB", fix)


def open_files(cfg: Config) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = cfg.cluster.launcher != LauncherKind.local
    low = soft != resource.RLIM_INFINITY and soft < GOOD_OPEN_FILES
    status = Status.warn if low and many else Status.ok
    yield Finding("open files", status, f"{soft} (up to {hard})", "ulimit -n 65536" if status is Status.warn else "")
