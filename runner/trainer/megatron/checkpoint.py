"""Checkpoints through Megatron's dist-checkpointing: every tensor is stored whole, so any layout loads what any other saved.

model/       torch_dist: bf16(master) under Megatron's names, optimizer state as `optimizer.<state>.<name>` in parameter shape,
             passengers (multi-token-prediction layers) under HF names
trainer.json counters, and the layout that saved
config.json, tokenizer files

DistributedOptimizer's own formats are not used: `fully_reshardable` mixes up masters and moments without an error when a
buffer has several buckets with padding between them, and without Transformer Engine the resume shares one Adam `step` tensor
between all parameters. Here every owned shard is put at its place in its parameter, whatever the buckets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from runner.errors import Failure, UserError
from runner.models.build import save_config
from runner.trainer.megatron import untrusted
from runner.trainer.megatron.masters import STATES, Owned
from runner.trainer.megatron.process import die_with_parent
from runner.trainer.mtp import MtpTraining

if TYPE_CHECKING:
    from runner.trainer.megatron.worker import Worker

FORMAT = 1
COUNTERS = "trainer.json"
Sharded = dict[str, Any]


def save(worker: Worker, folder: Path) -> None:
    """Write into an existing folder; the caller makes it atomic. Weights are bf16(master) now. Collective."""
    state = _begin(worker, folder)
    with _saying_what_failed(folder):
        dist_checkpointing.save(state, str(folder / untrusted.FOLDER))
    dist.barrier()


class AsyncSave:
    """One save through Megatron's asynchronous writers, processes forked from the ranks, which see the weights of that moment."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        """Begin it. Weights are bf16(master) now; they may change as soon as this returns. Collective."""
        self.folder = folder
        state = _begin(worker, folder)
        self._queue = AsyncCallsQueue()
        with _saying_what_failed(folder):
            request = dist_checkpointing.save(state, str(folder / untrusted.FOLDER), async_sharded_save=True)
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


def _begin(worker: Worker, folder: Path) -> Sharded:
    """Everything but the tensors, written; what is to be written of them."""
    steps = _steps(worker)
    state = {"model": _model(worker), "passengers": _passengers(worker), "optimizer": _optimizer(worker, bool(steps), fill=True)}
    target = folder / untrusted.FOLDER
    if dist.get_rank() == 0:
        target.mkdir(exist_ok=True)
        counters = {
            "format": FORMAT,
            "trainer": "megatron",
            "version": worker.version,
            "schedule_step": worker.schedule_step,
            "nan_in_a_row": worker.nan.in_a_row,
            "nan_total": worker.nan.total,
            "adam_step": steps,
            "master_weights": worker.masters.has_masters,
            "reference": worker.reference is not None,
            "mtp": isinstance(worker.mtp, MtpTraining),
            "layout": layout(worker),
        }
        (folder / COUNTERS).write_text(json.dumps(counters, indent=1))
        save_config(worker.cfg.model, folder)
    if worker.reference is not None:
        state["reference"] = _reference(worker)
    if isinstance(worker.mtp, MtpTraining):
        state["mtp"] = _mtp_state(worker)
    _own_results_queue()
    dist.barrier()
    return state


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


def load(worker: Worker, folder: Path) -> None:
    """Restore masters, moments, reference and counters; the caller derives the model weights from the masters. Collective."""
    counters = read_counters(folder)
    untrusted.check(folder / untrusted.FOLDER)
    untrusted.guard()
    if counters["master_weights"] != worker.masters.has_masters:
        raise UserError(
            f"{folder} was saved {'with' if counters['master_weights'] else 'without'} fp32 masters beside the weights",
            key="precision.base_dtype",
            fix="resume with the same base dtype",
        )
    stepped = bool(counters["adam_step"])
    optimizer = _optimizer(worker, stepped, fill=False)
    state = {"model": _model(worker), "passengers": _passengers(worker), "optimizer": optimizer}
    if worker.reference is not None and counters["reference"]:
        state["reference"] = _reference(worker)
    if isinstance(worker.mtp, MtpTraining) and counters["mtp"]:
        worker.mtp.prepare_to_load(stepped)
        state["mtp"] = _mtp_state(worker)
    try:
        loaded = dist_checkpointing.load(state, str(folder / untrusted.FOLDER))
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{folder} does not fit this model: {_first_line(error)}",
            key="model",
            fix="resume with the model that the run was started with",
        ) from None
    _restore(worker, loaded, counters["adam_step"])
    worker.version, worker.schedule_step = counters["version"], counters["schedule_step"]
    worker.nan.in_a_row, worker.nan.total = counters["nan_in_a_row"], counters["nan_total"]


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


def layout(worker: Worker) -> dict[str, int]:
    par = worker.cfg.parallelism
    return {name: getattr(par, name) for name in ("ranks", "tp", "pp", "cp", "ep", "etp")}


