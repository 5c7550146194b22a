"""Time and memory of the export stream of one Megatron rank: INT4 and BF16, at tiny and at a larger size.

    python -m benchmarks.megatron_export [tiny|0.3b|1b ...]      1b needs about 20 GiB

Weights are random; each size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time

import torch

from runner.config import compose
from runner.trainer.megatron import arguments

BASE = ("trainer=megatron", "parallelism=single", "precision=int4_qat", "router_replay=none")
SIZES = {
    "tiny": ("model=tiny_moe",),
    "0.3b": ("model=tiny_moe", "model.hidden_size=512", "model.expert_ffn_size=1024", "model.num_experts=48"),
    "1b": ("model=tiny_moe", "model.hidden_size=1024", "model.expert_ffn_size=1024", "model.num_experts=80"),
}


def _gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(size: str) -> None:
    """One size, in this process."""
    cfg = compose.load([*BASE, *SIZES[size]], check_rules=False).config
    os.environ |= arguments.environment(cfg)
    from runner.precision import kernels
    from runner.trainer.megatron import worker

    torch.set_num_threads(1)
    kernels.load()
    worker.initialize(cfg, 0, f"file://{tempfile.mkdtemp()}/rendezvous")
    built = worker.Worker(cfg)
    parameters = sum(p.numel() for p in built.model.parameters())
    before = _gib()
    for format in ("rollout", "bf16"):
        started = time.perf_counter()
        sent = sum(part.numel() * part.element_size() for tensor in built.export(format) for part in tensor.parts.values())  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        print(
            f"{size}: {parameters / 1e9:.3f} B weights, {format:7} {sent / 1e9:.3f} GB in {seconds:.2f} s; "
            f"peak {_gib():.2f} GiB, {before:.2f} before; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def main(sizes: list[str]) -> None:
    for size in sizes:
        subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.megatron_export", "--one", size], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
    else:
        main(sys.argv[1:] or ["tiny", "0.3b"])
