"""What the loop needs of a trainer. Implementations: torch/, megatron/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from runner.errors import Failure

if TYPE_CHECKING:  # checkpoints, folders and the composition of a resumed run need these names without torch
    import torch

    from runner.data import Batch, WeightStream
    from runner.models.images import Images

Weights = Literal["quantized", "master"]
Routes = Literal["replayed", "own"]


class TrainerLost(Failure):
    """The processes of a trainer are gone, and with them all it learned since the last checkpoint. Another trainer can be built
    and take up that checkpoint."""


class Saving(Protocol):
    """A save that goes on while the trainer does other things; what it holds is the state of the moment it was begun."""

    def finished(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> None:
        """Until every file is complete on disk; raises UserError when one could not be written."""
        ...


class Saved:
    """A save that was complete when it was begun."""

    def finished(self) -> bool:
        return True

    def wait(self) -> None:
        return


@dataclass(frozen=True)
class StepResult:
    """
    metrics       `train/*`; always `train/nan_steps`, the updates that were skipped because something was not finite
    old_logprobs  [R] fp32 per sample of the batch: the policy's before the step
    old_version   the trainer's version before the step
    busy          (begin, end) of the updates on each rank, in seconds since the epoch by the clock of its machine
    """

    metrics: dict[str, float]
    old_logprobs: list[torch.Tensor]
    old_version: int
    busy: list[tuple[float, float]] = field(default_factory=list)


class Trainer(Protocol):
    """Built as `trainer(cfg, run_dir)`: files that belong to a run go into its folder; None: there is no run."""

    version: int  # optimizer steps taken; the version of exported weights

    def logprobs(self, batch: Batch, *, weights: Weights = "quantized", routes: Routes = "replayed") -> list[torch.Tensor]:
        """Logprobs [R] fp32 of each sample's response tokens at `batch.temperature`, without gradient.

        `weights="master"` computes with bf16(master) and restores the quantized weights from the masters afterwards
        (never by requantizing); `routes="own"` lets the trainer's router choose. Both serve the mismatch decomposition.
        """
        ...

    def reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        """Logprobs [R] under the frozen, full-precision reference policy; needs algorithm.kl_coef > 0."""
        ...

    def step(self, batch: Batch) -> StepResult:
        """The optimizer steps of one rollout (algorithm.updates_per_rollout of them). The batch stays as it is."""
        ...

    def sft_step(
        self, samples: list[tuple[torch.Tensor, int]], lr: float, images: list[Images] | None = None
    ) -> dict[str, float]:
        """One supervised step for the warm start: (tokens [T], prompt length P) pairs, mean loss over response tokens;
        `images`: those of the prompts, one per sample."""
        ...

    def reset_optimizer(self) -> None:
        """RL starts here: moments and schedule from zero, and the reference policy is the policy as it is now."""
        ...

    def export(self, format: Literal["rollout", "bf16"] = "rollout") -> WeightStream:
        """Every HF weight, in the rollout's formats or as bf16(master)."""
        ...

    def save(self, folder: Path) -> None:
        """Weights as bf16(master) in HF names, masters, optimizer, schedule and RNG, into an existing folder."""
        ...

    def begin_save(self, folder: Path) -> Saving:
        """`save`, but where the trainer can, it writes beside its next steps. One at a time: wait before the next one."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote: unquantized weights -> masters -> quantize."""
        ...

    def sleep(self) -> None:
        """Give device memory back until `wake`: weights, masters and optimizer state move to host memory, gradients are dropped.
        Safe to call again. Only `wake` and `close` may follow."""
        ...

    def wake(self) -> None:
        """Everything where it was, bit for bit. Safe to call again."""
        ...

    def close(self) -> None: ...
