"""Full-size configs for the planner's tests, written out so that the tests do not move with conf/."""

from __future__ import annotations

from runner import schema
from runner.rollout.local.option import LocalRolloutConfig
from runner.rollout.sglang.config import SglangRolloutConfig
from runner.schema import Config, Convention, Estimator, GridConfig, ModelConfig, QatPlacement
from runner.trainer.megatron.config import MegatronTrainerConfig
from runner.trainer.torch.option import TorchTrainerConfig

MOE_NONE = {"num_experts": 0, "experts_top_k": 0, "expert_ffn_size": 0, "num_shared_experts": 0, "num_dense_layers": 0}
MLA_NONE = {"q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
COMMON = {
    "hf_checkpoint": "given",
    "max_context_tokens": 40960,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "router_score": "softmax",
    "router_bias": False,
    "routed_scaling_factor": 1.0,
    "expert_groups": 1,
    "expert_groups_top_k": 1,
    "num_mtp_layers": 0,
    "vision": False,
    "toy_twin": "tiny_moe",
    "tied_embeddings": False,
    "attention_bias": False,
    "qk_norm": True,
}


def model(**fields: object) -> ModelConfig:
    return ModelConfig(**{**COMMON, **MOE_NONE, **MLA_NONE, **fields})


MODELS = {
    "qwen3_4b": model(
        name="qwen3_4b",
        family="qwen3",
        num_layers=36,
        hidden_size=2560,
        ffn_size=9728,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        tied_embeddings=True,
    ),
    "qwen3_30b": model(
        name="qwen3_30b",
        family="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        ffn_size=6144,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_experts=128,
        experts_top_k=8,
        expert_ffn_size=768,
    ),
    "qwen3_235b": model(
        name="qwen3_235b",
        family="qwen3_moe",
        num_layers=94,
        hidden_size=4096,
        ffn_size=12288,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_experts=128,
        experts_top_k=8,
        expert_ffn_size=1536,
    ),
    "moonlight_16b": model(
        name="moonlight_16b",
        family="deepseek",
        num_layers=27,
        hidden_size=2048,
        ffn_size=11264,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        vocab_size=163840,
        qk_norm=False,
        num_experts=64,
        experts_top_k=6,
        expert_ffn_size=1408,
        num_shared_experts=2,
        num_dense_layers=1,
        router_score="sigmoid",
        router_bias=True,
        routed_scaling_factor=2.446,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    "kimi_k2_thinking": model(
        name="kimi_k2_thinking",
        family="deepseek",
        num_layers=61,
        hidden_size=7168,
        ffn_size=18432,
        num_heads=64,
        num_kv_heads=64,
        head_dim=128,
        vocab_size=163840,
        qk_norm=False,
        num_experts=384,
        experts_top_k=8,
        expert_ffn_size=2048,
        num_shared_experts=1,
        num_dense_layers=1,
        router_score="sigmoid",
        router_bias=True,
        routed_scaling_factor=2.827,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    "tiny_moe": model(
        name="tiny_moe",
        family="qwen3_moe",
        num_layers=4,
        hidden_size=128,
        ffn_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=64,
        num_experts=8,
        experts_top_k=2,
        expert_ffn_size=128,
        max_context_tokens=512,
        tied_embeddings=True,
        hf_checkpoint=None,
    ),
}


def precision(format: str = "int4", group_size: int = 128, **fields: object) -> schema.PrecisionConfig:
    grid = GridConfig(format=format, group_size=group_size, convention=Convention.exact)
    values: dict[str, object] = {
        "name": format,
        "group_size": group_size,
        "convention": Convention.exact,
        "roles": None,
        "train": grid,
        "rollout": grid,
        "qat_placement": QatPlacement.in_place,
        "base_dtype": "bfloat16",
        "kv_cache": "bf16",
        "fp8_backward": False,
        "fp8_matmul": "simulated",
        "fp8_param_gather": False,
        "cpu_matmul": schema.CpuMatmul.auto,
    }
    return schema.PrecisionConfig(**{**values, **fields})


def parallelism(gpus: int, **fields: object) -> schema.ParallelismConfig:
    values: dict[str, object] = {
        "name": f"h200x{gpus}",
        "gpus": gpus,
        "ranks": max(gpus, 1),
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "ep": 1,
        "etp": 1,
        "sequence_parallel": True,
        "last_stage_layers": None,
        "gpus_per_engine": min(gpus, 8),
        "engine_ep": 1,
        "rollout_gpus": gpus,
        "colocate": True,
    }
    return schema.ParallelismConfig(**{**values, **fields})


def optimizer(cpu_offload: bool) -> schema.OptimizerConfig:
    return schema.OptimizerConfig(
        lr=1e-6,
        lr_schedule="constant",
        lr_warmup_steps=0,
        lr_min_ratio=0.0,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.98,
        eps=1e-8,
        clip_grad_norm=1.0,
        cpu_offload=cpu_offload,
    )


def megatron(cpu_offload: bool = False, **fields: object) -> MegatronTrainerConfig:
    values: dict[str, object] = {
        "_target_": "runner.trainer.megatron.MegatronTrainer",
        "name": "megatron",
        "optimizer": optimizer(cpu_offload),
        "max_tokens_per_gpu": 8192,
        "recompute": "full",
        "max_nan_steps": 3,
        "logprob_chunk_tokens": 1024,
        "threads": 0,
        "distributed_optimizer": True,
        "overlap_param_gather": True,
        "overlap_grad_reduce": True,
        "gradient_accumulation_fusion": True,
        "precision_aware_optimizer": False,
        "router_fusion": False,
        "moe_token_dispatcher": "alltoall",
        "resident_reference": False,
    }
    return MegatronTrainerConfig(**{**values, **fields})


def torch_trainer(**fields: object) -> TorchTrainerConfig:
    values: dict[str, object] = {
        "_target_": "runner.trainer.torch.TorchTrainer",
        "name": "torch",
        "optimizer": optimizer(False),
        "max_tokens_per_gpu": 4096,
        "recompute": "none",
        "max_nan_steps": 3,
        "logprob_chunk_tokens": 1024,
        "threads": 0,
        "master_weights": True,
        "device": "auto",
    }
    return TorchTrainerConfig(**{**values, **fields})


def sampling(max_response_tokens: int) -> schema.SamplingConfig:
    return schema.SamplingConfig(temperature=1.0, top_p=1.0, top_k=-1, max_response_tokens=max_response_tokens)


def sglang(max_response_tokens: int = 8192, **fields: object) -> SglangRolloutConfig:
    values: dict[str, object] = {
        "_target_": "runner.rollout.sglang.SglangPool",
        "name": "sglang",
        "sampling": sampling(max_response_tokens),
        "max_concurrency": 64,
        "request_timeout_seconds": 600.0,
        "memory_fraction": 0.7,
        "attention_backend": "fa3",
        "weight_transport": "tensor",
        "pause_mode": "abort",
        "startup_timeout_seconds": 600.0,
        "max_retries": 3,
        "use_router": False,
        "cuda_graph_max_batch": 64,
        "chunked_prefill_tokens": 4096,
    }
    return SglangRolloutConfig(**{**values, **fields})


def local(max_response_tokens: int = 64, **fields: object) -> LocalRolloutConfig:
    values: dict[str, object] = {
        "_target_": "runner.rollout.local.LocalPool",
        "name": "local",
        "sampling": sampling(max_response_tokens),
        "max_concurrency": 64,
        "request_timeout_seconds": 600.0,
        "device": "auto",
        "kv_cache_tokens": 0,
        "prefill_chunk_tokens": 512,
    }
    return LocalRolloutConfig(**{**values, **fields})


def config(
    name: str,
    par: schema.ParallelismConfig,
    *,
    prec: schema.PrecisionConfig | None = None,
    trainer: schema.TrainerConfig | None = None,
    rollout: schema.RolloutConfig | None = None,
    host_memory_gib: float = 2000.0,
    nodes: int | None = None,
    gpus_per_node: int = 8,
) -> Config:
    """H200 nodes (139.8 GiB a GPU) unless said otherwise."""
    spec = MODELS[name]
    replay = spec.num_experts > 0
    return Config(
        precision=prec or precision(),
        parallelism=par,
        trainer=trainer or megatron(),
        rollout=rollout or sglang(),
        router_replay=schema.RouterReplayConfig(name="r3" if replay else "none", trainer=replay, rollout=replay),
        speculative=schema.SpeculativeConfig(
            name="none",
            method="none",
            num_draft_tokens=0,
            ngram_min=1,
            ngram_max=3,
            draft_model=None,
            online_training=False,
            auto_disable=False,
            auto_disable_after_steps=0,
            mtp_loss_coef=0.0,
        ),
        task=schema.TaskConfig(
            _target_="runner.tasks.dapo_math.DapoMathTask",
            name="dapo_math",
            train_path=None,
            eval_path=None,
            max_prompt_tokens=1024,
            reward_timeout_seconds=10.0,
            seed=0,
        ),
        algorithm=schema.AlgorithmConfig(
            name="grpo",
            estimator=Estimator.grpo,
            samples_per_prompt=8,
            prompts_per_step=32,
            updates_per_rollout=1,
            normalize_by_std=True,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=0.0,
            loss_aggregation=schema.LossAggregation.token_mean,
            kl_coef=0.0,
            kl_estimator="k3",
            entropy_coef=0.0,
            dynamic_sampling=False,
            max_resample_rounds=0,
            oversample_prompts=0,
            correction=schema.Correction.none,
            correction_low=0.0,
            correction_high=0.0,
        ),
        cluster=schema.ClusterConfig(
            name="test",
            launcher="ray",
            nodes=max(par.gpus // max(gpus_per_node, 1), 1) if nodes is None else nodes,
            gpus_per_node=gpus_per_node,
            gpu_memory_gib=139.8,
            host_memory_gib=host_memory_gib,
            address=None,
            interface=None,
        ),
        model=spec,
    )
