"""QAT step time over BF16 step time, and over fake quantization in the forward, in one process.

    python -m benchmarks.qat_step [--tokens 4096] [--rounds 7] [--recompute none|full] [--micro-batch-tokens 2048]
        [--quantizer fused|eager]

The three kinds take turns step by step, so that a busy machine slows all of them alike; the figure is the median of
the ratios within a round. Aim: in place over BF16 at most 1.02 at 4,096 tokens or more per step.
A run loads the fused CPU quantizer by itself once eager torch has handled 2^30 weights, which is where loading it pays;
`--quantizer fused` starts with it, `--quantizer eager` measures the time before (a GPU takes the Triton kernel always).
Peak memory is that of a fresh process per kind (resident set), measured by this same program.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from runner.config import compose
from runner.config.schema import Config, QatPlacement
from runner.data import Batch, Sample, Status
from runner.precision import kernels
from runner.trainer.torch.trainer import TorchTrainer

KINDS = {
    "bf16": ("bf16", QatPlacement.in_place),
    "qat in place": ("int4", QatPlacement.in_place),
    "qat in the forward": ("int4", QatPlacement.forward),
}


def build_config(kind: str, args: argparse.Namespace) -> Config:
    fmt, placement = KINDS[kind]
    sizes = {"num_layers": args.layers, "hidden_size": args.hidden, "ffn_size": 2 * args.hidden, "head_dim": args.hidden // 4}
    sizes |= {"expert_ffn_size": args.hidden, "max_context_tokens": 512}
    changes = {f"model.{key}": value for key, value in sizes.items()}
    changes |= {f"precision.{side}.format": fmt for side in ("train", "rollout")}
    changes |= {"precision.qat_placement": placement.name, "trainer.max_tokens_per_gpu": args.micro_batch_tokens}
    changes |= {"trainer.recompute": args.recompute, "trainer.threads": args.threads, "trainer.optimizer.lr": 1e-4, "steps": 1000}
    groups = ["model=tiny_moe", "trainer=torch", "precision=int4_qat", "router_replay=none", "speculative=none"]
    overrides = [*groups, *(f"{key}={value}" for key, value in changes.items())]
    return compose.load(overrides, check_rules=False).config


def build_batch(tokens: int, length: int = 64, prompt: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples, advantages = [], []
    for index in range(-(-tokens // length)):
        response = length - prompt
        samples.append(
            Sample(
                prompt_id="p",
                sample_index=index,
                tokens=torch.randint(0, 272, (length,), generator=generator),
                response_length=response,
                loss_mask=torch.ones(response, dtype=torch.bool),
                rollout_logprobs=torch.full((response,), -5.0),
                status=Status.completed,
                finish_reason="stop",
            )  # fmt: skip
        )
        advantages.append(torch.full((response,), (-1.0) ** index))
    return Batch(samples=samples, advantages=advantages, temperature=1.0)


def one_step(trainer: TorchTrainer, batch: Batch) -> float:
    fresh = Batch(batch.samples, batch.advantages, batch.temperature)
    started = time.perf_counter()
    trainer.step(fresh)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mib(kind: str, args: argparse.Namespace) -> float:
    """Peak memory of two steps in this process: of the device, or the resident set on a CPU."""
    trainer, batch = TorchTrainer(build_config(kind, args)), build_batch(args.tokens)
    for _ in range(2):
        one_step(trainer, batch)
    if trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quantizer", choices=["fused", "eager"], default="fused")
    parser.add_argument("--peak", choices=list(KINDS), help="only print the peak memory of one kind, in MiB")
    args = parser.parse_args()
    if args.quantizer == "fused":
        kernels.load()
    if args.peak:
        print(json.dumps(peak_mib(args.peak, args)))
        return 0
    trainers = {kind: TorchTrainer(build_config(kind, args)) for kind in KINDS}
    batch = build_batch(args.tokens)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_index in range(args.rounds + 1):
        for kind, trainer in trainers.items():
            seconds = one_step(trainer, batch)
            if round_index:  # the first round compiles and allocates
                times[kind].append(seconds)
    print(
        f"{batch.num_tokens} tokens per step, micro-batches of {args.micro_batch_tokens}, "
        f"recompute {args.recompute}, {args.quantizer} quantizer, {args.rounds} rounds"
    )
    for kind, rows in times.items():
        command = [sys.executable, "-m", "benchmarks.qat_step", *sys.argv[1:], "--peak", kind]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{kind:20s} median {statistics.median(rows):.4f} s  min {min(rows):.4f} s  peak {peak:.0f} MiB")
    base, ours, forward = (times[kind] for kind in KINDS)
    for name, other in (("bf16", base), ("qat in the forward", forward)):
        paired = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        medians = statistics.median(ours) / statistics.median(other)
        print(f"qat in place / {name}: {paired:.3f} (of the medians {medians:.3f}, of the smallest {min(ours) / min(other):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
