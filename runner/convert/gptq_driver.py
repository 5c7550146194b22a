"""GPTQ through llmcompressor: this file runs in the environment that has it (`make setup-gptq`), never in runner's own.

    python gptq_driver.py quantize REQUEST.json     calibrate, quantize, write integers
    python gptq_driver.py rows REQUEST.json         rows of a hub dataset as JSONL

It imports nothing of runner, which is not installed there. Every line on stdout is a JSON object {"event": ...}; everything
that libraries print goes to stderr. The grid is not decided here: the request brings the scales of every weight, and a
weight that GPTQ left off its grid is an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

FILE_BYTES = 2 << 30  # of integers that wait in memory to be written


class Reported(Exception):
    """An error that the user can act on; `fix` says how."""

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.fix = fix


def main() -> int:
    """0, or 1 after an {"event": "error"} line; other exceptions leave a traceback on stderr and a line that says so."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # progress bars and library messages must not mix with the events
    task, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    try:
        {"quantize": quantize, "rows": rows}[task](request, events)
    except Reported as error:
        emit(events, "error", problem=str(error), fix=error.fix)
        return 1
    return 0


def emit(events: TextIO, event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), file=events)


def rows(request: dict[str, Any], events: TextIO) -> None:
    """The first `count` rows of a split of a hub dataset, one JSON object per line, to `path`."""
    from datasets import load_dataset

    try:
        data = load_dataset(request["id"], request["config"], split=request["split"])
    except Exception as error:  # many kinds: network, unknown id, unknown configuration
        raise Reported((str(error).splitlines() or [type(error).__name__])[0]) from error
    count = min(request["count"], len(data))
    with Path(request["path"]).open("w") as file:
        for index in range(count):
            file.write(json.dumps(data[index], default=str) + "\n")
    emit(events, "done", rows=count)


def quantize(request: dict[str, Any], events: TextIO) -> None:
    """GPTQ (Frantar et al., arXiv 2210.17323) of the linear modules that `scales` names, layer after layer, each calibrated
    on the outputs of the quantized layers before it; all experts see all tokens, whatever the router says.

    Reads: model (folder), config (config.json in the words of transformers' own class), tokens (JSON, a list of token lists),
    scales (safetensors files, module name -> bf16 [out, groups]), num_bits, group_size (-1: a row), damping. Writes
    `integers` files: module name -> int8 [out, in]. Events: "weights" with each module's squared output error on the calibration
    data, GPTQ's and round-to-nearest's on the same grid; "done".
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokens = json.loads(Path(request["tokens"]).read_text())
    emit(events, "loading")
    values = request["config"]
    if values["model_type"] not in CONFIG_MAPPING:  # its folder may bring code, which is not run
        raise Reported(f"llmcompressor's transformers has no model_type {values['model_type']}", "method=rtn")
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    model = AutoModelForCausalLM.from_pretrained(request["model"], config=config, dtype=torch.bfloat16, trust_remote_code=False)
    # transformers 5 fuses experts into stacks [E, out, in]; GPTQ needs a linear module for each. llmcompressor's loader that
    # skips the stack imports every model of transformers, and so packages that are not here.
    linearize_moe(model)
    scales = _scales(request["scales"])
    modules = dict(model.named_modules())
    missing = [name for name in scales if name not in modules]
    if missing:
        raise Reported(f"llmcompressor's model has no module {missing[0]} ({len(missing)} of {len(scales)} are missing)")
    modifier = _modifier(request, {id(modules[name]): (name, scale) for name, scale in scales.items()}, events)
    samples: Any = [{"input_ids": torch.tensor(row)} for row in tokens]
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(samples, batch_size=1),
        recipe=modifier,
        num_calibration_samples=len(tokens),
        pipeline="sequential",
        moe_calibrate_all_experts=True,
    )
    # a singular Hessian makes llmcompressor round to nearest: not what was asked for
    fallen_back = modifier._rtn_fallback_module_names
    if fallen_back:
        raise Reported(
            f"the Hessians of {len(fallen_back)} weights cannot be inverted, the first is {fallen_back[0]}",
            "more convert.calibration_samples, or a larger convert.damping",
        )
    emit(events, "done", weights=len(scales))


def _scales(files: Iterable[str]) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: scale for file in files for name, scale in load_file(file).items()}


def effective(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integers [out, in] and bf16 scales [out, groups] -> bf16(q * s)."""
    grouped = integers.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.to(integers.device).unsqueeze(-1)).flatten(-2)


