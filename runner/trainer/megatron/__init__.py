"""The Megatron trainer: real megatron-core, one process per rank, the same code on CPU ranks (gloo) and GPUs (NCCL)."""

from runner.trainer.megatron.driver import MegatronTrainer

__all__ = ["MegatronTrainer"]
