"""A tiny Config for the trainer's tests, written out so that the tests do not move with conf/."""

from __future__ import annotations

import torch

from runner import schema
from runner.samples import Batch, Sample, Status, WeightSpan
from runner.schema import (
    Config,
    Convention,
    Correction,
    Estimator,
    GridConfig,
    LossAggregation,
    ModelConfig,
    QatPlacement,
)
from runner.trainer.torch.option import TorchTrainerConfig

MOE: dict[str, object] = dict(  # noqa: C408
    name="tiny_moe", family="qwen3_moe", hf_checkpoint=None, num_layers=2, hidden_size=32,
    ffn_size=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=272, max_context_tokens=128, rope_theta=1e4,
    norm_eps=1e-6, tied_embeddings=True, attention_bias=False, qk_norm=True, initializer_range=0.1, num_experts=4,
    experts_top_k=2, expert_ffn_size=32, num_shared_experts=0, num_dense_layers=0, router_score="softmax",
    router_bias=False, routed_scaling_factor=1.0, expert_groups=1,
    expert_groups_top_k=1, q_lora_rank=0, kv_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0,
    v_head_dim=0, num_mtp_layers=0, vision=False, toy_twin="tiny_moe",
)  # fmt: skip
DENSE = {**MOE, "name": "tiny_dense", "family": "qwen3", "num_experts": 0, "experts_top_k": 0, "expert_ffn_size": 0}
DENSE["num_dense_layers"] = 2
MLA = {
    **MOE, "name": "tiny_mla", "family": "deepseek", "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "qk_norm": False,
    "num_shared_experts": 1, "num_dense_layers": 1, "router_score": "sigmoid", "router_bias": True,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "tied_embeddings": False,
}  # fmt: skip


def config(model: dict[str, object] = MOE, **changes: object) -> Config:
    """`changes` set dotted keys, for example `**{"algorithm.kl_coef": 0.1}`; `format` sets train and rollout formats."""
    fmt = str(changes.pop("format", "int4"))
    train, rollout = (GridConfig(format=fmt, group_size=32, convention=Convention.exact) for _ in range(2))
    optimizer = schema.OptimizerConfig(
        lr=1e-2, lr_schedule="constant", lr_warmup_steps=0, lr_min_ratio=0.0, weight_decay=0.1, beta1=0.9, beta2=0.98,
        eps=1e-8, clip_grad_norm=1.0, cpu_offload=False,
    )  # fmt: skip
    cfg = Config(
        precision=schema.PrecisionConfig(
            name="test", group_size=32, convention=Convention.exact, roles=None, train=train, rollout=rollout,
            qat_placement=QatPlacement.in_place, base_dtype="bfloat16", kv_cache="bf16", fp8_backward=False,
            fp8_matmul="simulated",
            fp8_param_gather=False,
            cpu_matmul=schema.CpuMatmul.auto,
        ),
        trainer=TorchTrainerConfig(
            _target_="runner.trainer.torch.TorchTrainer", name="torch", optimizer=optimizer, max_tokens_per_gpu=96,
            recompute="none", max_nan_steps=3, logprob_chunk_tokens=4096, threads=1, master_weights=True, device="cpu",
        ),
        router_replay=schema.RouterReplayConfig(name="none", trainer=False, rollout=False),
        speculative=schema.SpeculativeConfig(name="none", method="none", online_training=False, mtp_loss_coef=0.0),
        algorithm=schema.AlgorithmConfig(
            name="grpo", estimator=Estimator.grpo, samples_per_prompt=4, prompts_per_step=2, updates_per_rollout=1,
            normalize_by_std=True, clip_low=0.2, clip_high=0.28, dual_clip=0.0,
            loss_aggregation=LossAggregation.token_mean, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0,
            dynamic_sampling=False, max_resample_rounds=1, oversample_prompts=0, correction=Correction.none,
            correction_low=0.5, correction_high=2.0,
        ),
        model=ModelConfig(**model),
        steps=10,
        seed=3,
    )  # fmt: skip
    for key, value in changes.items():
        target: object = cfg
        *path, last = key.split(".")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return cfg


def batch(cfg: Config, size: int = 8, seed: int = 0, *, routes: bool = False) -> Batch:
    """Random prompts and responses of differing lengths, advantages of both signs, one masked response token."""
    generator = torch.Generator().manual_seed(seed)
    model, samples, advantages = cfg.model, [], []
    layers = model.num_layers - model.num_dense_layers
    for index in range(size):
        prompt, response = 3 + index % 3, 4 + (index * 5) % 9
        tokens = torch.randint(0, model.vocab_size, (prompt + response,), generator=generator)
        mask = torch.ones(response, dtype=torch.bool)
        mask[0] = index % 2 == 0
        recorded = None
        if routes:
            scores = torch.rand(len(tokens) - 1, layers, model.num_experts, generator=generator)
            recorded = scores.topk(model.experts_top_k, dim=-1).indices.to(torch.uint8)
        samples.append(
            Sample(
                prompt_id=f"p{index // 4}",
                sample_index=index % 4,
                tokens=tokens,
                response_length=response,
                loss_mask=mask,
                rollout_logprobs=-torch.rand(response, generator=generator) * 4 - 3,
                status=Status.completed,
                finish_reason="stop",
                routes=recorded,
                weight_spans=[WeightSpan(0, 0, response)],
                reward=float(index % 3),
            )  # fmt: skip
        )
        advantages.append(torch.full((response,), (-1.0) ** index * (1 + index / size)))
    return Batch(samples=samples, advantages=advantages, temperature=1.0)
