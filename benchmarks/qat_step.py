"""QAT step time over BF16 step time, and over fake quantization in the forward, in one process.

    python -m benchmarks.qat_step [--tokens 4096] [--rounds 7] [--recompute none|full] [--micro-batch-tokens 2048]
        [--quantizer fused|eager]

The three kinds take turns step by step, so that a busy machine slows all of them alike; the figure is the median of
the ratios within a round. Aim: in place over BF16 at most 1.02 at 4,096 tokens or more per step.
A run loads the fused CPU quantizer by itself once eager torch has handled 2^30 weights, which is where loading it pays;
`--quantizer fused` starts with it, `--quantizer eager` measures the time before (a GPU takes the Triton kernel always).
Peak memory is that of a fresh process per kind (resident set), measured by this same program.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from runner import schema
from runner.precision import kernels
from runner.samples import Batch, Sample, Status
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
from runner.trainer.torch_trainer import TorchTrainer

KINDS = {
    "bf16": ("bf16", QatPlacement.in_place),
    "qat in place": ("int4", QatPlacement.in_place),
    "qat in the forward": ("int4", QatPlacement.forward),
}


def build_config(kind: str, args: argparse.Namespace) -> Config:
    fmt, placement = KINDS[kind]
    grids = [GridConfig(format=fmt, group_size=32, convention=Convention.exact) for _ in range(2)]
    optimizer = schema.OptimizerConfig(
        lr=1e-4, lr_schedule="constant", lr_warmup_steps=0, lr_min_ratio=0.0, weight_decay=0.1, beta1=0.9, beta2=0.98,
        eps=1e-8, clip_grad_norm=1.0, cpu_offload=False,
    )  # fmt: skip
    model = ModelConfig(
        name="bench", family="qwen3_moe", hf_checkpoint=None, num_layers=args.layers,
        hidden_size=args.hidden, ffn_size=2 * args.hidden, num_heads=4, num_kv_heads=2, head_dim=args.hidden // 4,
        vocab_size=272, max_context_tokens=512, rope_theta=1e4, norm_eps=1e-6, tied_embeddings=True, attention_bias=False,
        qk_norm=True, initializer_range=0.05, num_experts=8, experts_top_k=2, expert_ffn_size=args.hidden,
        num_shared_experts=0, num_dense_layers=0, router_score="softmax", router_bias=False, routed_scaling_factor=1.0,
        expert_groups=1, expert_groups_top_k=1,
        q_lora_rank=0, kv_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0, num_mtp_layers=0,
        vision=False, toy_twin="tiny_moe",
    )  # fmt: skip
    return Config(
        precision=schema.PrecisionConfig(
            name=kind, group_size=32, convention=Convention.exact, roles=None, train=grids[0], rollout=grids[1],
            qat_placement=placement, base_dtype="bfloat16", kv_cache="bf16", fp8_backward=False, fp8_param_gather=False,
            cpu_matmul=schema.CpuMatmul.auto,
        ),
        trainer=TorchTrainerConfig(
            _target_="runner.trainer.torch.TorchTrainer", name="torch", optimizer=optimizer,
            max_tokens_per_gpu=args.micro_batch_tokens, recompute=args.recompute, max_nan_steps=3,
            logprob_chunk_tokens=1 << 20, threads=args.threads, master_weights=True, device="auto",
        ),
        router_replay=schema.RouterReplayConfig(name="none", trainer=False, rollout=False),
        speculative=schema.SpeculativeConfig(name="none", method="none", online_training=False, mtp_loss_coef=0.0),
        algorithm=schema.AlgorithmConfig(
            name="grpo", estimator=Estimator.grpo, samples_per_prompt=8, prompts_per_step=8, updates_per_rollout=1,
            normalize_by_std=True, clip_low=0.2, clip_high=0.28, dual_clip=0.0,
            loss_aggregation=LossAggregation.token_mean, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0,
            dynamic_sampling=False, max_resample_rounds=1, oversample_prompts=0, correction=Correction.none,
            correction_low=0.5, correction_high=2.0,
        ),
        model=model,
        steps=1000,
        seed=1,
    )  # fmt: skip


def build_batch(tokens: int, length: int = 64, prompt: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples, advantages = [], []
    for index in range(-(-tokens // length)):
        response = length - prompt
        samples.append(
            Sample(
                prompt_id="p",
                sample_index=index,
                tokens=torch.randint(0, 272, (length,), generator=generator),
                response_length=response,
                loss_mask=torch.ones(response, dtype=torch.bool),
                rollout_logprobs=torch.full((response,), -5.0),
                status=Status.completed,
                finish_reason="stop",
            )  # fmt: skip
        )
        advantages.append(torch.full((response,), (-1.0) ** index))
    return Batch(samples=samples, advantages=advantages, temperature=1.0)


def one_step(trainer: TorchTrainer, batch: Batch) -> float:
    fresh = Batch(batch.samples, batch.advantages, batch.temperature)
    started = time.perf_counter()
    trainer.step(fresh)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mib(kind: str, args: argparse.Namespace) -> float:
    """Peak memory of two steps in this process: of the device, or the resident set on a CPU."""
    trainer, batch = TorchTrainer(build_config(kind, args)), build_batch(args.tokens)
    for _ in range(2):
        one_step(trainer, batch)
    if trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quantizer", choices=["fused", "eager"], default="fused")
    parser.add_argument("--peak", choices=list(KINDS), help="only print the peak memory of one kind, in MiB")
    args = parser.parse_args()
    if args.quantizer == "fused":
        kernels.load()
    if args.peak:
        print(json.dumps(peak_mib(args.peak, args)))
        return 0
    trainers = {kind: TorchTrainer(build_config(kind, args)) for kind in KINDS}
    batch = build_batch(args.tokens)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_index in range(args.rounds + 1):
        for kind, trainer in trainers.items():
            seconds = one_step(trainer, batch)
            if round_index:  # the first round compiles and allocates
                times[kind].append(seconds)
    print(
        f"{batch.num_tokens} tokens per step, micro-batches of {args.micro_batch_tokens}, "
        f"recompute {args.recompute}, {args.quantizer} quantizer, {args.rounds} rounds"
    )
    for kind, rows in times.items():
        command = [sys.executable, "-m", "benchmarks.qat_step", *sys.argv[1:], "--peak", kind]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{kind:20s} median {statistics.median(rows):.4f} s  min {min(rows):.4f} s  peak {peak:.0f} MiB")
    base, ours, forward = (times[kind] for kind in KINDS)
    for name, other in (("bf16", base), ("qat in the forward", forward)):
        paired = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        medians = statistics.median(ours) / statistics.median(other)
        print(f"qat in place / {name}: {paired:.3f} (of the medians {medians:.3f}, of the smallest {min(ours) / min(other):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
