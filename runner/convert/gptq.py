"""`convert method=gptq`: llmcompressor finds the integers, everything else is the converter's.

llmcompressor 0.14.0.1 asks for transformers up to 5.17 and compressed-tensors 0.19, against 5.19 and 0.18 here, so it lives in
an environment of its own (`make setup-gptq`) and gptq_driver.py runs there. The plan's grid travels with the request, as the
scales that round to nearest would use, so a GPTQ checkpoint differs from a round-to-nearest one in its integers alone. Error
feedback may move a weight beyond its group's largest: integers span -8..7 under every convention, and -8 * scale is as exact
as 8 * scale, a power of two.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from runner.config.schema import ConvertConfig, ModelConfig, Role
from runner.convert.calibration import KEY, hub_dataset, is_file, read_tokens
from runner.convert.compare import audit_checkpoint
from runner.convert.engine import SPACE_MARGIN, Report, check_apart, identity, write_target
from runner.convert.jobs import Action, Job, Jobs, quantizing_jobs
from runner.convert.journal import Partial, check_space
from runner.convert.source import Source, StoredTensor, model_of, of_model, open_shard, open_source
from runner.errors import UserError
from runner.models import family_of
from runner.models.published import config_values
from runner.models.tokenizer import load_tokenizer
from runner.precision import formats, int4
from runner.precision.checks import WeightError
from runner.precision.codec import module_of
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

DRIVER = Path(__file__).with_name("gptq_driver.py")
ROOT = Path(__file__).parents[2]
INSTALL = "make setup-gptq, or convert.gptq_python=<the Python of an environment with llmcompressor 0.14.0.1>"
WORK = ".gptq"  # inside the partial target, gone when it is published
RESULT = "result.json"  # written last: the integers beside it are complete
WRITTEN = tuple(spec.name for spec in formats.all_formats() if spec.integer)
LOG_LINES = 3  # of the driver's log that an unexpected failure shows

Errors = dict[str, tuple[float, float]]  # module -> squared output error on the calibration data: GPTQ's, round to nearest's


@dataclass(frozen=True)
class Calibration:
    """What GPTQ saw and how it went: samples, tokens over all samples, and every module's errors."""

    samples: int
    tokens: int
    errors: Errors

    def summary(self) -> str:
        gptq, nearest = (sum(pair[side] for pair in self.errors.values()) for side in (0, 1))
        return (
            f"GPTQ on {self.samples} samples, {self.tokens} tokens: squared output error of the quantized layers "
            f"{gptq / nearest if nearest else 1.0:.3f} x that of round to nearest"
        )


