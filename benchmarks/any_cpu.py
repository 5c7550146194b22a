"""bf16 on this CPU: torch's own matmul against the widened one, and what that makes of a trainer's step and of a rollout.

    python -m benchmarks.any_cpu [rounds]      default 5; every number is a ratio to something in the same process

The default model. A step is one supervised update of 256 sequences of 34 tokens; a rollout is 256 samples of 24 tokens. What is
compared takes turns, so that a busy machine slows all of it; the best round of each counts. Exit code 1 where a bf16 step takes
more than 1.3 times an fp32 step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from benchmarks.engine import build_pool
from runner.config import compose
from runner.config.schema import CpuMatmul
from runner.data import Request, SamplingParams
from runner.precision import cpu_matmul
from runner.tracking.folder import environment
from runner.trainer.torch.trainer import TorchTrainer

SHAPE = (2048, 128, 512)
SEQUENCES, TOKENS, PROMPT = 256, 34, 12
SAMPLES, NEW_TOKENS = 256, 24
AIM = 1.3


def best(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the best round of each, after one that warms up."""
    seconds = dict.fromkeys(works, float("inf"))
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def taking(way: CpuMatmul, work: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        cpu_matmul.install(way)
        return work()

    return call


def products(rounds: int) -> None:
    rows, inner, columns = SHAPE
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    a_bf16, b_bf16 = a.to(torch.bfloat16), b.to(torch.bfloat16)
    torch.set_num_threads(1)
    works: dict[str, Callable[[], object]] = {
        "fp32": taking(CpuMatmul.native, lambda: a @ b),
        "bf16 native": taking(CpuMatmul.native, lambda: a_bf16 @ b_bf16),
        "bf16 widened": taking(CpuMatmul.widened, lambda: a_bf16 @ b_bf16),
    }
    for name, seconds in best(works, rounds).items():
        print(f"{rows} x {inner} x {columns}, one thread, {name:13} {2e-9 * rows * inner * columns / seconds:7.1f} GFLOP/s")


def step(dtype: str) -> Callable[[], object]:
    """One update of a trainer of its own."""
    overrides = ["precision=bf16", f"precision.base_dtype={dtype}"]
    trainer = TorchTrainer(compose.load(overrides, check_rules=False).config)
    tokens = torch.randint(5, 250, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    pairs = [(row, PROMPT) for row in tokens]
    return lambda: trainer.sft_step(pairs, lr=1e-3, images=[None] * SEQUENCES)


def steps(chosen: CpuMatmul, rounds: int) -> float:
    """Prints the seconds of a step; returns bf16 over fp32 in the way that this machine takes."""
    bf16, fp32 = step("bfloat16"), step("float32")
    works = {"fp32": taking(chosen, fp32), f"bf16 {chosen.name}": taking(chosen, bf16)}
    seconds = best(works, rounds)
    other = CpuMatmul.native if chosen is CpuMatmul.widened else CpuMatmul.widened
    seconds |= best({f"bf16 {other.name}": taking(other, bf16)}, 1)
    for name, value in seconds.items():
        print(f"trainer step, {SEQUENCES} x {TOKENS} tokens, {name:13} {value:7.2f} s = {value / seconds['fp32']:5.2f} x fp32")
    return seconds[f"bf16 {chosen.name}"] / seconds["fp32"]


def rollouts(chosen: CpuMatmul, rounds: int) -> None:
    def generate(precision: str) -> Callable[[], object]:
        pool, _ = build_pool(precision, "none", SAMPLES)
        sampling = SamplingParams(temperature=1.0, max_response_tokens=NEW_TOKENS, stop_token_ids=())
        prompts = torch.randint(5, 250, (SAMPLES, PROMPT), generator=torch.Generator().manual_seed(1))
        requests = [
            Request(f"p{i}", 0, tuple(row), sampling, seed=i, capture_routes=True) for i, row in enumerate(prompts.tolist())
        ]
        return lambda: list(pool.generate(requests))

    cpu_matmul.install(chosen)
    seconds = best({name: taking(chosen, generate(name)) for name in ("bf16", "int4_qat")}, rounds)
    for name, value in seconds.items():
        print(f"rollout, {SAMPLES} x {NEW_TOKENS} tokens, {name:8} {chosen.name} {SAMPLES * NEW_TOKENS / value:7.0f} tokens/s")


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cfg = compose.load(["precision=bf16"]).config
    threads = torch.get_num_threads()
    chosen, reason = cpu_matmul.choose(CpuMatmul.auto)
    found = environment(cfg)
    print(f"{found['cpu']}, {found['cpu_cores']} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print(f"precision.cpu_matmul=auto takes {chosen.name}: {reason}")
    products(rounds)
    torch.set_num_threads(threads)
    ratio = steps(chosen, rounds)
    rollouts(chosen, rounds)
    print(f"bf16 over fp32, a trainer's step: {ratio:.2f} (aim: {AIM} at most)")
    return 0 if ratio <= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
