"""Evaluation on held-out prompts: mean reward and pass@k."""

from __future__ import annotations

import math
from collections import defaultdict

from runner.config.schema import Config
from runner.data import SamplingParams, Status
from runner.errors import UserError
from runner.run.collect import Collector


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n - c, k) / C(n, k) of one prompt (Chen et al. 2021, arXiv 2107.03374)."""
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate(cfg: Config, collector: Collector, step: int) -> dict[str, float]:
    """`eval/<task>` (mean reward), `eval/<task>_pass@k` and response length, with the evaluation's own sampling."""
    section = cfg.evaluation
    prompts = collector.task.eval_prompts(section.num_prompts)
    sampling = SamplingParams(
        temperature=section.sampling.temperature,
        max_response_tokens=section.sampling.max_response_tokens,
        top_p=section.sampling.top_p,
        top_k=section.sampling.top_k,
        stop_token_ids=collector.stop_token_ids,
    )
    # Evaluation draws from streams of its own: the negative step never meets a training step's seeds.
    samples = collector.generate(prompts, section.samples_per_prompt, sampling, step=-1 - step, capture_routes=False)
    samples = [sample for sample in samples if sample.status is not Status.failed]  # the engine's fault, not the policy's
    if not samples:
        raise UserError("every sample of the evaluation failed in the engine", key="rollout", fix="the warning above says why")
    rewards: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        rewards[sample.prompt_id].append(sample.reward or 0.0)
    name, k = cfg.task.name, section.samples_per_prompt
    values = [value for group in rewards.values() for value in group]
    metrics = {
        f"eval/{name}": sum(values) / len(values),
        f"eval/{name}_response_len": sum(sample.response_length for sample in samples) / len(samples),
    }
    if k > 1:
        passes = [pass_at_k(len(group), sum(value >= 1.0 for value in group), k) for group in rewards.values() if len(group) >= k]
        if passes:
            metrics[f"eval/{name}_pass@{k}"] = sum(passes) / len(passes)
    return metrics