def round_to_nearest(weight: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """fp32 weights [out, in] -> integers, on the whole range of the bits."""
    quotient = weight.unflatten(-1, (scale.shape[-1], -1)) / scale.float().unsqueeze(-1)
    low = -(2 ** (num_bits - 1))
    return quotient.round().clamp(low, -low - 1).flatten(-2)


def on_grid(name: str, weight: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The integers of a weight that lies on the grid of these bf16 scales, exactly; Reported otherwise."""
    integers = round_to_nearest(weight.float(), scale, num_bits)
    if not effective(integers, scale).equal(weight.to(scale.dtype)):
        raise Reported(f"llmcompressor did not put {name} on the grid of its {scale.shape[-1]} scales a row")
    return integers


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Sum over outputs of d H d^T, H = sum over calibration tokens of x x^T / sequences: the squared error of the
    module's outputs on the calibration data, per sequence."""
    return float(((difference @ hessian) * difference).sum())


def _modifier(request: dict[str, Any], given: dict[int, tuple[str, Any]], events: TextIO) -> Any:
    """A GPTQModifier on the given scales that writes integers and reports errors. `given`: id(module) -> (name, scale)."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.gptq.helpers import assign_batches
    from llmcompressor.observers import Observer
    from safetensors.torch import save_file

    @Observer.register("given")
    class GivenScales(Observer):
        """Not a minimum and a maximum, but the scales that the request brought."""

        def attach(self, module: torch.nn.Module) -> None:
            self.scale = given[id(module)][1].to(module.weight.device)

        def update_statistics_from_observed(self, observed: torch.Tensor) -> None:
            self.min_vals = self.max_vals = self.scale

        def get_qparams(self) -> dict[str, Any]:
            self.delete_statistics()
            return {"scale": self.scale, "zero_point": torch.zeros_like(self.scale, dtype=torch.int8), "global_scale": None}

    class ReportingGPTQ(GPTQModifier):
        def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
            integers: dict[str, torch.Tensor] = {}
            for batch in assign_batches(module_list, self.batched_quantization, self.block_size):
                # consumed by the call below
                before = [(m.weight.detach().float().clone(), self._hessians[m].clone(), self._num_samples[m]) for m in batch]
                super().compress_module_list(batch)
                report = {}
                for module, (weight, hessian, samples) in zip(batch, before, strict=True):
                    name, scale = given[id(module)]
                    result = on_grid(name, module.weight.detach(), scale.to(weight.device), request["num_bits"])
                    integers[name] = result.to(torch.int8).cpu()
                    nearest = effective(round_to_nearest(weight, scale.to(weight.device), request["num_bits"]), scale)
                    hessian /= 2 * samples  # llmcompressor accumulates 2 x x^T
                    report[name] = [output_error(weight - w, hessian) for w in (module.weight.float(), nearest.float())]
                if sum(tensor.numel() for tensor in integers.values()) > FILE_BYTES:
                    write(integers)
                    integers = {}
                emit(events, "weights", errors=report)
            write(integers)

    written = 0

    def write(integers: dict[str, torch.Tensor]) -> None:
        nonlocal written
        save_file(integers, Path(request["folder"]) / f"integers-{written:05d}.safetensors")
        written += 1

    group_size = request["group_size"]
    grid = QuantizationArgs(
        num_bits=request["num_bits"],
        type="int",
        symmetric=True,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        observer="given",
    )
    # exact names: `Linear` or a pattern would reach routers too
    scheme = QuantizationScheme(targets=[name for name, _ in given.values()], weights=grid)
    return ReportingGPTQ(config_groups={"group_0": scheme}, dampening_frac=request["damping"])


if __name__ == "__main__":
    sys.exit(main())
