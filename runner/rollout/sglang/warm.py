"""`make warm-gpu`: compile the kernels that an INT4 server needs before it needs them: `python -m runner.rollout.sglang.warm`.

SGLang 0.5.23 compiles them with nvcc at their first use, one after the other while CUDA graphs are captured: 327 to 348 s for
each of the two Marlin modules of a mixture of experts (one H100 machine, 2026-11-28). Here each compiles in its own process, at
the same time, into the same cache (~/.cache/sglang). Not timed yet.
"""

from __future__ import annotations

import subprocess
import sys
import time

from runner.config.packages import installed, tool
from runner.config.preflight import visible_gpus

MARLIN = "from sglang.kernels.ops.moe.moe_wna16_marlin import _jit_moe_wna16_marlin_module as build"
# What SGLang's fused Marlin experts ask for: bf16, no expert parallelism, no bias, sorted expert ids, an inactive prefix; the
# second of their two products zeroes the rows of inactive experts.
MODULES = {
    "Marlin experts, first product": f"import torch; {MARLIN}; build(torch.bfloat16, False, False, True, False, True)",
    "Marlin experts, second product": f"import torch; {MARLIN}; build(torch.bfloat16, False, False, True, True, True)",
    "Marlin repacking": "from sglang.kernels.ops.quantization.gptq_marlin_repack import _jit_gptq_marlin_repack_module as b; b()",
}


def lacking() -> list[str]:
    problems = [] if visible_gpus() else ["no GPU here: kernels are compiled for the one that is there"]
    problems += [] if installed("sglang") else ["SGLang is not installed: make setup-gpu"]
    return problems + [f"no {name}, which compiles them" for name in ("nvcc", "ninja") if tool(name) is None]


def compile_all(modules: dict[str, str]) -> int:
    """Each line of Python in a process of its own, all at the same time; prints how each ended. 1 when one failed, else 0."""
    began = time.monotonic()
    running = {
        name: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, code in modules.items()
    }
    failed = 0
    for name, process in running.items():
        output, _ = process.communicate()
        lines = [line for line in output.splitlines() if line.strip()] or [""]
        failed |= process.returncode != 0
        print(
            f"{name}: " + (f"FAILED: {lines[-1]}" if process.returncode else f"ready, {time.monotonic() - began:.0f} s"),
            flush=True,
        )
    return int(failed)


def main() -> int:
    problems = lacking()
    for problem in problems:
        print(f"warm-gpu: {problem}", file=sys.stderr)
    return 2 if problems else compile_all(MODULES)


if __name__ == "__main__":
    sys.exit(main())
