"""Tokens/s of the in-process engine against transformers' generate: same model, same prompts, same lengths, one process.

python -m benchmarks.engine [batch] [new tokens]     default 128 and 48; best of three rounds, the order alternates
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from runner import compose
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision.formats import encode
from runner.precision.plan import PrecisionPlan
from runner.rollout.local import LocalPool
from runner.samples import Request, SamplingParams

ROUNDS = 3


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


def main(batch: int = 128, new_tokens: int = 48) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 270, (batch // 8, 16), generator=generator).repeat_interleave(8, 0)
    params = SamplingParams(temperature=1.0, max_response_tokens=new_tokens)
    requests = [Request(str(i // 8), i % 8, tuple(row), params, seed=i) for i, row in enumerate(prompts.tolist())]
    runs: dict[str, Callable[[], int]] = {}
    built = None
    for precision in ("bf16", "int4_qat"):
        for speculative in ("none", "ngram"):
            pool, built = build_pool(precision, speculative, batch)
            runs[f"engine {precision} speculative={speculative}"] = lambda pool=pool: sum(
                sample.response_length for sample in pool.generate(requests)
            )

    def transformers_generate() -> int:
        with torch.inference_mode():
            output = built.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return output[:, prompts.shape[1] :].numel()

    runs["transformers generate bf16"] = transformers_generate
    best = dict.fromkeys(runs, 0.0)
    for number in range(ROUNDS):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            began = time.perf_counter()
            tokens = runs[name]()
            best[name] = max(best[name], tokens / (time.perf_counter() - began))
    reference = best["transformers generate bf16"]
    print(f"batch {batch}, {new_tokens} new tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, rate in best.items():
        print(f"{name:40} {rate:10.0f} tokens/s   {rate / reference:5.2f} x transformers")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
