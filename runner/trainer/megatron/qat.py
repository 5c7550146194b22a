"""Quantization-aware training in place: after every optimizer step, quantized bf16 weights become qdq(bf16(master)).

The forward sees plain weights and the gradient goes to the fp32 master: the straight-through estimator without an autograd
node. Quantization comes after the all-gather of the distributed optimizer (a shard's border may cut a group), inside the
gather's completion where it overlaps the forward. Parameters that hold bf16(master) still to be quantized are `dirty`.
Marking happens around the optimizer's step and not in its copy of masters to weights: a precision-aware or CPU-offloaded
optimizer skips that copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.precision.codec import quantize_dequantize, quantize_dequantize_
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.trainer.megatron import names
from runner.trainer.megatron.masters import Masters
from runner.trainer.megatron.model import Place
from runner.trainer.torch.qat import straight_through


@dataclass(frozen=True)
class Quantized:
    """A quantized local parameter, or this rank's shard of one, and its format."""

    place: Place
    format: TensorFormat
    model: ModelConfig

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """qdq(bf16(weight)) [rows, in] in the dtype of `weight`, out of place."""
        if self._whole:
            return quantize_dequantize(weight, self.format, name=self.place.name)[0].to(weight.dtype)
        entry = self.place.entry
        pieces = zip(entry.hf, names.separate(entry, weight, self.model), strict=True)
        effective = [quantize_dequantize(piece, self.format, name=name)[0] for name, piece in pieces]
        return names.join(entry, effective, self.model).to(weight.dtype)

    def quantize_(self, weight: torch.Tensor) -> None:
        """The same in place."""
        if self._whole:
            quantize_dequantize_(weight, self.format, name=self.place.name)
        else:
            weight.copy_(self.effective(weight))

    @property
    def _whole(self) -> bool:
        """Whether the rows of all HF tensors can be quantized at once. Blocks begin at the first row of each."""
        return self.format.strategy != "block" or self.place.entry.kind is names.Kind.direct


QuantizedParameters = dict[nn.Parameter, Quantized]


def quantized_parameters(where: Iterable[Place], plan: PrecisionPlan, model: ModelConfig) -> QuantizedParameters:
    """The quantized local parameters. UserError for formats whose scales a shard or a fused parameter cuts."""
    found = {}
    for place in where:
        formats = {plan.format_of(name) for name in place.entry.hf}
        if len(formats) > 1:
            raise UserError(f"{place.name} holds weights of several formats: {', '.join(sorted(map(str, formats)))}")
        tensor_format = formats.pop()
        if not tensor_format.quantized:
            continue
        check_format(place, tensor_format, model)
        assert isinstance(place.tensor, nn.Parameter)
        found[place.tensor] = Quantized(place, tensor_format, model)
    return found


def check_format(place: Place, tensor_format: TensorFormat, model: ModelConfig) -> None:
    """UserError unless a shard can be quantized by itself with the result of the whole weight."""
    if tensor_format.has_global_scale or tensor_format.strategy == "tensor":
        raise UserError(
            f"{tensor_format} has one scale over all rows of {place.name}, which Megatron fuses and divides",
            key="precision",
            fix="precision=int4_qat or mxfp4_qat, or trainer=torch",
        )
    if place.dim is None or place.group.size() == 1:
        return
    block = tensor_format.strategy == "block"
    if place.dim == 1:
        sizes, what = [place.tensor.shape[-1]], "inputs"
        unit = place.tensor.shape[-1] * place.group.size() if tensor_format.strategy == "channel" else tensor_format.group_size
    else:
        sizes, what = [piece.shape[0] for piece in names.separate(place.entry, place.tensor, model)], "outputs"
        unit = tensor_format.group_size if block else 1
    for size in sizes:
        if size % unit:
            raise UserError(
                f"{place.name} has {size} {what} per rank of {place.group.size()}: that cuts a group of {unit}",
                key="precision.group_size",
                fix="a group_size that divides it, or a smaller parallelism.tp (experts: parallelism.etp)",
            )


