"""What `doctor` looks at for the in-process engine. Torch is imported when it does."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import Config
from runner.cores import cpu_flags
from runner.findings import Finding, Status


def packed_matmul(cfg: Config) -> Iterator[Finding]:
    """Runs the packed matmul that the in-process engine decodes with, and says how wide the CPU's vectors are."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    needed = cfg.precision.rollout.format == "int4"
    try:
        q = torch.arange(-8, 8, dtype=torch.int32).repeat(16, 4)  # [16, 64], every integer
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q + 8, 1)
        scales = torch.full((2, 16, 2), 0.5, dtype=torch.bfloat16)  # [groups, out, (scale, zero)]
        scales[..., 1] = 0
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(64, dtype=torch.bfloat16), packed, 32, scales)
        right = torch.equal(out.T.float(), q.float() * 0.5)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        fix = "precision=bf16, or torch as pinned (make setup)"
        yield Finding("int4 matmul", Status.fail if needed else Status.warn, str(error).splitlines()[0], fix)
        return
    if not right:
        yield Finding("int4 matmul", Status.fail, f"{capability}: wrong results", "torch as pinned (make setup)")
    else:
        native = [name for name in ("avx512_bf16", "amx_bf16") if name in cpu_flags()]
        yield Finding(
            "int4 matmul", Status.ok, f"{capability}{', ' + ', '.join(native) if native else ''}; right on every integer"
        )
