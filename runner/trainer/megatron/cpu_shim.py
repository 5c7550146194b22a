"""Lets megatron-core's CUDA-literal code run on a CPU-only torch; called only where CUDA is absent. No Megatron file is edited.

megatron-core 0.16.1 names `torch.cuda` in some hundred places that have nothing to do with CUDA (a device for a small
tensor, a stream to record on). Each replacement below says what it stands for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


class _Stream:
    """The one stream of a CPU; a class, since Megatron uses the name in annotations."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


class _CudaLiteralsToCpu(TorchFunctionMode):
    """device="cuda" -> cpu, x.cuda() -> x, pinned memory -> plain, x.type() -> "torch.cuda.*" (the optimizer compares names)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)) and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def install() -> None:
    """Once per process, before a model is built. Refuses to touch a machine with a GPU."""
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU shim must never be active where there is a GPU")
    _torch_cuda()
    _megatron()
    mode = _CudaLiteralsToCpu()
    mode.__enter__()
    _installed.append(mode)


def _torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # used as `device=torch.cuda.current_device()`
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _Stream, _Event
    stream = _Stream()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.multi_latent_attention as mla

    # the tracker of parallel random states drives the CPU's generator
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # unbound without Transformer Engine: NameError with moe_router_dtype=fp32
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # the original leaves CPU tensors alone, and then all_to_all gets tensors for split sizes
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    # says True without Transformer Engine, and then compares with classes that are not there
    mla.HAVE_TE = False
    for name in ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear"):
        if getattr(mla, name, None) is None:
            setattr(mla, name, type(name, (), {}))