class InPlaceQuantization:
    """Keeps the quantized parameters of one rank at qdq(bf16(master)).

    Build it after the optimizer, from unquantized weights, and call `resync` before the first step and after every load.
    """

    def __init__(self, ddp: DistributedDataParallel, masters: Masters, quantized: QuantizedParameters) -> None:
        self.ddp = ddp
        self.masters = masters
        self.quantized = quantized
        self.dirty: set[nn.Parameter] = set()
        self._held = False
        self.distributed = ddp.ddp_config.use_distributed_optimizer
        self.overlapped = self.distributed and ddp.ddp_config.overlap_param_gather
        self._groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]
        if self.overlapped:
            for group in self._groups:
                self._wrap(group)
        for optimizer in masters.optimizers:
            optimizer.reload_model_params = _refuse_reload

    def _wrap(self, group: Any) -> None:
        """Quantize a bucket's parameters as soon as their gather is complete."""
        finish = group.finish_param_sync

        def finish_param_sync(skip_next_bucket_dispatch: bool = False) -> None:
            finish(skip_next_bucket_dispatch=skip_next_bucket_dispatch)
            if group.param_gather_handle is None:
                self._flush(parameter for bucket in group.buckets for parameter in bucket.params)

        group.finish_param_sync = finish_param_sync

    @torch.no_grad()
    def _flush(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._held or not self.dirty:
            return
        for parameter in parameters:
            if parameter in self.dirty:
                self.quantized[parameter].quantize_(parameter.data)
                self.dirty.discard(parameter)

    def step(self, optimizer_step: Callable[[], Any]) -> None:
        """Run the optimizer's step, which leaves bf16(master) in the weights, or a gather of it still to come; then quantize."""
        self.dirty.update(self.quantized)
        self._held = True  # chained optimizers gather the same buckets several times
        try:
            optimizer_step()
        finally:
            self._held = False
        if not self.overlapped:
            self._flush(list(self.quantized))

    def settle(self) -> None:
        """Force pending gathers: every weight is complete and quantized afterwards. Before logprobs, swaps, export and save."""
        if self.overlapped:
            gather_now(self.ddp)
        self._flush(list(self.quantized))

    def resync(self) -> None:
        """Rebuild all weights from the masters and quantize them."""
        self.dirty.update(self.quantized)
        self.masters.write()
        if self.distributed:
            gather_now(self.ddp, again=True)
        self._flush(list(self.quantized))

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        """Inside: every weight of every rank is bf16(master). Afterwards they are derived from the masters again. Collective."""
        self.settle()
        self._held = True
        try:
            self.resync()
            yield
        finally:
            self._held = False
            self.resync()


def gather_now(ddp: DistributedDataParallel, *, again: bool = False) -> None:
    """Complete every parameter gather synchronously; `again` also where one was complete before."""
    for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)  # with a handle outstanding this only waits for it
            pending = False
        else:
            pending = not group.param_gather_dispatched
        if again or pending:
            group.start_param_sync(force_sync=True)


def _refuse_reload(state_dict: Any = None) -> None:
    raise RuntimeError("model weights are quantized: filling the masters from them would destroy the masters")


class NoQuantization:
    """The null object: weights follow the optimizer as Megatron makes them."""

    def __init__(self, ddp: DistributedDataParallel, masters: Masters) -> None:
        self.ddp, self.masters = ddp, masters
        self.distributed = ddp.ddp_config.use_distributed_optimizer

    def step(self, optimizer_step: Callable[[], Any]) -> None:
        optimizer_step()

    def settle(self) -> None:
        if self.distributed and self.ddp.ddp_config.overlap_param_gather:
            gather_now(self.ddp)

    def resync(self) -> None:
        self.masters.write()
        if self.distributed:
            gather_now(self.ddp, again=True)

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        self.settle()
        yield


class ForwardFakeQuantization(NoQuantization):
    """Fake quantization in every forward: for training without masters (fp32), and the oracle of the in-place kind.

    While a linear runs, the fake-quantized weight stands in its instance dict, where attribute look-up finds it before the
    parameter; a recomputed forward does the same again. It excludes gradient-accumulation fusion (no `main_grad`).
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        masters: Masters,
        model: nn.Module,
        quantized: QuantizedParameters,
    ) -> None:
        super().__init__(ddp, masters)
        self.enabled = True
        for module in model.modules():
            chosen: Sequence[str] = [name for name, p in module.named_parameters(recurse=False) if p in quantized]
            if chosen:
                self._wrap(module, chosen, quantized)

    def _wrap(self, module: nn.Module, chosen: Sequence[str], quantized: QuantizedParameters) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return inner(*args, **kwargs)
            for name in chosen:
                parameter = module._parameters[name]
                assert parameter is not None
                module.__dict__[name] = straight_through(parameter, quantized[parameter].effective)
            try:
                return inner(*args, **kwargs)
            finally:
                for name in chosen:
                    del module.__dict__[name]

        module.forward = forward

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        self.settle()
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True