def _model(worker: Worker) -> Sharded:
    """Megatron's own sharded state dict of the model; `_extra_state` of Transformer Engine (FP8 scales) is derived, not kept."""
    state = worker.model.sharded_state_dict()
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def _passengers(worker: Worker) -> Sharded:
    """Whole on rank 0, and on every rank where they are trained."""
    return {name: _replicated(f"passenger.{name}", tensor) for name, tensor in worker.passengers.items()}


def _replicated(key: str, tensor: torch.Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=dist.get_rank())


def _mtp_state(worker: Worker) -> Sharded:
    """Masters and optimizer state of MTP layers that are trained, equal on every rank."""
    assert isinstance(worker.mtp, MtpTraining)
    return {name: _replicated(f"mtp.{name}", tensor) for name, tensor in worker.mtp.state_tensors().items()}


def _steps(worker: Worker) -> float:
    """Adam's step, equal for all parameters of all ranks (a rank may own nothing)."""
    mine = max((owned.step_count() for owned in worker.masters.owned), default=0.0)
    steps = torch.tensor([mine], dtype=torch.float64, device=worker.device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return float(steps.item())


def _sharding(worker: Worker) -> dict[nn.Parameter, ShardedTensor | ShardedTensorFactory]:
    """Parameter -> how Megatron divides it."""
    state = worker.model.sharded_state_dict()
    found = {}
    for value in state.values():
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and isinstance(value.data, torch.Tensor):
            found[value.data.data_ptr()] = value
    return {p: found[p.data_ptr()] for p in worker.model.parameters() if p.data_ptr() in found}


def _optimizer(worker: Worker, stepped: bool, *, fill: bool) -> Sharded:
    """`<state>.<parameter name>` -> sharded fp32 tensor in parameter shape. `fill`: with what the ranks own, gathered.

    Every rank of a data-parallel group takes part in filling each parameter, in the order of the model's parameters.
    """
    by_parameter = {owned.parameter: owned for owned in worker.masters.owned}
    sharding = _sharding(worker)
    names = {parameter: name for name, parameter in worker.model.named_parameters()}
    result: Sharded = {}
    for parameter, name in names.items():
        if not parameter.requires_grad:
            continue
        for state in STATES if stepped else ("param",):
            whole = torch.zeros(parameter.shape, dtype=torch.float32)
            if fill:
                whole = _whole(worker, parameter, by_parameter.get(parameter), state)
            result[f"{state}.{name}"] = _like(sharding[parameter], f"optimizer.{state}.{sharding[parameter].key}", whole)
    return result


def _like(sharding: Any, key: str, data: torch.Tensor) -> Any:
    if isinstance(sharding, ShardedTensorFactory):
        return replace(sharding, key=key, data=data)
    return replace(sharding, key=key, data=data, dtype=data.dtype)


def _whole(worker: Worker, parameter: nn.Parameter, owned: Owned | None, state: str) -> torch.Tensor:
    """A parameter's master or moment in parameter shape, in host memory; shards are gathered over data-parallel ranks."""
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=worker.device)
    if owned is not None:
        flat[owned.start : owned.stop] = owned.tensors()[state].to(flat.device)
    if worker.ddp.ddp_config.use_distributed_optimizer:
        group = worker.ddp.param_to_bucket_group[parameter].intra_distributed_optimizer_instance_group
        dist.all_reduce(flat, group=group)
    return flat.view(parameter.shape).cpu()


def _reference(worker: Worker) -> Sharded:
    sharding = _sharding(worker)
    assert worker.reference is not None
    result: Sharded = {}
    for place, tensor in zip(worker._swappable(), worker.reference, strict=True):
        assert isinstance(place.tensor, nn.Parameter)
        like = sharding[place.tensor]
        result[place.name] = _like(like, f"reference.{like.key}", tensor)
    return result


@torch.no_grad()
def _restore(worker: Worker, loaded: Sharded, step: float) -> None:
    names = {parameter: name for name, parameter in worker.model.named_parameters()}
    for owned in worker.masters.owned:
        name, tensors = names[owned.parameter], {}
        for state in STATES if step else ("param",):
            flat = loaded["optimizer"][f"{state}.{name}"].reshape(-1)
            tensors[state] = flat[owned.start : owned.stop].to(worker.device)
        owned.restore(tensors, step)
    for place in worker.places:
        if not place.parameter:  # a router's selection bias
            key = next(name for name, buffer in worker.model.named_buffers() if buffer is place.tensor)
            place.tensor.copy_(loaded["model"][key])
    for name, tensor in worker.passengers.items():
        tensor.copy_(loaded["passengers"][name])
    if isinstance(worker.mtp, MtpTraining):
        if "mtp" in loaded:
            worker.mtp.load_state_tensors(loaded["mtp"])
        else:
            worker.mtp.adopt_weights()
    if "reference" in loaded and worker.reference is not None:
        for place, tensor in zip(worker._swappable(), worker.reference, strict=True):
            tensor.copy_(loaded["reference"][place.name])
