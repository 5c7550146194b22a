"""Step time of INT4 QAT on Megatron ranks: in place against bf16 and against fake quantization in every forward.

One process, one rank, one thread, three workers of the same model in turn, rounds interleaved. Times are the process's CPU
time, which other programs on the machine do not stretch. Prints minimum and median over rounds, and the ratios.

    python -m benchmarks.megatron_qat_step [rounds] [key=value ...]
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from runner import compose
from runner.samples import Batch, Sample, Status
from runner.schema import Config
from runner.trainer.megatron import arguments

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


def _seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def main(rounds: int, extra: list[str]) -> None:
    configs = {kind: compose.load([*MODEL, *overrides, *extra], check_rules=False).config for kind, overrides in KINDS.items()}
    os.environ |= arguments.environment(configs["bf16"])
    from runner.precision import kernels
    from runner.trainer.megatron import worker

    torch.set_num_threads(1)
    kernels.load()  # a run of this size would load them after its first steps
    worker.initialize(configs["bf16"], 0, f"file://{tempfile.mkdtemp()}/rendezvous")
    workers = {kind: worker.Worker(cfg) for kind, cfg in configs.items()}
    batches = {kind: _batch(cfg) for kind, cfg in configs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind in KINDS:
            took = _seconds(lambda kind=kind: (workers[kind].step(batches[kind]), workers[kind].quantization.settle()))  # type: ignore[misc]
            if number:  # the first compiles
                times[kind].append(took)
    parameters = sum(p.numel() for p in workers["bf16"].model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    load = os.getloadavg()[0]
    print(f"{parameters / 1e6:.1f} M weights, {TOKENS} tokens a step, full recompute, load {load:.1f}, peak {peak:.2f} GiB")
    for kind, rows in times.items():
        ratios = [a / b for a, b in zip(rows, times["bf16"], strict=True)]
        print(
            f"{kind:9} min {min(rows):.3f} s  median {statistics.median(rows):.3f} s  over bf16: "
            f"min/min {min(rows) / min(times['bf16']):.3f}, median of rounds {statistics.median(ratios):.3f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7, sys.argv[2:])
