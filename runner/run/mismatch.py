"""How far the engine's logprobs are from the trainer's, always; and why, every N steps.

Shape legend: all rows are [R] fp32 of one sample's response; means run over tokens inside the loss mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runner.algorithms.estimators import MAX_LOG_RATIO
from runner.data import Batch, Sample
from runner.rollout.protocol import RolloutPool
from runner.trainer.protocol import Routes, StepResult, Trainer


def metrics(samples: Sequence[Sample], step: StepResult) -> dict[str, float]:
    """Mismatch of trained samples between `old_logprobs` (trainer) and `rollout_logprobs` (engine), d = trainer - engine.

    train/train_rollout_logprob_abs_diff   mean |d|
    train/train_rollout_kl_k1              mean -d            estimates KL(engine || trainer): tokens are the engine's
    train/train_rollout_kl_k3              mean exp(d) - 1 - d, |d| taken as 20 nats at most: a finite number
    train/train_rollout_ppl_ratio          exp(mean -d): the trainer's perplexity over the engine's
    .../lag_<n>                            the abs diff of tokens that were sampled n optimizer steps before `old_version`
    train/weight_version_lag               mean of n

    Empty when no token counts.
    """
    rows = [
        (old.cpu() - sample.rollout_logprobs.cpu())[sample.loss_mask.cpu()]
        for sample, old in zip(samples, step.old_logprobs, strict=True)
    ]
    difference = torch.cat(rows)
    if not len(difference):
        return {}
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    result = {
        "train/train_rollout_logprob_abs_diff": float(difference.abs().mean()),
        "train/train_rollout_kl_k1": float(-difference.mean()),
        "train/train_rollout_kl_k3": float((torch.expm1(bounded) - bounded).mean()),
        "train/train_rollout_ppl_ratio": math.exp(min(float(-difference.mean()), 80.0)),
    }
    return result | _by_lag(samples, difference, step.old_version)


def _by_lag(samples: Sequence[Sample], difference: torch.Tensor, version: int) -> dict[str, float]:
    lags = torch.cat([token_lags(sample, version)[sample.loss_mask.cpu()] for sample in samples])
    known = lags >= 0
    if not bool(known.any()):
        return {}
    result = {"train/weight_version_lag": float(lags[known].float().mean())}
    for lag in lags[known].unique().tolist():
        result[f"train/train_rollout_logprob_abs_diff/lag_{lag}"] = float(difference[lags == lag].abs().mean())
    return result


def token_lags(sample: Sample, version: int) -> torch.Tensor:
    """[R] int64: how many optimizer steps older than `version` the weights were that sampled each token; -1 unknown."""
    lags = torch.full((sample.response_length,), -1, dtype=torch.int64)
    for span in sample.weight_spans:
        lags[span.start : span.stop] = max(version - span.version, 0)
    return lags


def generation_logprobs(trainer: Trainer, batch: Batch, num_samples: int) -> list[torch.Tensor]:
    """[R] of the first `num_samples` samples: T[quantized, replayed] with the weights that they are being generated with."""
    part = batch.select(list(range(min(num_samples, len(batch)))))
    return [row.cpu() for row in trainer.logprobs(part, weights="quantized", routes=_recorded(part))]


def _recorded(part: Batch) -> Routes:
    return "replayed" if all(sample.routes is not None for sample in part.samples) else "own"


def engine_logprobs(pool: RolloutPool, batch: Batch, num_samples: int) -> list[torch.Tensor]:
    """[R] of the first `num_samples` samples: what the engines say of them now, with the newest weights; at temperature 1."""
    samples = batch.samples[:num_samples]
    rows = pool.score([sample.tokens for sample in samples], [sample.images for sample in samples])
    return [row[len(row) - sample.response_length :].cpu() for row, sample in zip(rows, samples, strict=True)]


def decompose(
    trainer: Trainer,
    batch: Batch,
    num_samples: int,
    generation: list[torch.Tensor] | None = None,
    engine_now: list[torch.Tensor] | None = None,
) -> dict[str, float]:
    """Split engine - T[master, own routes] into three signed parts, per token; they add up exactly by construction.

    With T[weights, routes] the trainer's logprobs:
        numerics      engine - T[quantized, replayed]                 kernels, batch shapes, KV cache precision
        routing       T[quantized, replayed] - T[quantized, own]      which experts were chosen
        quantization  T[quantized, own] - T[master, own]              the weights' grid

    A schedule that trains on samples of older weights gives `generation`: what `generation_logprobs` said of them (G), or []
    where they are not older. A fourth part stands between the first two then, and numerics is counted against the older weights:
        numerics      engine - G
        staleness     G - T[quantized, replayed]                      the updates since the samples were generated
    A sample whose tokens come from several versions has no such G. There `engine_now` (E) is given, by `engine_logprobs`:
        staleness     engine - E
        numerics      E - T[quantized, replayed]                      and how far recorded routes are from those of today

    `mismatch/<part>` is the mean signed difference, `mismatch/<part>_abs` the mean absolute one, `mismatch/total` and
    `mismatch/total_abs` those of the sum. `mismatch/residual` is the largest absolute error of the sum in fp64 (0).
    Samples without recorded routes (dense model, replay off) have no routing part: it is zero. Takes the first
    `num_samples` samples; the trainer's weights are the quantized ones again afterwards.
    """
    part = batch.select(list(range(min(num_samples, len(batch)))))
    own = trainer.logprobs(part, weights="quantized", routes="own")
    replayed = trainer.logprobs(part, weights="quantized", routes="replayed") if _recorded(part) == "replayed" else own
    master = trainer.logprobs(part, weights="master", routes="own")
    masks = [sample.loss_mask.cpu() for sample in part.samples]

    def flat(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([row.cpu().double()[mask] for row, mask in zip(rows, masks, strict=True)])

    engine, quantized_replayed = flat([sample.rollout_logprobs for sample in part.samples]), flat(replayed)
    quantized_own, master_own = flat(own), flat(master)
    if not len(engine):
        return {}
    if engine_now is not None:
        now = flat(engine_now)
        of_engine = {"numerics": now - quantized_replayed, "staleness": engine - now}
    elif generation is not None:
        generated = flat(generation) if generation else quantized_replayed
        of_engine = {"numerics": engine - generated, "staleness": generated - quantized_replayed}
    else:
        of_engine = {"numerics": engine - quantized_replayed}
    parts = {
        **of_engine,
        "routing": quantized_replayed - quantized_own,
        "quantization": quantized_own - master_own,
        "total": engine - master_own,
    }
    residual = sum(value for name, value in parts.items() if name != "total") - parts["total"]
    result = {f"mismatch/{name}": float(value.mean()) for name, value in parts.items()}
    result |= {f"mismatch/{name}_abs": float(value.abs().mean()) for name, value in parts.items()}
    result["mismatch/residual"] = float(residual.abs().max())
    return result
