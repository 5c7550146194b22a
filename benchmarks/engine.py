"""Tokens/s of the in-process engine against transformers' generate: same model, same prompts, same lengths, one process.

    python -m benchmarks.engine [batch] [new tokens]     default 128 and 48

Both sample at temperature 1. The engine also gives two logprobs per token (generate's output_logits stays off), and in the
rows "with routes" the experts of every token. generate runs in bf16 with every pairing of attention and experts
implementation and cache that this transformers has for a CPU; the two fastest of a first round take part in the others,
whose order alternates. The best of each counts, and the median is shown beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from runner.config import compose
from runner.data import Request, SamplingParams
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision.codec import encode
from runner.precision.plan import PrecisionPlan
from runner.rollout.local import LocalPool

ROUNDS = 5


def build_pool(precision: str, speculative: str, batch: int) -> tuple[LocalPool, torch.nn.Module]:
    """An engine and the plain model (bf16, not quantized) over weights from one seed; speculation is never switched off."""
    cfg = compose.load_config(
        ["model=tiny_moe", f"precision={precision}", f"speculative={speculative}", f"rollout.max_concurrency={batch}"]
        + ["speculative.auto_disable=false"]
    )
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    built = build_model(cfg.model, dtype=torch.bfloat16, seed=1)
    views = disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, built))
    pool = LocalPool(cfg)
    report = pool.update_weights(0, (encode(name, view.detach(), plan.format_of(name)) for name, view in views))
    assert not report.problems, report.problems
    return pool, built


def transformers_runs(
    built: torch.nn.Module, overrides: list[str], prompts: torch.Tensor, new_tokens: int
) -> dict[str, Callable[[], int]]:
    """generate on copies of the model with other implementations of attention, experts and cache."""
    runs: dict[str, Callable[[], int]] = {}
    model = compose.load_config(overrides).model
    for attention in ("sdpa", "eager"):
        for experts in ("grouped_mm", "eager"):
            twin = build_model(model, dtype=torch.bfloat16, seed=1, attention=attention, experts=experts)
            twin.load_state_dict(built.state_dict())
            for cache in ("dynamic", "static"):

                def generate(twin: torch.nn.Module = twin, cache: str = cache) -> int:
                    with torch.inference_mode():
                        output = twin.generate(
                            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=True,
                            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
                            cache_implementation=cache, disable_compile=True,
                        )  # fmt: skip
                    return output[:, prompts.shape[1] :].numel()

                runs[f"generate bf16 {attention} {experts} {cache}"] = generate
    return runs


def main(batch: int = 128, new_tokens: int = 48) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 270, (batch // 8, 16), generator=generator).repeat_interleave(8, 0)
    params = SamplingParams(temperature=1.0, max_response_tokens=new_tokens)
    requests = [Request(str(i // 8), i % 8, tuple(row), params, seed=i) for i, row in enumerate(prompts.tolist())]
    with_routes = [replace(request, capture_routes=True) for request in requests]
    runs: dict[str, Callable[[], int]] = {}
    built = None

    def engine_run(pool: LocalPool, wanted: list[Request]) -> Callable[[], int]:
        return lambda: sum(sample.response_length for sample in pool.generate(wanted))

    for precision in ("bf16", "int4_qat"):
        for speculative in ("none", "ngram"):
            pool, built = build_pool(precision, speculative, batch)
            runs[f"engine {precision} speculative={speculative}"] = engine_run(pool, requests)
            if speculative == "none":
                runs[f"engine {precision} with routes"] = engine_run(pool, with_routes)
    assert built is not None
    runs |= transformers_runs(built, ["model=tiny_moe"], prompts, new_tokens)
    trial = {}
    for name, run in runs.items():
        run()  # compiles, fills caches
        began = time.perf_counter()
        run()
        trial[name] = time.perf_counter() - began
        print(f"first round: {name:40} {trial[name]:6.2f} s", flush=True)
    slow = sorted((name for name in runs if name.startswith("generate")), key=trial.__getitem__)[2:]
    runs = {name: run for name, run in runs.items() if name not in slow}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            began = time.perf_counter()
            tokens = runs[name]()
            seconds[name].append((time.perf_counter() - began) / tokens)
    reference = min(min(times) for name, times in seconds.items() if name.startswith("generate"))
    print(
        f"batch {batch}, {new_tokens} new tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, {ROUNDS} rounds"
    )
    for name, times in seconds.items():
        best, middle = min(times), sorted(times)[ROUNDS // 2]
        print(f"{name:40} best {1 / best:8.0f}  median {1 / middle:8.0f} tokens/s   {reference / best:5.2f} x the best generate")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
