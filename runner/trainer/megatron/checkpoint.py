"""Checkpoints through Megatron's dist-checkpointing: every tensor is stored whole, so any layout loads what any other saved.

model/       torch_dist: bf16(master) under Megatron's names, optimizer state as `optimizer.<state>.<name>` in parameter shape,
             passengers (multi-token-prediction layers) under HF names
trainer.json counters, and the layout that saved
config.json, tokenizer files
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from runner.config.schema import ModelConfig
from runner.errors import Failure, UserError
from runner.models.build import save_config
from runner.trainer.megatron import untrusted
from runner.trainer.megatron.process import die_with_parent
from runner.trainer.megatron.sharded import Sharded

FORMAT = 1
COUNTERS = "trainer.json"
OPTIONAL = ("reference.", "mtp.")  # of a KL term and of online training, which a run that starts from here may do without


@dataclass(frozen=True)
class State:
    """A rank at one moment: model, passengers, optimizer, reference and mtp -> tensors as sharded.py makes them, and the counters
    of trainer.json."""

    tensors: dict[str, Sharded]
    counters: dict[str, Any]


def save(state: State, model: ModelConfig, folder: Path) -> None:
    """Write into an existing folder; the caller makes it atomic. Collective."""
    _begin(state, model, folder)
    with _saying_what_failed(folder):
        dist_checkpointing.save(state.tensors, str(folder / untrusted.FOLDER))
    dist.barrier()


class AsyncSave:
    """One save through Megatron's asynchronous writers, processes forked from the ranks, which see the weights of that moment."""

    def __init__(self, state: State, model: ModelConfig, folder: Path) -> None:
        """Begin it. The state's tensors may change as soon as this returns. Collective."""
        self.folder = folder
        _begin(state, model, folder)
        self._queue = AsyncCallsQueue()
        with _saying_what_failed(folder):
            request = dist_checkpointing.save(state.tensors, str(folder / untrusted.FOLDER), async_sharded_save=True)
            self._queue.schedule_async_request(request)

    def finished(self) -> bool:
        """Whether every rank has written; the first call that says so makes the files one checkpoint. Collective."""
        with _saying_what_failed(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=False)
        return not self._queue.get_num_unfinalized_calls()

    def wait(self) -> None:
        """Until `finished`. Collective."""
        with _saying_what_failed(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=True)
        dist.barrier()


@contextmanager
def _saying_what_failed(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, CheckpointingException) as error:
        raise Failure(f"cannot save a checkpoint under {folder}: {_first_line(error)}", fix="free space") from None


def _begin(state: State, model: ModelConfig, folder: Path) -> None:
    """Everything but the tensors."""
    if dist.get_rank() == 0:
        (folder / untrusted.FOLDER).mkdir(exist_ok=True)
        counters = {"format": FORMAT, "trainer": "megatron", **state.counters}
        (folder / COUNTERS).write_text(json.dumps(counters, indent=1))
        save_config(model, folder)
    _own_results_queue()
    dist.barrier()


def _own_results_queue() -> None:
    """The queue of Megatron's checkpoint writers in a manager process that ends with this rank: Megatron starts one that
    outlives a killed rank for ever."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(initializer=die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _first_line(error: BaseException) -> str:
    """What went wrong on the first rank that failed; torch's exception wraps all ranks' failures."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return (str(inner).splitlines() or [type(inner).__name__])[0]


def load(tensors: dict[str, Sharded], folder: Path) -> dict[str, Any]:
    """The content of what `tensors` names, under the same names; UserError unless they are all that the checkpoint holds, but for
    OPTIONAL. Collective."""
    untrusted.check(folder / untrusted.FOLDER)
    untrusted.guard()
    try:
        loaded, left_over, absent = dist_checkpointing.load(
            tensors, str(folder / untrusted.FOLDER), strict=StrictHandling.RETURN_ALL
        )
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError, OSError, ValueError) as error:
        raise _misfit(folder, _first_line(error)) from None
    unused = sorted(name for name in left_over if not name.startswith(OPTIONAL))
    for problem, names in (("it lacks", sorted(absent)), ("it has weights that the model does not use:", unused)):
        if names:
            raise _misfit(folder, f"{problem} {len(names)} tensors, first {names[0]}")
    return dict(loaded)


def _misfit(folder: Path, reason: str) -> UserError:
    fix = "resume with the model that the run was started with"
    return UserError(f"{folder} does not fit this model: {reason}", key="model", fix=fix)


def read_counters(folder: Path) -> dict[str, Any]:
    """trainer.json; UserError when it is missing, broken or another trainer's."""
    try:
        counters = json.loads((folder / COUNTERS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read the trainer's checkpoint {folder}: {error}", fix="resume from another checkpoint"
        ) from error
    if not isinstance(counters, dict) or counters.get("trainer") != "megatron":
        raise UserError(f"{folder} was saved by trainer=torch", key="trainer", fix="resume with trainer=torch")
    return counters
