"""`doctor gpu`: what a GPU must show before a run is trusted to it, measured on the one that is there, in one command.

Triton kernels against the reference bit for bit and against copy bandwidth, the in-process engine's kernels by one-hot inputs,
FP8 matmuls against their reference, a trainer's steps, its sleep and waking, and real SGLang servers in INT4, FP8 and bf16 with a
live update, a flipped bit and their sleep. SGLang's kernels are judged by logprobs under two sets of weights and by the residency
check, not by one-hot inputs: a server has no door for those. The report is a JSON file and a text file of the same findings;
docs/gpus.md shows those that lie in benchmarks/results/gpu/.

The parts take a device, so that tests run them on a CPU; only `check_gpu` insists on a GPU. Not run on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from runner import provenance, storage
from runner.config import compose
from runner.config.packages import LOCK_GPU, locked, version_of
from runner.config.schema import Config, Convention
from runner.data import Batch, ExportedTensor, Request, Sample, SamplingParams, Status, WeightSpan
from runner.doctor import engine
from runner.doctor.table import show
from runner.errors import UserError
from runner.findings import Finding
from runner.findings import Status as Grade
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision import fp8, fp8_matmul, int4, kernels
from runner.precision.codec import decode, encode, quantize_dequantize_
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

# A mixture of experts whose matrices SGLang's Marlin kernels take, small enough to load in a second
MODEL = [
    "model=tiny_moe", "model.num_layers=4", "model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=2",
    "model.head_dim=64", "model.vocab_size=4096", "model.max_context_tokens=1024", "model.num_experts=16",
    "model.experts_top_k=4", "model.expert_ffn_size=256", "model.initializer_range=0.05", "tracking=none", "speculative=none",
]  # fmt: skip
SERVER = [
    "parallelism=h200x1",
    "rollout=sglang",
    "trainer=torch",
    "rollout.memory_fraction=0.2",
    "rollout.cuda_graph_max_batch=32",
]
SERVED = ("int4_qat", "fp8", "bf16")
SHARE = 0.8  # of the copy bandwidth that quantizing aims at
GROUPS = (16, 32, 128, 1024, -1)
ROUNDS = 15
# Mean distance of a server's logprobs from its weights in bf16 (an H100 had .03 in bf16 and INT4, .10 in FP8; others' 1.7)
OWN_WEIGHTS, OTHER_WEIGHTS = 0.3, 0.6


def check_gpu(cfg: Config, console: Console) -> int:
    """Every check on this machine's first GPU; prints the table, writes the report; 1 when something failed, else 0."""
    if not torch.cuda.is_available():
        raise UserError("doctor gpu measures a GPU, and torch finds none here", fix="doctor, or doctor engine, on this machine")
    device = torch.device("cuda", 0)
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "memory": lambda: free_memory(device),
        "kernel bits": lambda: kernel_bits(device),
        "kernel speed": lambda: kernel_speed(device),
        "engine kernels": lambda: engine_kernels(device),
        "FP8 matmul": lambda: fp8_matmuls(device),
        "trainer": lambda: trainer_step(trainer_config("cuda")),
        **{f"SGLang {name}": lambda name=name: servers(server_config(name)) for name in SERVED},  # type: ignore[misc]
        "memory afterwards": lambda: free_memory(device),
    }
    return report(parts, Path(cfg.outputs_dir), card(device), console)


def report(parts: dict[str, Callable[[], Iterator[Finding]]], folder: Path, about: dict[str, Any], console: Console) -> int:
    """Run the parts one after the other, a part that breaks being a failed finding; table, doctor-gpu-<date>.json and .txt."""
    began, found = time.perf_counter(), list[Finding]()
    for name, part in parts.items():
        try:
            found += list(part())
        except (Exception, SystemExit) as error:
            problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            found.append(Finding(name, Grade.fail, problem.splitlines()[0] if problem else type(error).__name__))
    title = f"{about['card']}, torch {about['torch']}, {about['date']}"
    text = io.StringIO()
    code = show(title, found, Console(file=text, width=160, color_system=None))
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"doctor-gpu-{about['date'].replace(':', '').replace(' ', '-')}"
    lines = [{"check": item.name, "status": item.status.value, "found": item.found, "fix": item.fix} for item in found]
    content = about | {"seconds": round(time.perf_counter() - began, 1), "passed": not code, "findings": lines}
    storage.atomic_write(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    storage.atomic_write(stem.with_suffix(".txt"), text.getvalue())
    console.print(text.getvalue(), markup=False, highlight=False)
    console.print(f"report: {stem}.json and .txt", markup=False, highlight=False)
    return code


def card(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    on_gpu = device.type == "cuda"
    names = ("sglang", "sglang-kernel", "transformer-engine", "megatron-core", "triton", "torch-memory-saver")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "card": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in names},
        "code": provenance.commit(),
        "as_locked": version_of("torch") == locked(LOCK_GPU).get("torch"),
    }


