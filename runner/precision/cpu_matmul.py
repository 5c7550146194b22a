"""bf16 matrix products and convolutions on a CPU: torch's own, or widened to fp32 where the CPU has no bf16 instructions.

torch multiplies bf16 matrices on such a CPU one number at a time (1 to 16 GFLOP/s per core where fp32 reaches 40 to 65). The
product of two bf16 numbers is exact in fp32, so widening both operands, multiplying in fp32 and rounding the sum once to bf16 is
what native bf16 hardware computes too, up to the order of additions.

`install` replaces torch's CPU operators for bf16 operands (`mm`, `addmm`, `bmm`, `baddbmm`, their `out` forms, convolutions),
below autograd: linear layers, grouped matmuls, a vision tower's patches, the backward of all, Megatron's ranks and SGLang's CPU
servers end there. The in-process engine's compiled layers call torch below its dispatcher and ask `widened` instead
(cpu_kernels/matmul.py).
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from runner.config.schema import CpuMatmul

VARIABLE = "RUNNER_CPU_MATMUL"  # how a process tells its children which way it took
SLOWER = 2.0  # native is left where it takes this many times as long; what lies between may differ from start to start
_SHAPE = (512, 128, 256)
_ROUNDS = 3
_library: list[torch.library.Library] = []  # the replacements are in force as long as this object lives


def has_bf16_instructions() -> bool:
    """Whether torch's bf16 matmul has instructions of its own to run on (x86: AVX-512 BF16 or AMX)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # not known here without running it
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@lru_cache(maxsize=1)
def measure() -> float:
    """How many times as long torch's own bf16 matmul takes as the widened one: best of three of each, one thread."""
    rows, inner, columns = _SHAPE
    a, b = torch.ones(rows, inner, dtype=torch.bfloat16), torch.ones(inner, columns, dtype=torch.bfloat16)
    out, mm = torch.empty(rows, columns, dtype=torch.bfloat16), _native("mm.out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        native = _best(lambda: mm(a, b, out=out))
        wide = _best(lambda: out.copy_(torch.mm(a.float(), b.float())))
    finally:
        torch.set_num_threads(threads)
    return native / wide


def _best(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def choose(wanted: CpuMatmul) -> tuple[CpuMatmul, str]:
    """(native or widened, why). What a parent process took comes first, so that all processes of a run give the same bits."""
    if wanted is not CpuMatmul.auto:
        return wanted, "asked for (precision.cpu_matmul)"
    if inherited := os.environ.get(VARIABLE):
        return CpuMatmul[inherited], "as the process that started this one"
    if has_bf16_instructions():
        return CpuMatmul.native, "the CPU has bf16 instructions"
    ratio = measure()
    way = CpuMatmul.widened if ratio >= SLOWER else CpuMatmul.native
    return way, f"native took {ratio:.1f} times as long as widened"


def widened() -> bool:
    """Whether this process multiplies bf16 matrices in fp32."""
    return bool(_library)


def environment(wanted: CpuMatmul) -> dict[str, str]:
    """What a child process needs in its environment to take the way that this one takes."""
    return {VARIABLE: choose(wanted)[0].name}


def install(wanted: CpuMatmul) -> tuple[CpuMatmul, str]:
    """Take a way for this process, replacing torch's operators or putting them back; returns it and why."""
    way, reason = choose(wanted)
    if way is CpuMatmul.native:
        while _library:
            _library.pop()._destroy()
    elif not _library:
        _library.append(_replacements())
    return way, reason


# ---- the operators

_PRODUCTS, _SUMS = ("mm", "bmm"), ("addmm", "baddbmm")
_CONVOLUTIONS = {"convolution": 3, "convolution_backward": 3}  # operands that come first; a bias may be None
_kernels = {  # torch's own
    **{f"{name}{form}": torch.library.get_kernel(f"aten::{name}{form}", "CPU") for name in _PRODUCTS for form in ("", ".out")},
    **{f"{name}{form}": torch.library.get_kernel(f"aten::{name}{form}", "CPU") for name in _SUMS for form in ("", ".out", "_")},
    **{name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in _CONVOLUTIONS},
}


def _native(name: str) -> Callable[..., torch.Tensor]:
    """torch's own CPU kernel of an operator, whatever replaces it."""
    keys = torch._C._dispatch_keys(torch.empty(0)) - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    return lambda *args, **kwargs: _kernels[name].call_boxed(keys, *args, **kwargs)


def _replacement(name: str) -> Callable[..., torch.Tensor]:
    """The operator with bf16 operands widened; a call with any other operand goes to torch's own kernel."""
    kernel = _kernels[name]
    wide = getattr(torch, name.removesuffix(".out").removesuffix("_"))

    def call(keys: Any, *operands: torch.Tensor, out: torch.Tensor | None = None, **factors: Any) -> torch.Tensor:
        target = operands[0] if name.endswith("_") else out
        if not all(operand.dtype is torch.bfloat16 for operand in (*operands, *([] if out is None else [out]))):
            return kernel.call_boxed(keys, *operands, **factors, **({} if out is None else {"out": out}))
        result = wide(*(operand.float() for operand in operands), **factors)
        if target is None:
            return result.to(torch.bfloat16)
        return (target if target.shape == result.shape else target.resize_(result.shape)).copy_(result)

    return call


def _convolution(name: str) -> Callable[..., Any]:
    """The operator, or its backward, with bf16 operands widened and every result rounded once."""
    kernel, wide, count = _kernels[name], getattr(torch.ops.aten, name), _CONVOLUTIONS[name]

    def call(keys: Any, *arguments: Any) -> Any:
        operands, rest = arguments[:count], arguments[count:]
        if not all(operand is None or operand.dtype is torch.bfloat16 for operand in operands):
            return kernel.call_boxed(keys, *arguments)
        found = wide(*(None if operand is None else operand.float() for operand in operands), *rest)
        if isinstance(found, torch.Tensor):
            return found.to(torch.bfloat16)
        return tuple(None if gradient is None else gradient.to(torch.bfloat16) for gradient in found)

    return call


def _replacements() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an operator of torch is overridden, which is the purpose
        for name in _kernels:
            replacement = _convolution(name) if name in _CONVOLUTIONS else _replacement(name)
            library.impl(name, replacement, "CPU", with_keyset=True, allow_override=True)
    return library