def convert_gptq(
    source: Path,
    target: Path,
    tensor_format: TensorFormat,
    roles: Callable[[ModelConfig], frozenset[Role]],
    cfg: ConvertConfig,
    *,
    console: Console,
) -> tuple[Report, Calibration]:
    """Write `source` to `target` with the matrices of `roles` quantized by GPTQ on the grid of `tensor_format`.

    The target appears in one rename, after the audit has found the plan's set and grid in it. A kill while calibrating
    loses the calibration; one while writing does not. Raises UserError for a format other than int4 and int8, a missing
    environment, bad calibration data, a Hessian that cannot be inverted, and all that `convert` refuses.
    """
    if not tensor_format.integer:
        raise UserError(
            f"method=gptq writes {' and '.join(WRITTEN)}, not {tensor_format}",
            key="convert.format",
            fix=f"method=rtn, or format={WRITTEN[0]}",
        )
    opened = open_source(source)
    model = model_of(opened)
    if any(parameter.stack for parameter in family_of(model).parameters(model)):
        problem = f"method=gptq calibrates one module per matrix, and transformers has all experts of {model.family} in one"
        raise UserError(problem, key="convert.method", fix="method=rtn")
    python = driver_python(cfg)
    opened, notes = of_model(opened, model)
    check_apart(source, target)
    plan = PrecisionPlan.with_format(model, tensor_format, roles(model))
    jobs = quantizing_jobs(opened, plan)
    jobs.notes += notes
    tokens = calibration_tokens(cfg, model, python)
    with Partial(target, identity(opened, jobs) | _settings(cfg, tokens)) as partial:
        weights = [job for job in jobs if job.action is Action.encode]
        check_space(partial.folder, sum(job.input_bytes for job in weights) // 2 + SPACE_MARGIN)
        work = partial.folder / WORK
        errors = _finished(work, partial.identity)
        if errors is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            scales = _write_scales(opened, weights, work)
            request = _request(opened, model, tensor_format, cfg, work, scales, tokens)
            errors = _run_driver(python, request, work, len(weights), console)
            (work / RESULT).write_text(json.dumps({"identity": partial.identity, "errors": errors}))
        _use_integers(jobs, work)

        def check(folder: Path) -> None:
            differences = audit_checkpoint(plan, folder)
            if differences:
                raise UserError(f"the written checkpoint is not what was asked for: {'; '.join(differences)}")
            shutil.rmtree(work)

        report = write_target(opened, jobs, plan.quantization_config(), partial, workers=cfg.workers, check=check)
    return report, Calibration(len(tokens), sum(len(row) for row in tokens), errors)


def driver_python(cfg: ConvertConfig) -> Path:
    """The interpreter with llmcompressor; UserError with the install line where it is missing."""
    given = Path(cfg.gptq_python).expanduser()
    python = given if given.is_absolute() else ROOT / given
    if not python.is_file():
        raise UserError(f"method=gptq needs llmcompressor in its own environment, {python} is missing", fix=INSTALL)
    found = subprocess.run([python, "-c", "import llmcompressor"], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"{python} cannot import llmcompressor: {reason}", fix=INSTALL)
    return python


def calibration_tokens(cfg: ConvertConfig, model: ModelConfig, python: Path) -> list[list[int]]:
    """Token ids of the calibration samples, from a JSONL file or the first rows of a hub dataset's `train` split."""
    if cfg.calibration is None:
        raise UserError("method=gptq needs calibration data", key=KEY, fix="convert.calibration=<JSONL file or hub id>")
    tokenizer = load_tokenizer(model)
    wanted = (cfg.calibration_samples, cfg.calibration_tokens)
    if is_file(cfg.calibration):
        return read_tokens(Path(cfg.calibration).expanduser(), tokenizer, *wanted)
    name, config = hub_dataset(cfg.calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name.replace('/', '-')}.jsonl"
        request = {"id": name, "config": config, "split": "train", "count": cfg.calibration_samples, "path": str(path)}
        with _driver(python, "rows", request, Path(folder)) as events:
            for _ in events:
                pass
        return read_tokens(path, tokenizer, *wanted)


def _settings(cfg: ConvertConfig, tokens: list[list[int]]) -> dict[str, Any]:
    """What the integers depend on beside source and plan."""
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return {"method": "gptq", "damping": cfg.damping, "calibration": digest}


def _finished(work: Path, wanted: dict[str, Any]) -> Errors | None:
    """The errors of an earlier run of the driver for the same conversion, None where it did not finish."""
    path = work / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return result["errors"] if result["identity"] == wanted else None


def _write_scales(source: Source, weights: list[Job], work: Path) -> list[Path]:
    """The grid of every weight, as round to nearest derives it: one file per shard, module name -> bf16 [out, groups]."""
    by_shard: dict[str, list[Job]] = {}
    for job in weights:
        by_shard.setdefault(job.inputs[0].shard, []).append(job)
    paths = []
    for index, (shard, jobs) in enumerate(by_shard.items()):
        scales: dict[str, torch.Tensor] = {}
        with open_shard(source.folder / shard) as handle:
            for job in jobs:
                grid = job.tensor_format
                assert grid.convention is not None
                try:
                    weight = handle.get_tensor(job.name)
                    scales[module_of(job.name)] = int4.group_scales(weight, grid.group_size, grid.convention, grid.bits)
                except WeightError as error:
                    raise UserError(f"{job.name}: {error.problem}", key="convert.source") from None
        paths.append(work / f"scales-{index:05d}.safetensors")
        save_file(scales, paths[-1])
    return paths


def _request(
    source: Source,
    model: ModelConfig,
    tensor_format: TensorFormat,
    cfg: ConvertConfig,
    work: Path,
    scales: list[Path],
    tokens: list[list[int]],
) -> dict[str, Any]:
    """See gptq_driver.quantize."""
    (work / "tokens.json").write_text(json.dumps(tokens))
    return {
        "model": str(source.folder.resolve()),
        "config": config_values(model),
        "tokens": str((work / "tokens.json").resolve()),
        "scales": [str(path.resolve()) for path in scales],
        "num_bits": tensor_format.bits,
        "group_size": tensor_format.group_size,
        "damping": cfg.damping,
        "folder": str(work.resolve()),
    }


def _run_driver(python: Path, request: dict[str, Any], work: Path, num_weights: int, console: Console) -> Errors:
    """Let the driver quantize; returns every module's errors."""
    errors: Errors = {}
    with (
        _driver(python, "quantize", request, work) as events,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("GPTQ: loading the model", total=num_weights)
        for event in events:
            if event["event"] == "weights":
                errors |= {name: (gptq, nearest) for name, (gptq, nearest) in event["errors"].items()}
                name = next(reversed(event["errors"]))
                bar.update(task, completed=len(errors), description=f"GPTQ: {name}")
                if not console.is_terminal:
                    console.print(f"GPTQ {len(errors)}/{num_weights} {name}", highlight=False)
    if len(errors) != num_weights:
        raise UserError(f"llmcompressor quantized {len(errors)} of {num_weights} weights; its log is {work / 'log.txt'}")
    return errors


@contextmanager
def _driver(python: Path, task: str, request: dict[str, Any], folder: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The driver's events as they come; UserError for a reported error, and for any other failure with the log's end."""
    (folder / "request.json").write_text(json.dumps(request))
    log = folder / "log.txt"
    with log.open("w") as stderr:
        # -I: without this file's folder on the path, where modules lie that libraries might take for others
        command = [str(python), "-I", str(DRIVER), task, str(folder / "request.json")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    finished = False

    def events() -> Iterator[dict[str, Any]]:
        nonlocal finished
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                raise UserError(event["problem"], key="convert.method" if task == "quantize" else KEY, fix=event["fix"] or None)
            finished = event["event"] == "done"
            yield event

    try:
        yield events()
        if process.wait() or not finished:
            last = " | ".join(log.read_text().strip().splitlines()[-LOG_LINES:])
            raise UserError(
                f"llmcompressor failed (exit code {process.returncode}): {last}",
                fix=f"its log: {log}" if task == "quantize" else None,
            )
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()


def _use_integers(jobs: Jobs, work: Path) -> None:
    """Turn every encode job into one that packs the driver's integers beside the scales of the request."""
    stored: dict[str, dict[str, StoredTensor]] = {"scales": {}, "integers": {}}
    for path in sorted(work.resolve().glob("*.safetensors")):
        kind = stored[path.name.partition("-")[0]]
        with open_shard(path) as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                shape = tuple(handle.get_slice(name).get_shape())
                dtype = torch.int8 if kind is stored["integers"] else torch.bfloat16
                kind[name] = StoredTensor(name, str(path), dtype, shape)
    for work_list in jobs.shards.values():
        for index, job in enumerate(work_list):
            if job.action is Action.encode:
                module = module_of(job.name)
                inputs = (job.inputs[0], stored["integers"][module], stored["scales"][module])
                work_list[index] = replace(job, action=Action.pack, inputs=inputs)
