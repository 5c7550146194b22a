"""Ranges of numbers, and texts that name one of a few choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from runner.errors import UserError
from runner.models import FAMILIES
from runner.schema import Config

AT_LEAST_ONE = [
    "steps",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.expert_groups",
    "model.expert_groups_top_k",
    "model.num_kv_heads",
    "model.vocab_size",
    "model.max_context_tokens",
    "parallelism.ranks",
    "parallelism.tp",
    "parallelism.pp",
    "parallelism.cp",
    "parallelism.ep",
    "parallelism.etp",
    "parallelism.engine_ep",
    "trainer.max_tokens_per_gpu",
    "trainer.max_nan_steps",
    "trainer.logprob_chunk_tokens",
    "rollout.sampling.max_response_tokens",
    "rollout.max_concurrency",
    "rollout.prefill_chunk_tokens",
    "rollout.cuda_graph_max_batch",
    "rollout.chunked_prefill_tokens",
    "rollout.cpu_engines",
    "rollout.cpu_tp",
    "speculative.auto_disable_after_steps",
    "speculative.ngram_min",
    "speculative.ngram_max",
    "task.max_prompt_tokens",
    "task.max_turns",
    "task.digits",
    "task.grid",
    "task.cell_pixels",
    "task.max_image_pixels",
    "task.eval_problems",
    "algorithm.samples_per_prompt",
    "algorithm.prompts_per_step",
    "algorithm.updates_per_rollout",
    "cluster.nodes",
    "warm_start.max_steps",
    "warm_start.batch_size",
    "warm_start.check_interval_steps",
    "evaluation.num_prompts",
    "evaluation.samples_per_prompt",
    "evaluation.sampling.max_response_tokens",
    "checkpoint.keep",
    "watch.window_steps",
    "convert.workers",
    "convert.calibration_samples",
    "convert.calibration_tokens",
]
NOT_NEGATIVE = [
    "parallelism.gpus",
    "parallelism.gpus_per_engine",
    "parallelism.rollout_gpus",
    "model.num_experts",
    "model.num_dense_layers",
    "model.num_shared_experts",
    "model.num_mtp_layers",
    "trainer.optimizer.lr_warmup_steps",
    "trainer.optimizer.weight_decay",
    "trainer.threads",
    "rollout.kv_cache_tokens",
    "rollout.max_retries",
    "speculative.num_draft_tokens",
    "speculative.mtp_loss_coef",
    "algorithm.clip_low",
    "algorithm.clip_high",
    "algorithm.dual_clip",
    "algorithm.kl_coef",
    "algorithm.entropy_coef",
    "algorithm.max_resample_rounds",
    "algorithm.oversample_prompts",
    "algorithm.correction_low",
    "cluster.gpus_per_node",
    "evaluation.interval_steps",
    "checkpoint.interval_steps",
    "mismatch.decompose_interval_steps",
    "mismatch.decompose_samples",
    "mismatch.probe_sequences",
    "mismatch.residency_tensors",
    "task.max_train_problems",
    "task.max_eval_problems",
    "evaluation.sampling.temperature",
    "seed",
]
ABOVE_ZERO = [
    "trainer.optimizer.lr",
    "trainer.optimizer.eps",
    "trainer.optimizer.clip_grad_norm",
    "rollout.sampling.temperature",
    "rollout.request_timeout_seconds",
    "rollout.startup_timeout_seconds",
    "rollout.memory_fraction",
    "task.reward_timeout_seconds",
    "algorithm.correction_high",
    "cluster.gpu_memory_gib",
    "cluster.host_memory_gib",
    "warm_start.lr",
    "model.rope_theta",
    "model.norm_eps",
    "convert.damping",
    "evaluation.sampling.top_p",
]
AT_MOST_ONE = [
    "trainer.optimizer.beta1",
    "trainer.optimizer.beta2",
    "trainer.optimizer.lr_min_ratio",
    "rollout.memory_fraction",
    "warm_start.stop_at_reward",
    "task.clutter",
    "evaluation.sampling.top_p",
]
CHOICES = {
    "model.family": tuple(FAMILIES),
    "model.router_score": ("softmax", "sigmoid"),
    "precision.base_dtype": ("bfloat16", "float32"),
    "precision.fp8_matmul": ("simulated", "scaled_mm"),
    "precision.kv_cache": ("bf16", "fp8_e4m3"),
    "trainer.optimizer.lr_schedule": ("constant", "linear", "cosine"),
    "trainer.recompute": ("none", "selective", "full"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "trainer.moe_token_dispatcher": ("alltoall", "allgather", "flex"),
    "rollout.device": ("auto", "cpu", "cuda"),
    "rollout.weight_transport": ("tensor", "distributed", "disk_full", "disk_delta", "p2p"),
    "rollout.transfer_protocol": ("rdma", "tcp"),
    "rollout.pause_mode": ("abort", "retract", "in_place"),
    "speculative.method": ("none", "ngram", "draft", "mtp", "eagle"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "cluster.launcher": ("local", "ray", "slurm", "k8s"),
    "tracking.wandb_mode": ("offline", "online", "disabled"),
    "convert.method": ("rtn", "gptq"),
}


def value_at(cfg: Config, key: str) -> Any:
    """The value of a dotted key; None where the chosen option has no such key (trainer.device under megatron)."""
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def ranges(cfg: Config) -> Iterator[UserError]:
    bounds = (
        (AT_LEAST_ONE, lambda v: v >= 1, "at least 1", 1),
        (NOT_NEGATIVE, lambda v: v >= 0, "0 or more", 0),
        (ABOVE_ZERO, lambda v: v > 0, "above 0", None),
        (AT_MOST_ONE, lambda v: 0 <= v <= 1, "from 0 to 1", 1),
    )
    for keys, allowed, text, nearest in bounds:
        for key in keys:
            value = value_at(cfg, key)
            if value is not None and not allowed(value):
                fix = f"{key}={nearest}" if nearest is not None else f"a number {text}"
                yield UserError(f"{value} must be {text}", key=key, fix=fix)


def choices(cfg: Config) -> Iterator[UserError]:
    for key, known in CHOICES.items():
        value = value_at(cfg, key)
        if value is not None and value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            fix = f"{key}={close[0]}" if close else f"one of: {', '.join(known)}"
            yield UserError(f"{value!r} is none of {', '.join(known)}", key=key, fix=fix)


def targets(cfg: Config) -> Iterator[UserError]:
    """`_target_` names a class of this project, never something that happens to be importable."""
    for group in ("trainer", "rollout", "task"):
        target = getattr(cfg, group)._target_
        if not target.startswith("runner."):
            yield UserError(
                f"{target} is not a part of runner", key=f"{group}._target_", fix=f"choose an option of {group} instead"
            )


RULES = (ranges, choices, targets)
