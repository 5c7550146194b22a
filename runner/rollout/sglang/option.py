"""rollout=sglang: a pool of SGLang servers. Torch-free."""

from __future__ import annotations

from runner.config.option import Need, Option
from runner.rollout.sglang import machine, rules
from runner.rollout.sglang.config import SglangRolloutConfig, layout, on_cpu, settings

OPTION = Option(
    SglangRolloutConfig,
    rules=rules.RULES,
    unbuilt=machine.UNBUILT,
    machine=machine.RULES,
    needs=(
        Need("sglang", "sglang", "the servers need SGLang, which is not installed", "make setup-sglang"),
        Need(
            "sglang-kernel",
            "sgl_kernel",
            "SGLang's CUDA kernels (sglang-kernel) are not installed",
            "make setup-gpu",
            when=lambda cfg: not on_cpu(cfg),
            loads="sgl_kernel",
        ),
        Need(
            "torch-memory-saver",
            "torch_memory_saver",
            "engines that take turns with the trainer need torch-memory-saver to give memory back; it is not installed",
            "make setup-gpu, or parallelism.colocate=false with GPUs of their own",
            key="parallelism.colocate",
            when=lambda cfg: layout(cfg).shares_gpus,
            loads="torch_memory_saver",
        ),
        Need(
            "sglang-router",
            "sglang_router",
            "sglang-router is not installed",
            "make setup-sglang, or rollout.use_router=false: the pool balances its engines itself",
            key="rollout.use_router",
            when=lambda cfg: settings(cfg).use_router,
        ),
    ),
    engines=layout,
)
