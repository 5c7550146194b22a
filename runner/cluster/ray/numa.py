"""CPUs near a GPU, read off the kernel's own tables: a rank that runs on the other socket moves everything through the link."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")


def bind(device: int) -> None:
    """Keep this process, and what it starts, on the CPUs near a visible GPU; nothing where they cannot be read."""
    bus = bus_ids()
    near = cpus_near(bus[device]) if device < len(bus) else set()
    if near := near & os.sched_getaffinity(0):
        os.sched_setaffinity(0, near)


def bus_ids() -> list[str]:
    """PCI bus ids of the visible GPUs, in the order of CUDA_VISIBLE_DEVICES."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return []
    return visible(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(listed: str, chosen: str | None) -> list[str]:
    """Bus ids out of nvidia-smi's `index, uuid, bus id` lines; `chosen`: indices or UUIDs, None for all."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.strip().splitlines()]
    if chosen is None:
        return [bus for _, _, bus in rows]
    table = {key: bus for index, uuid, bus in rows for key in (index, uuid)}
    return [table[key] for key in map(str.strip, chosen.split(",")) if key in table]


def cpus_near(bus: str, root: Path = PCI) -> set[int]:
    """Of the NUMA node that a PCI device is on; {} where the kernel does not say."""
    domain, _, rest = bus.lower().partition(":")
    try:
        text = (root / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
