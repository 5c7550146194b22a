"""The Megatron trainer: real megatron-core, one process per rank, the same code on CPU ranks (gloo) and GPUs (NCCL).

driver.py is what the loop sees, ranks.py starts and watches processes, worker.py is one rank. arguments.py is torch-free,
so nothing is imported here before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.trainer.megatron.driver import MegatronTrainer

__all__ = ["MegatronTrainer"]


def __getattr__(name: str) -> Any:
    if name == "MegatronTrainer":
        from runner.trainer.megatron.driver import MegatronTrainer

        return MegatronTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
