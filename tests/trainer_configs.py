"""The trainer's tests run conf/'s tiny models made smaller still, with few tokens and a high learning rate."""

from __future__ import annotations

from dataclasses import asdict

import torch

from runner.config.schema import Config
from runner.data import Batch, Sample, Status, WeightSpan
from tests.configs import composed

SMALL: dict[str, object] = {
    "num_layers": 2, "hidden_size": 32, "ffn_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "max_context_tokens": 128, "rope_theta": 1e4, "tied_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def model(name: str, **changes: object) -> dict[str, object]:
    """The fields of conf/model/<name>.yaml, with SMALL and `changes` on top."""
    return asdict(composed(f"model={name}").model) | SMALL | changes


MOE = model("tiny_moe", num_experts=4, expert_ffn_size=32)
DENSE = model("tiny_dense")
MLA = model(
    "tiny_mla", num_layers=3, num_kv_heads=2, head_dim=24, num_experts=4, expert_ffn_size=32, tied_embeddings=False,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
FEW: dict[str, object] = {
    "steps": 10, "seed": 3, "algorithm.samples_per_prompt": 4, "algorithm.prompts_per_step": 2, "precision.group_size": 32,
    "trainer.optimizer.lr": 1e-2, "trainer.optimizer.beta2": 0.98, "trainer.optimizer.lr_warmup_steps": 0,
    "trainer.max_tokens_per_gpu": 96, "trainer.threads": 1,
    "trainer.logprob_chunk_tokens": 4096,
}  # fmt: skip


def config(model: dict[str, object] = MOE, trainer: str = "torch", **changes: object) -> Config:
    """`changes` are those of tests.configs.composed; `format` sets train and rollout formats."""
    formats = dict.fromkeys(("precision.train.format", "precision.rollout.format"), changes.pop("format", "int4"))
    device = {"trainer.device": "cpu"} if trainer == "torch" else {}
    overrides = (f"trainer={trainer}", "router_replay=none", "speculative=none")
    return composed(*overrides, **{"model": model, **formats, **FEW, **device, **changes})


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
