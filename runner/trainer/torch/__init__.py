"""The trainer in the loop's process; `TorchTrainer` is imported on first use so that tab completion stays free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.trainer.torch.trainer import TorchTrainer

__all__ = ["TorchTrainer"]


def __getattr__(name: str) -> Any:
    if name == "TorchTrainer":
        from runner.trainer.torch.trainer import TorchTrainer

        return TorchTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
