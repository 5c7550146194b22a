"""Every Triton kernel compiles here to a GPU's machine code: the interpreter runs what a compiler refuses, and counts nothing.

Triton brings ptxas and nvdisasm with it; no GPU is needed.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interpreter import INTERPRETED, needs_triton

ROOT = Path(__file__).parent.parent
pytestmark = [needs_triton, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in an interpreting process")]

GPU, FP8, SCORES = "runner.precision.kernels.gpu", "runner.precision.kernels.gpu_fp8", "runner.trainer.fused_scores"
GROUPED = "runner.precision.kernels.gpu_fp8_grouped"
TILE = {"GROUPS": 32, "GROUP": 128}
ROWS = {"ROWS": 32, "GROUP": 128}
EXPERTS = "*u8 *fp32 *u8 *fp32 *i32 *i16 i32 i32 i32"
# module, kernel, types of its arguments in order, its constants, numbers per program, instructions per number at most. The
# INT4 kernels had 44 to 48 when they were timed; what a number of instructions means for the time is in kernels/gpu.py.
KERNELS: list[tuple[str, str, str, dict[str, Any], int, float]] = [
    *(
        (GPU, kernel, types, {"CONVENTION": convention, "KEEP": keep, **TILE}, 4096, 24)
        for kernel, types in (
            ("_quantize_dequantize_kernel", "*i16 *i16 *i32 i32 i32"),
            ("_quantize_pack_kernel", "*i16 *i16 *i32 *i32 i32 i32"),
        )
        for convention, keep in ((0, False), (2, False), (1, True))
    ),
    (GPU, "_unpack_kernel", "*i32 *i8 i32", {"BLOCK": 512}, 4096, 8),
    (GROUPED, "_grouped_kernel", EXPERTS, {"EXPERTS": 64, "ROWS": 64, "GROUP": 128}, 64 * 128, 24),
    (FP8, "_activations_kernel", "*i16 *u8 *fp32 i32 i32 i32", {"BF16": True, "DEQUANTIZE": False, **ROWS}, 4096, 36),
    (FP8, "_activations_kernel", "*fp32 *u8 *fp32 i32 i32 i32", {"BF16": False, "DEQUANTIZE": False, **ROWS}, 4096, 36),
    (FP8, "_activations_kernel", "*i16 *i16 *i16 i32 i32 i32", {"BF16": True, "DEQUANTIZE": True, **ROWS}, 4096, 46),
    (FP8, "_activations_kernel", "*fp32 *fp32 *fp32 i32 i32 i32", {"BF16": False, "DEQUANTIZE": True, **ROWS}, 4096, 46),
    (FP8, "_weight_kernel", "*i16 *fp32 *i32 i32 i32 i64 i64", {"KEEP": False, "GROUP": 128}, 128 * 128, 40),
    (FP8, "_weight_kernel", "*i16 *fp32 *i32 i32 i32 i64 i64", {"KEEP": True, "GROUP": 128}, 128 * 128, 40),
    (SCORES, "_forward_kernel", "*bf16 *i64 *fp32 *fp32 *fp32 i32 i32 fp32", {"BLOCK": 4096}, 4096, 40),
    *(
        (
            SCORES,
            "_backward_kernel",
            "*bf16 *i64 *fp32 *fp32 *fp32 *fp32 *bf16 i32 i32 fp32",
            {"ENTROPY": e, "BLOCK": 4096},
            4096,
            40,
        )
        for e in (False, True)
    ),
]


def compiled(module: str, kernel: str, types: str, constants: dict[str, Any], capability: int) -> bytes:
    """The machine code of a kernel whose arguments are divisible by 16, as those of whole tensors are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(importlib.import_module(module), kernel)
    names = [name for name in function.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    whole = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t[0] in "*i"}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=whole)
    result = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    code: bytes = result.asm["cubin"]
    return code


def listing(code: bytes, folder: Path) -> str:
    import triton

    (folder / "kernel.cubin").write_bytes(code)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


def instructions(code: bytes, folder: Path) -> int:
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+[A-Z@]", listing(code, folder), re.M))


@pytest.mark.parametrize(("module", "kernel", "types", "constants", "numbers", "most"), KERNELS, ids=lambda v: str(v)[:40])
def test_kernel_for_hopper(
    module: str, kernel: str, types: str, constants: dict[str, Any], numbers: int, most: float, tmp_path: Path
) -> None:
    constants = constants | ({"HARDWARE": True} if module == FP8 else {})
    per_number = instructions(compiled(module, kernel, types, constants, 90), tmp_path) * 4 * 32 / numbers
    assert 0 < per_number <= most


def test_experts_multiply_in_fp8_on_the_tensor_cores_and_keep_to_their_registers(tmp_path: Path) -> None:
    """A dot of 128 numbers is four of Hopper's instructions over 32; memory of a thread's own would be registers that ran out."""
    module, kernel, types, constants, *_ = next(case for case in KERNELS if case[0] == GROUPED)
    text = listing(compiled(module, kernel, types, constants, 90), tmp_path)
    assert len(re.findall(r"\bQGMMA\.64x128x32\.F32\.E4M3\.E4M3\b", text)) >= 4
    assert not re.findall(r"\b(?:STL|LDL)\b", text)


def test_kernels_for_ampere_too() -> None:
    """Compute capability 8.0 has no e4m3 of its own."""
    for module, kernel, types, constants, *_ in (KERNELS[0], KERNELS[-7], KERNELS[-4], KERNELS[-1]):
        constants = constants | ({"HARDWARE": False} if module == FP8 else {})
        assert compiled(module, kernel, types, constants, 80)


def test_no_kernel_is_missing_here() -> None:
    found = set()
    for path in (ROOT / "runner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            jit = isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            if jit and node.name.endswith("_kernel"):
                found.add((".".join(path.relative_to(ROOT).with_suffix("").parts), node.name))
    assert found == {(module, kernel) for module, kernel, *_ in KERNELS}
