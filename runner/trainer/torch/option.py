"""trainer=torch: a transformers model in the loop's own process, on a CPU or one GPU. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from runner.config import preflight
from runner.config.choices import BaseDtype, DeviceKind, Fp8Matmul
from runner.config.option import Option, TrainerLayout
from runner.config.rules.parallelism import positive
from runner.config.schema import Config, TrainerConfig
from runner.errors import UserError
from runner.trainer import adapters


@dataclass
class TorchTrainerConfig(TrainerConfig):
    master_weights: bool = MISSING  # fp32 masters of bf16 weights; false: train base_dtype weights directly
    device: DeviceKind = MISSING
    fused_scores: bool = MISSING  # logprobs and entropies by Triton kernels, runner/trainer/fused_scores.py


def settings(cfg: Config) -> TorchTrainerConfig:
    assert isinstance(cfg.trainer, TorchTrainerConfig)
    return cfg.trainer


def layout(cfg: Config) -> TrainerLayout:
    masters = settings(cfg).master_weights and cfg.precision.base_dtype == BaseDtype.bfloat16
    return TrainerLayout(in_process=True, fused=False, masters=masters)


def one_process(cfg: Config) -> Iterator[UserError]:
    par = cfg.parallelism
    wanted = max(par.ranks, par.tp * par.pp * par.cp, par.ep * par.etp * par.pp)
    if positive(cfg) and wanted > 1:
        yield UserError(
            f"trainer=torch is one process, parallelism={par.name} asks for {wanted}",
            key="trainer",
            fix="trainer=megatron, or parallelism=single (CPU), or parallelism=h200x1",
        )


def fp8(cfg: Config) -> Iterator[UserError]:
    if cfg.precision.fp8_param_gather:
        yield UserError(
            "trainer=torch gathers no parameters", key="precision.fp8_param_gather", fix="precision.fp8_param_gather=false"
        )
    if cfg.precision.fp8_matmul == Fp8Matmul.scaled_mm and settings(cfg).device == DeviceKind.cpu:
        key = "precision.fp8_matmul"
        yield UserError("FP8 matmuls need a Hopper GPU, the trainer runs on the CPU", key=key, fix=f"{key}=simulated")


def lora(cfg: Config) -> Iterator[UserError]:
    if not adapters.has_adapters(cfg):
        return
    if not settings(cfg).master_weights:
        yield UserError("adapters are fp32 masters", key="trainer.master_weights", fix="trainer.master_weights=true")
    if cfg.speculative.online_training and cfg.model.num_mtp_layers:
        yield UserError(
            "MTP layers that are trained along have no adapters, and a checkpoint of adapters has no place for them",
            key="speculative.online_training",
            fix="speculative.online_training=false, or trainer.lora.rank=0",
        )


def device(cfg: Config) -> Iterator[UserError]:
    yield from preflight.device("trainer.device", settings(cfg).device)
    if cfg.precision.fp8_matmul == Fp8Matmul.scaled_mm and not preflight.visible_gpus():  # which GPU it is, the trainer finds out
        key = "precision.fp8_matmul"
        yield UserError("FP8 matmuls need a Hopper GPU, this machine has none", key=key, fix=f"{key}=simulated")
    if settings(cfg).fused_scores and (settings(cfg).device == DeviceKind.cpu or not preflight.visible_gpus()):
        key = "trainer.fused_scores"
        yield UserError("fused scores are GPU kernels, the trainer runs on the CPU", key=key, fix=f"{key}=false")


OPTION = Option(TorchTrainerConfig, rules=(one_process, fp8, lora, adapters.targets), machine=(device,), trainer=layout)
