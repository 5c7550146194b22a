"""The SGLang pool against driving one server by hand, and what weight syncs cost; real servers on this machine's CPU.

    python -m benchmarks.sglang_pool [samples] [new tokens]     default 64 and 32; needs make setup-sglang

"one by one" sends a request when the answer to the one before has come; "one batch" sends all in a single call, which is the
most that one caller can do. The pool sends every sample by itself, keeps them apart by seed, and decodes routes. All three
use the same server, rounds alternate, and the median of each counts. "stall" is how long nothing is generated when weights
change while all samples run: they are aborted and go on from what they have.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from runner.config import compose
from runner.data import Request, SamplingParams
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision.codec import encode

ROUNDS = 3


def build(precision: str, samples: int) -> tuple[Any, float]:
    """(pool with weights, seconds until its server answered)."""
    from runner.rollout.sglang import SglangPool

    cfg = compose.load_config(
        ["model=tiny_moe", "rollout=sglang", "speculative=none", f"precision={precision}", f"rollout.max_concurrency={samples}"]
    )
    began = time.perf_counter()
    return SglangPool(cfg), time.perf_counter() - began


def sync(pool: Any, version: int) -> Any:
    built = build_model(pool._cfg.model, dtype=torch.bfloat16, seed=version)
    views = disk_tensors(family_of(pool._cfg.model), pool._cfg.model, named_weights(pool._cfg.model, built))
    report = pool.update_weights(version, (encode(name, view.detach(), pool.plan.format_of(name)) for name, view in views))
    assert not report.problems, report.problems
    return report


def throughput(pool: Any, samples: int, new_tokens: int) -> dict[str, float]:
    """Tokens/s, median of the rounds."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(16, 272, (24,), generator=generator).tolist()) for _ in range(samples)]
    sampling = SamplingParams(1.0, new_tokens)
    requests = [Request(f"p{i}", 0, prompt, sampling, seed=i, capture_routes=True) for i, prompt in enumerate(prompts)]
    client = pool._fleet.roster.engines[0].client
    params = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"return_logprob": True, "return_routed_experts": True}

    def one_by_one(count: int) -> int:
        for index, prompt in enumerate(prompts[:count]):
            sampled = {**params, "sampling_seed": index}
            pool._loop.run(client.generate({**body, "input_ids": list(prompt), "sampling_params": sampled}))
        return count * new_tokens

    def one_batch() -> int:
        each = [{**params, "sampling_seed": index} for index in range(samples)]
        pool._loop.run(client.generate({**body, "input_ids": [list(p) for p in prompts], "sampling_params": each}))
        return samples * new_tokens

    runs: dict[str, Callable[[], int]] = {
        "one by one": lambda: one_by_one(max(1, samples // 8)),
        "one batch": one_batch,
        "pool": lambda: sum(sample.response_length for sample in pool.generate(requests)),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = run()
            if round_:  # the first is for warming up
                rates[name].append(tokens / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def stall(pool: Any, samples: int) -> tuple[float, int]:
    """(seconds without generation, samples that were continued) of one update in the middle of a run."""
    pool.metrics()
    lengths = [4] + [100] * (samples - 1)
    requests = [Request(f"s{i}", 0, (20 + i,) * 8, SamplingParams(1.0, n), i, capture_routes=True) for i, n in enumerate(lengths)]
    run = pool.generate(requests)
    next(run)
    sync(pool, 100)
    list(run)
    found = pool.metrics()
    return found["perf/rollout_stall_time"], int(found["rollout/requests_continued"])


def main() -> None:
    if importlib.util.find_spec("sglang") is None:
        print("SGLang is not installed here: make setup-sglang")
        return
    given = [int(text) for text in sys.argv[1:]]
    samples, new_tokens = (*given, *(64, 32)[len(given) :])
    print(f"tiny_moe, {samples} samples of {new_tokens} tokens, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    for precision in ("bf16", "int4_qat"):
        pool, seconds = build(precision, samples)
        try:
            first = sync(pool, 1)
            later = [sync(pool, version) for version in range(2, 2 + ROUNDS)]
            rates = throughput(pool, samples, new_tokens)
            stalls = [stall(pool, samples) for _ in range(ROUNDS)]
        finally:
            pool.close()
        median = statistics.median(report.seconds for report in later)
        print(
            f"{precision:9} start {seconds:5.1f} s   sync {later[0].wire_bytes / 1e6:.2f} MB: first (all resident tensors "
            f"checked) {first.seconds:.2f} s, later ({later[0].resident_checked} tensors) {median:.2f} s"
        )
        stalled = statistics.median(seconds for seconds, _ in stalls)
        print(f"{'':9} update with {stalls[0][1]} of {samples} samples running: stall {stalled:.2f} s")
        line = "   ".join(f"{name} {rate:7.0f} tokens/s" for name, rate in rates.items())
        print(f"{'':9} {line}   pool / one by one {rates['pool'] / rates['one by one']:.1f}x, / one batch "
              f"{rates['pool'] / rates['one batch']:.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
