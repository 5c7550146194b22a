"""tracking=tensorboard: event files under <run>/tensorboard, through torch's own writer. Composing imports no tensorboard.

Metrics have their names, and their steps are those of metrics.jsonl. A resumed run writes a further file, in which it says from
which step on what was written before is void: TensorBoard then shows each step once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from runner.config.option import Need, Option
from runner.config.schema import Config, TrackingConfig
from runner.tracking.base import BaseTracker, State, said
from runner.tracking.folder import plain_config

FOLDER = "tensorboard"


class TensorboardTracker(BaseTracker):
    in_folder = True

    def __init__(self, cfg: Config, run_dir: Path, *, first_step: int) -> None:
        self.run_dir = run_dir
        self._open(first_step)
        text = yaml.safe_dump(plain_config(cfg), sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), first_step)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.step = first_step
        self.writer = SummaryWriter(str(self.run_dir / FOLDER), purge_step=first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step + 1
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run has its finished steps

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self.writer.add_text(f"event/{kind}", message, self.step)

    def rewind(self, first_step: int) -> None:
        self.writer.close()
        self._open(first_step)

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        self.writer.add_text("status", said(status, message), self.step)
        self.writer.close()
        print(f"tensorboard: look at this run with\n    tensorboard --logdir {shlex.quote(str(self.run_dir / FOLDER))}")


OPTION = Option(
    TrackingConfig,
    needs=(
        Need(
            "tensorboard",
            "tensorboard",
            "tracking=tensorboard needs tensorboard",
            fix="pip install tensorboard, or tracking=none",
        ),
    ),
)