def free_memory(device: torch.device) -> Iterator[Finding]:
    free, total = torch.cuda.mem_get_info(device)
    yield Finding("free memory", Grade.ok if free > 0.9 * total else Grade.warn, f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB")


def kernel_bits(device: torch.device) -> Iterator[Finding]:
    """quantize + pack, scales, unpack and quantize-dequantize on the device against the reference on the CPU."""
    generator, wrong, count = torch.Generator().manual_seed(0), list[str](), 0
    normal = (torch.randn(3, 32, 1024, generator=generator) * 0.02).bfloat16()
    tiny = (torch.randint(-40, 41, normal.shape, generator=generator).float() * 2.0**-133).bfloat16()
    ties = (torch.randint(-32, 33, normal.shape, generator=generator) * 0.5**7).bfloat16()
    kinds = {"normal": normal, "subnormal": tiny, "near ties": ties}
    for convention, group, (kind, weight) in itertools.product(Convention, GROUPS, kinds.items()):
        q, scale = int4.quantize(weight, group, convention)
        packed, scales = kernels.quantize_pack(weight.to(device), group, convention)
        effective = weight.to(device).clone()
        kernels.quantize_dequantize_(effective, group, convention)
        same = (
            torch.equal(packed.cpu(), int4.pack(q)),
            torch.equal(scales.cpu().view(torch.int16), scale.view(torch.int16)),
            torch.equal(kernels.unpack(packed, weight.shape[-1]).cpu(), q),
            torch.equal(effective.cpu().view(torch.int16), int4.dequantize(q, scale).view(torch.int16)),
        )
        count += 1
        if not all(same):
            wrong.append(f"{convention.name} group {group} {kind}")
    found = f"{count - len(wrong)} of {count} cases equal the reference" + (f"; not: {', '.join(wrong[:4])}" if wrong else "")
    yield Finding("INT4 kernels, bits", Grade.fail if wrong else Grade.ok, found)
    yield from _fp8_bits(device, [normal, (normal.float() * torch.logspace(-6, 3, 1024)).bfloat16(), ties])


def _fp8_bits(device: torch.device, weights: list[torch.Tensor]) -> Iterator[Finding]:
    """Activations 1 x 128 and weights 128 x 128 in place on the device against the reference on the CPU."""
    right, block = 0, TensorFormat.fp8("block")
    for weight in weights:
        (q, scale), (found_q, found_scale) = fp8.quantize_activations(weight), fp8.quantize_activations(weight.to(device))
        effective = weight.to(device).clone()
        kept = quantize_dequantize_(effective, block)
        wanted, block_scale = fp8.quantize_dequantize(weight)
        right += (
            torch.equal(found_q.cpu().view(torch.uint8), q.view(torch.uint8))
            and torch.equal(found_scale.cpu(), scale)
            and torch.equal(effective.cpu().view(torch.int16), wanted.view(torch.int16))
            and kept is not None
            and torch.equal(kept.scale.cpu(), block_scale)
        )
    grade = Grade.ok if right == len(weights) else Grade.fail
    yield Finding("FP8 kernels, bits", grade, f"{right} of {len(weights)} cases equal the reference")


def kernel_speed(device: torch.device, shape: tuple[int, int, int] = (256, 1024, 2048), group: int = 32) -> Iterator[Finding]:
    """Traffic of the kernels as a share of a copy's on the same device: medians of interleaved rounds."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    target = torch.empty_like(weight)
    packed, _ = kernels.quantize_pack(weight, group, Convention.exact)
    size, small, block = 2 * weight.numel(), 4 * packed.numel(), TensorFormat.fp8("block")
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * size, lambda: target.copy_(weight)),  # also refills what the next call quantizes in place
        "INT4 quantize-dequantize": (2 * size, lambda: kernels.quantize_dequantize_(target, group, Convention.exact)),
        "INT4 quantize + pack": (size + small, lambda: kernels.quantize_pack(weight, group, Convention.exact)),
        "INT4 unpack": (small + size // 2, lambda: kernels.unpack(packed, shape[-1])),
        "copy again": (2 * size, lambda: target.copy_(weight)),
        "FP8 weights in place": (2 * size, lambda: quantize_dequantize_(target, block)),
        "FP8 activations": (size + size // 2 + weight.numel() // 32, lambda: fp8.quantize_activations(weight)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, (_, call) in calls.items():
            times[name].append(_seconds(call, device))
    speed = {name: traffic / statistics.median(times[name][1:]) for name, (traffic, _) in calls.items()}  # the first compiles
    for name in (name for name in calls if not name.startswith("copy")):
        share = speed[name] / speed["copy"]
        grade = Grade.ok if share >= SHARE else Grade.warn
        found = f"{share:.0%} of copy ({speed['copy'] / 1e9:.0f} GB/s, read and written)"
        yield Finding(name, grade, found, "" if grade is Grade.ok else f"the aim is {SHARE:.0%}; bits are not concerned")


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def engine_kernels(device: torch.device, precision: str = "int4_qat") -> Iterator[Finding]:
    """One line for all roles and formats of the in-process engine, by one-hot inputs; a difference has a line of its own."""
    options = [f"precision={precision}", "rollout=local", f"rollout.device={device.type}"]
    cfg = compose.load_config(["model=tiny_moe", "tracking=none", *options])
    findings = list(engine.kernel_findings(cfg.model, engine.probe_for(cfg)))
    yield from (item for item in findings if item.status is Grade.fail)
    right = sum(item.status is not Grade.fail for item in findings)
    yield Finding(
        "in-process engine, one-hot", Grade.ok if right else Grade.fail, f"{right} of {len(findings)} weights recovered"
    )


def fp8_matmuls(device: torch.device) -> Iterator[Finding]:
    """Blockwise scaled_mm, and the kernel for experts, against the product of the dequantized operands in fp32."""
    reason = fp8_matmul.missing(device)
    if reason:
        yield Finding("FP8 matmul", Grade.ok, f"not asked: {reason}")
        return
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 512, generator=generator).bfloat16().to(device)
    weights = (torch.randn(3, 256, 512, generator=generator) * 0.02).bfloat16().to(device)
    (q, scale), (weight_q, weight_scale) = fp8.quantize_activations(x), fp8.quantize(weights)
    left, right = (
        fp8.dequantize_activations(q, scale, dtype=torch.float32),
        fp8.dequantize(weight_q, weight_scale, dtype=torch.float32),
    )
    yield _close("FP8 matmul", fp8_matmul.matmul(q, scale, weight_q[0], weight_scale[0]), left @ right[0].T)
    ends = torch.tensor([70, 70, 100], dtype=torch.int32, device=device)  # of three experts' rows; the second has none
    wanted = torch.cat([left[:70] @ right[0].T, left[70:] @ right[2].T])
    yield _close("FP8 matmul of experts", fp8_matmul.grouped(q, scale, weight_q, weight_scale, ends), wanted)


def _close(name: str, got: torch.Tensor, wanted: torch.Tensor) -> Finding:
    error = float((got.float() - wanted).abs().max() / wanted.abs().max())
    return Finding(name, Grade.ok if error < 2**-7 else Grade.fail, f"largest error {error:.1e} of the largest output")


def trainer_config(device: str) -> Config:
    options = ["rollout=local", f"trainer.device={device}", f"rollout.device={device}", "router_replay=none"]
    return compose.load_config(["model=tiny_moe", "tracking=none", "speculative=none", *options])


def trainer_step(cfg: Config) -> Iterator[Finding]:
    """Three steps of the torch trainer, then its sleep and waking: the exported bits must be those from before."""
    from runner.trainer.torch.trainer import TorchTrainer

    trainer = TorchTrainer(cfg)
    batch, metrics = _batch(cfg), list[dict[str, float]]()
    seconds = [_seconds(lambda: metrics.append(trainer.step(batch).metrics), trainer.device) for _ in range(3)]
    finite = all(value == value for step in metrics for value in step.values())
    found = (
        f"{seconds[-1] * 1e3:.0f} ms for {batch.num_tokens} tokens, all metrics finite" if finite else "metrics are not finite"
    )
    yield Finding("trainer step", Grade.ok if finite else Grade.fail, found)
    before = [part.clone() for item in trainer.export() for part in item.parts.values()]
    trainer.sleep()
    trainer.wake()
    after = [part for item in trainer.export() for part in item.parts.values()]
    same = all(torch.equal(old.view(torch.uint8), new.view(torch.uint8)) for old, new in zip(before, after, strict=True))
    yield Finding("trainer sleep and wake", Grade.ok if same else Grade.fail, "the same weights" if same else "other weights")


def _batch(cfg: Config) -> Batch:
    generator, samples = torch.Generator().manual_seed(2), list[Sample]()
    for index in range(16):
        tokens = torch.randint(0, cfg.model.vocab_size, (48,), generator=generator)
        logprobs, mask = -torch.rand(32, generator=generator) - 3, torch.ones(32, dtype=torch.bool)
        spans = [WeightSpan(0, 0, 32)]
        samples.append(
            Sample(f"p{index // 4}", index % 4, tokens, 32, mask, logprobs, Status.completed, "stop", weight_spans=spans)
        )
    return Batch(samples, [torch.full((32,), (-1.0) ** index) for index in range(16)], temperature=1.0)


# -- real servers ------------------------------------------------------------------------------------------------------


def server_config(precision: str) -> Config:
    return compose.load_config([*MODEL, *SERVER, f"precision={precision}"])


def weights_of(cfg: Config, seed: int) -> tuple[torch.nn.Module, list[ExportedTensor]]:
    """(bf16 model that computes with the effective weights, the export that an engine loads), random by seed."""
    plan, exported = PrecisionPlan.build(cfg.model, cfg.precision, "rollout"), list[ExportedTensor]()
    built = build_model(cfg.model, dtype=torch.float32, seed=seed)
    with torch.no_grad():
        for name, tensor in disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, built)):
            form = plan.format_of(name)
            exported.append(encode(name, tensor.to(torch.bfloat16), form))
            tensor.copy_(decode(exported[-1], form))
    return cast(torch.nn.Module, built).to(torch.bfloat16), exported


def servers(cfg: Config) -> Iterator[Finding]:
    """A server from dummy weights: first sync, logprobs, a flipped bit on the way, a live update, sleep and waking."""
    from runner.rollout.sglang import SglangPool
    from runner.rollout.sglang.config import layout
    from runner.weights.stream import seal

    name, began = f"SGLang {cfg.precision.name}", time.perf_counter()
    (own, first), (other, second) = weights_of(cfg, 1), weights_of(cfg, 2)
    pool = SglangPool(cfg)
    try:
        started = time.perf_counter() - began
        synced = pool.update_weights(0, iter(first))
        found = "; ".join(synced.problems[:3]) or f"{synced.resident_checked} tensors as resident, {synced.seconds:.2f} s"
        yield Finding(
            f"{name}, first sync", Grade.fail if synced.problems else Grade.ok, f"{found}; server up in {started:.0f} s"
        )
        yield _compared(f"{name}, logprobs", pool, own, other)
        sealed = list(seal(iter(second)))
        victim = next(i for i, item in enumerate(sealed) if "experts" in item.exported.name)
        sealed[victim] = dataclasses.replace(sealed[victim], exported=_flipped(sealed[victim].exported))
        problems = pool.update_weights(1, iter(sealed)).problems
        named = len(problems) == 1 and problems[0].startswith(next(iter(sealed[victim].exported.parts)))
        yield Finding(f"{name}, flipped bit", Grade.ok if named else Grade.fail, problems[0] if problems else "it was not found")
        updated = pool.update_weights(1, iter(second))
        found = "; ".join(updated.problems[:3]) or f"{updated.seconds:.2f} s, {updated.resident_checked} tensors compared"
        yield Finding(f"{name}, live update", Grade.fail if updated.problems else Grade.ok, found)
        yield _compared(f"{name}, logprobs after it", pool, other, own)
        if layout(cfg).shares_gpus:
            pool.sleep()
            pool.wake()
            yield _compared(f"{name}, after sleep and wake", pool, other, own)
    finally:
        pool.close()


def _flipped(item: ExportedTensor) -> ExportedTensor:
    parts = {name: tensor.clone() for name, tensor in item.parts.items()}
    next(iter(parts.values())).reshape(-1).view(torch.uint8)[5] ^= 1
    return ExportedTensor(item.name, item.format, parts)


def _compared(name: str, pool: Any, own: torch.nn.Module, other: torch.nn.Module) -> Finding:
    """Mean distance of sampled logprobs from both models: near the one, far from the other."""
    generator = torch.Generator().manual_seed(3)
    vocabulary: int = own.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    prompts = [tuple(torch.randint(2, vocabulary, (16,), generator=generator).tolist()) for _ in range(8)]
    sampling = SamplingParams(temperature=1.0, max_response_tokens=32)
    samples = list(pool.generate(Request(f"p{i}", 0, prompt, sampling, seed=i) for i, prompt in enumerate(prompts)))
    near, far = (statistics.mean(_distance(model, sample) for sample in samples) for model in (own, other))
    grade = Grade.ok if near < OWN_WEIGHTS and far > OTHER_WEIGHTS else Grade.fail
    return Finding(name, grade, f"{near:.3f} from its own weights, {far:.2f} from others (mean abs difference)")


def _distance(model: torch.nn.Module, sample: Sample) -> float:
    if not sample.response_length:
        raise UserError(f"a sample has no tokens: {sample.status.name}, {sample.finish_reason}")
    with torch.no_grad():
        logits = model(sample.tokens[None]).logits[0].float()
    logprobs = logits.log_softmax(-1)[sample.prompt_length - 1 : -1].gather(-1, sample.response_tokens[:, None])[:, 0]
    return float((logprobs - sample.rollout_logprobs).abs().mean())
