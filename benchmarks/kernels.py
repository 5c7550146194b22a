"""Speed of the INT4 kernels against copy bandwidth, eager torch and compressed-tensors, on this machine.

    python -m benchmarks.kernels [--device cpu|cuda] [--experts 8 --out 1024 --in 2048] [--group-size 32] [--minimum 10]

Prints the copy bandwidth first (bytes read plus bytes written), then per kernel GB/s of bf16 input, traffic as a share of
the copy, and the ratio to eager torch. The last line is quantize + pack against compressed-tensors' own; with
`--minimum`, a smaller ratio exits with 1. Every figure is the best of several interleaved rounds, since other programs
only ever slow one down.
"""

# ruff: noqa: E402 (the path must be right before the other imports)
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Run as a script, this file's folder comes first on the path, and transformers would take the file for the package `kernels`.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from runner.config.schema import Convention
from runner.precision import int4, kernels

ROUNDS = 7
EXPERTS = {"cpu": 8, "cuda": 256}  # of 4 MB each: on a GPU far more than its cache holds, and long beside a launch


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one call: wall clock on a CPU, events on a GPU."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def best(functions: dict[str, Callable[[], object]], refill: Callable[[], object], device: str) -> dict[str, float]:
    """Best time of each function over interleaved rounds; the first, warming round (which compiles) is not counted. `refill`
    comes before each and is not timed: weights that are quantized already are mostly zeros of another kind."""
    times = {name: float("inf") for name in functions}
    for round_ in range(ROUNDS + 1):
        for name, function in functions.items():
            refill()
            taken = seconds(function, device)
            if round_:
                times[name] = min(times[name], taken)
    return times


def compressed_tensors_pack(weight: torch.Tensor, group_size: int) -> Callable[[], object]:
    """Its own way from one bf16 matrix to packed integers: observer arithmetic, then its compressor."""
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def run() -> None:
        for matrix in weight:
            grouped = matrix.unflatten(-1, (-1, group_size))
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            compressor.compress({"weight": matrix, "weight_scale": scale}, scheme)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, help="default: 8 on a CPU, 256 on a GPU")
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--in", dest="columns", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--convention", choices=[convention.name for convention in Convention], default="exact")
    parser.add_argument("--minimum", type=float, default=0.0, help="smallest ratio to compressed-tensors that passes")
    options = parser.parse_args()
    device, group, convention = options.device, options.group_size, Convention[options.convention]
    kernels.load()

    generator = torch.Generator().manual_seed(0)
    experts = options.experts or EXPERTS[device]
    weight = (torch.randn(experts, options.out, options.columns, generator=generator) * 0.02).bfloat16().to(device)
    changed, target = weight.clone(), torch.empty_like(weight)
    packed, scale = kernels.quantize_pack(weight, group, convention)
    reference, _ = int4.quantize(weight, group, convention)
    if not torch.equal(packed, int4.pack(reference)):
        raise SystemExit("the kernel's bits differ from the reference's")
    times = best(
        {
            "copy": lambda: target.copy_(weight),
            "quantize + pack": lambda: kernels.quantize_pack(weight, group, convention),
            "quantize + pack, eager": lambda: int4.pack(int4.quantize(weight, group, convention)[0]),
            "quantize + pack, compressed-tensors": compressed_tensors_pack(weight, group),
            "quantize-dequantize": lambda: kernels.quantize_dequantize_(changed, group, convention),
            "quantize-dequantize, eager": lambda: changed.copy_(int4.quantize_dequantize(weight, group, convention)[0]),
            "unpack": lambda: kernels.unpack(packed, options.columns),
            "unpack, eager": lambda: int4.unpack(packed, options.columns),
        },
        lambda: changed.copy_(weight),
        device,
    )
    size = weight.numel() * 2
    small = packed.numel() * 4
    traffic = {"copy": 2 * size, "quantize + pack": size + small, "quantize-dequantize": 2 * size, "unpack": small + size // 2}
    bandwidth = traffic["copy"] / times["copy"]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, weight {tuple(weight.shape)} bf16, group {group}, {convention.name}")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + write)")
    for name in ("quantize + pack", "quantize-dequantize", "unpack"):
        share = traffic[name] / times[name] / bandwidth
        ratio = times[f"{name}, eager"] / times[name]
        print(f"{name:20} {size / times[name] / 1e9:7.2f} GB/s of bf16, {share:4.0%} of the copy, {ratio:5.1f} x eager torch")
    theirs = times["quantize + pack, compressed-tensors"]
    print(f"compressed-tensors   {size / theirs / 1e9:7.2f} GB/s of bf16")
    ratio = theirs / times["quantize + pack"]
    print(f"quantize + pack is {ratio:.1f} x compressed-tensors")
    return int(ratio < options.minimum)


if __name__ == "__main__":
    sys.exit(main())
