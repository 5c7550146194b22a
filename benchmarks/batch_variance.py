"""How often a sample's tokens differ when only its batch's make-up changes.

    python -m benchmarks.batch_variance
The random streams belong to the sample, so every difference is the kernels' batch variance (another order of additions).
"""

from __future__ import annotations

import torch

from benchmarks.engine import build_pool
from runner.data import Request, SamplingParams


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 270, (128, 16), generator=generator).tolist()
    requests = [Request(str(i), 0, tuple(row), SamplingParams(1.0, 48), seed=i) for i, row in enumerate(prompts)]
    print(f"{'precision':10} {'batches':10} {'first differing token, per token':34} samples that differ")
    for precision in ("bf16", "int4_qat"):
        pool, _ = build_pool(precision, "none", 128)
        whole = {sample.prompt_id: sample.tokens for sample in pool.generate(requests)}
        for size in (1, 16):
            used = requests[:32] if size == 1 else requests
            differ = compared = 0
            for start in range(0, len(used), size):
                for sample in pool.generate(used[start : start + size]):
                    same = sample.tokens == whole[sample.prompt_id]
                    prefix = int(same.long().cumprod(0).sum()) - sample.prompt_length
                    differ += prefix < sample.response_length
                    compared += min(prefix + 1, sample.response_length)
            print(f"{precision:10} 128 vs {size:<3} {differ / compared:<34.2e} {differ} of {len(used)}")


if __name__ == "__main__":
    main()
