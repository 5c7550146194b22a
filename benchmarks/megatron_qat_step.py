"""Step time of INT4 QAT on Megatron ranks: in place against bf16 and against fake quantization in every forward.

A process of one rank and one thread for each kind, taking turns step by step, so that a busy machine slows all of them alike.
(Three workers in one process are no comparison: whichever was built last was the fastest by 20 %.) Times are the rank's CPU
time, which other programs stretch less. Prints minimum, median and peak memory of each, and the ratios within rounds.

    python -m benchmarks.megatron_qat_step [rounds] [key=value ...]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from runner.config import compose
from runner.config.schema import Config
from runner.data import Batch, Sample, Status
from runner.trainer import share
from runner.trainer.megatron import arguments
from runner.trainer.megatron.shares import Division

TOKENS = 4096  # per step, and per micro-batch: the least that a step of a real run has
LENGTH = 128
MODEL = (
    "trainer=megatron", "parallelism=single", "model=tiny_moe", "model.hidden_size=256", "model.expert_ffn_size=256",
    "model.num_experts=8", "model.num_heads=8", "model.num_kv_heads=4", f"trainer.max_tokens_per_gpu={TOKENS}",
    "trainer.recompute=full", "router_replay=none", "rollout.sampling.max_response_tokens=64", "task.max_prompt_tokens=64",
)  # fmt: skip
KINDS = {
    "bf16": ("precision=bf16",),
    "in place": ("precision=int4_qat",),
    "forward": ("precision=int4_qat", "precision.qat_placement=forward"),
}


def _batch(cfg: Config) -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(TOKENS // LENGTH):
        tokens = torch.randint(3, cfg.model.vocab_size, (LENGTH,), generator=generator)
        response = LENGTH - 1
        samples.append(
            Sample(
                prompt_id=str(index),
                sample_index=0,
                tokens=tokens,
                response_length=response,
                loss_mask=torch.ones(response, dtype=torch.bool),
                rollout_logprobs=torch.full((response,), -5.0),
                status=Status.completed,
                finish_reason="stop",
            )
        )
    advantages = [torch.full((LENGTH - 1,), 1.0 - 2.0 * (index % 2)) for index in range(len(samples))]
    return Batch(samples=samples, advantages=advantages, temperature=1.0)


def serve(kind: str, extra: list[str]) -> None:
    """One kind's rank: a step for every line on stdin, its CPU seconds on stdout; memory in GiB when stdin ends."""
    cfg = compose.load([*MODEL, *KINDS[kind], *extra], check_rules=False).config
    os.environ |= arguments.environment(cfg)
    from runner.precision import kernels
    from runner.trainer.megatron import worker

    torch.set_num_threads(1)
    kernels.load()  # a run of this size would load them after its first steps
    worker.initialize(cfg, 0, f"file://{tempfile.mkdtemp()}/rendezvous")
    rank = worker.Worker(cfg)
    (steps,) = share.steps(cfg, _batch(cfg), Division(cfg).divide)
    print(sum(parameter.numel() for parameter in rank.model.parameters()), flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        rank.updates(steps)
        rank.quantization.settle()
        print(time.process_time() - started, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)


def _ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main(rounds: int, extra: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.megatron_qat_step", "--serve"]
    ranks: dict[str, subprocess.Popen[str]] = {}
    for kind in KINDS:
        ranks[kind] = subprocess.Popen([*command, kind, *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parameters = [int(rank.stdout.readline()) for rank in ranks.values() if rank.stdout is not None]
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, rank in ranks.items():
            took = _ask(rank)
            if number:  # the first one allocates
                times[kind].append(took)
    print(f"{parameters[0] / 1e6:.1f} M weights, {TOKENS} tokens a step, full recompute, load {os.getloadavg()[0]:.1f}")
    for kind, rows in times.items():
        peak = float(ranks[kind].communicate()[0])
        ratios = [a / b for a, b in zip(rows, times["bf16"], strict=True)]
        print(
            f"{kind:9} min {min(rows):.3f} s  median {statistics.median(rows):.3f} s  peak {peak:.2f} GiB  over bf16: "
            f"min/min {min(rows) / min(times['bf16']):.3f}, median of rounds {statistics.median(ratios):.3f}"
        )
    forward = [a / b for a, b in zip(times["in place"], times["forward"], strict=True)]
    print(f"in place over forward: median of rounds {statistics.median(forward):.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 7, sys.argv[2:])
