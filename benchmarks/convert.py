"""INT4 conversion against compressed-tensors, in one run: `python benchmarks/convert.py [--threads N] [--rounds N]`.

Both sides turn the same bf16 expert weights into the same bytes: scales, integers, packed words (llm-compressor's
round-to-nearest grid, group 32, which both implement; checked before anything is timed). Rounds alternate, and the
fastest of each side counts, so that other work on the machine hurts both alike;
compressed-tensors is tried both with a weight per thread and with threads inside its operators. Then a whole checkpoint folder is
converted from disk to disk. Prints GB/s of bf16 input, the ratio last; exits 1 when the ratio is below 10.
"""

# ruff: noqa: E402 (the path is mended before anything that imports transformers)
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Python puts this folder first on the path, where kernels.py would pass for the package `kernels` that transformers probes
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

from runner.config.schema import Convention, ModelConfig, PrecisionConfig
from runner.convert.engine import convert
from runner.cores import available_cores
from runner.models import family_of
from runner.models.build import save_config
from runner.models.common import PLAIN
from runner.precision import codec, kernels
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat

GOAL = 10.0
GROUP = 32
FORMAT = TensorFormat.int4(GROUP, Convention.llmcompressor)
SHAPE = (2048, 4096)
COUNT = 4
ARGS = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True)

Packed = tuple[torch.Tensor, torch.Tensor]


def ours(weight: torch.Tensor) -> Packed:
    """What converter and weight sync call for every weight."""
    parts = codec.encode("w.weight", weight, FORMAT).parts
    return parts["w.weight_packed"], parts["w.weight_scale"]


def theirs(weight: torch.Tensor) -> Packed:
    """compressed-tensors: min and max of each group, scales, integers, packed words."""
    low, high = torch.aminmax(weight.unflatten(-1, (-1, GROUP)), dim=-1)
    scale, zero_point = calculate_qparams(low, high, ARGS)
    integers = quantize(weight, scale, zero_point, ARGS, dtype=torch.int8)
    return pack_to_int32(integers, 4), scale


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_workers(function: Callable[[torch.Tensor], Packed], weights: list[torch.Tensor], pool: ThreadPoolExecutor) -> None:
    """As the converter does it: a weight per worker, operators on one thread."""
    torch.set_num_threads(1)
    list(pool.map(function, weights))


def by_operators(function: Callable[[torch.Tensor], Packed], weights: list[torch.Tensor], threads: int) -> None:
    """One weight after the other, operators on every thread."""
    torch.set_num_threads(threads)
    for weight in weights:
        function(weight)


def tiny_moe(hidden: int, ffn: int, experts: int) -> ModelConfig:
    sizes = PLAIN | {"num_experts": experts, "experts_top_k": 2, "expert_ffn_size": ffn}
    return ModelConfig(
        name="bench", family="qwen3_moe", hf_checkpoint=None, num_layers=1, hidden_size=hidden,
        ffn_size=ffn, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=272, max_context_tokens=128, rope_theta=1e4,
        norm_eps=1e-6, tied_embeddings=True, attention_bias=False, qk_norm=True, initializer_range=0.02, toy_twin="none", **sizes,
    )  # fmt: skip


def disk_to_disk(workers: int) -> None:
    """A folder of half a gigabyte, through headers, page cache, fsync and rename."""
    model = tiny_moe(2048, 2048, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        save_config(model, folder / "source")
        weights = {p.name: torch.randn(p.shape).mul_(0.02).bfloat16() for p in family_of(model).parameters(model)}
        save_file(weights, folder / "source" / "model.safetensors", metadata={"format": "pt"})
        del weights

        def roles(model: ModelConfig) -> frozenset:  # type: ignore[type-arg]
            return quantized_roles(model, PrecisionConfig(roles=None))

        reports = [convert(folder / "source", folder / f"{i}", FORMAT, roles, workers=workers) for i in range(3)]
    best = max(report.gigabytes_per_second for report in reports)
    print(f"{'whole conversion, disk to disk':<44}{best:8.2f} GB/s ({reports[0].read_bytes / 1e9:.2f} GB, one safetensors file)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = [(torch.randn(SHAPE) * 0.02).to(torch.bfloat16) for _ in range(COUNT)]
    gigabytes = sum(weight.numel() * 2 for weight in weights) / 1e9
    kernels.load()  # compiled once, as a conversion does before it starts
    for mine, other in zip(ours(weights[0]), theirs(weights[0]), strict=True):
        if not torch.equal(mine, other):
            print("the two sides do not give the same bits: nothing to compare")
            return 1
    our_seconds, their_seconds = [], []
    with ThreadPoolExecutor(options.threads) as pool:
        for _ in range(options.rounds):
            our_seconds.append(seconds(lambda: by_workers(ours, weights, pool)))
            their_seconds.append(seconds(lambda: by_workers(theirs, weights, pool)))
            their_seconds.append(seconds(lambda: by_operators(theirs, weights, options.threads)))
    our_rate, their_rate = gigabytes / min(our_seconds), gigabytes / min(their_seconds)
    print(f"INT4 group {GROUP}, {COUNT} bf16 weights {list(SHAPE)}, {options.threads} threads, best of {options.rounds}")
    print(f"{'compressed-tensors quantize + pack':<44}{their_rate:8.2f} GB/s")
    print(f"{'runner quantize + pack':<44}{our_rate:8.2f} GB/s")
    disk_to_disk(options.threads)
    ratio = our_rate / their_rate
    print(f"{'ratio of quantize + pack (goal: at least 10)':<44}{ratio:8.1f}x")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
