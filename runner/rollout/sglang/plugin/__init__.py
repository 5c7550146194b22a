"""What SGLang 0.5.23 lacks for this project, through SGLang's own plugin entry points; no file of SGLang is changed.

SGLang calls `register` in each of its processes. weights.py: weight updates that are verified, on every device.
cpu.py and quantization.py: the CPU twin; they refuse to load where CUDA is present.
"""

from __future__ import annotations

registered = False


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    global registered
    import os

    if "RUNNER_SGLANG_SERVER" not in os.environ:  # an SGLang that someone else started in this environment
        return
    import torch

    from runner.rollout.sglang.plugin import common, weights

    common.register()
    weights.register()
    if not torch.cuda.is_available():
        from runner.rollout.sglang.plugin import cpu, quantization

        cpu.register()
        quantization.register()
    registered = True
