"""Low-rank adapters of the torch trainer: their start, gradients, checkpoints and memory; the base stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from runner.config import rules
from runner.config.choices import Role
from runner.config.schema import Config, QatPlacement
from runner.data import Batch, ExportedTensor, Request, SamplingParams, request_seed
from runner.errors import UserError
from runner.planner.memory import plan_memory
from runner.planner.parameters import adapter_elements, base_elements, take_inventory
from runner.precision.codec import decode
from runner.rollout.local.pool import LocalPool
from runner.run import export
from runner.trainer.lora import AdapterOptimizer
from runner.trainer.torch.trainer import TorchTrainer
from runner.weights.bits import same_bits
from tests.configs import problems
from tests.trainer_configs import DENSE, MLA, MOE, batch, config

MODELS = {"dense": DENSE, "moe": MOE, "mla": MLA}


def lora(model: dict[str, object] = DENSE, rank: int = 4, **changes: Any) -> Config:
    return config(model, **{"trainer.lora.rank": rank, **changes})


def optimizer_of(trainer: TorchTrainer) -> AdapterOptimizer:
    assert isinstance(trainer.optimizer, AdapterOptimizer)
    return trainer.optimizer


def exported(trainer: TorchTrainer) -> dict[str, ExportedTensor]:
    return {tensor.name: tensor for tensor in trainer.export()}


def randomized(trainer: TorchTrainer) -> TorchTrainer:
    """With a B that is not 0."""
    generator = torch.Generator().manual_seed(7)
    for name, row in optimizer_of(trainer).adapters.items():
        if name.endswith("lora_B"):
            row.copy_(torch.randn(row.shape, generator=generator) * 0.05)
    trainer._write_weights()
    return trainer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", ["bf16", "int4", "mxfp4", "fp8"])
def test_at_the_start_it_is_the_base_bit_for_bit(model: str, format: str) -> None:
    whole = TorchTrainer(config(MODELS[model], format=format))
    adapted = TorchTrainer(lora(MODELS[model], format=format))
    for name, param in whole.optimizer.params.items():
        assert same_bits(adapted.optimizer.params[name], param), name
    ours, theirs = exported(adapted), exported(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert all(same_bits(ours[name].parts[part], value) for part, value in tensor.parts.items()), name


def test_adding_nothing_keeps_the_sign_of_zero() -> None:
    optimizer = optimizer_of(TorchTrainer(lora(format="bf16")))
    name = optimizer.targets[0]
    optimizer._base[name].fill_(-0.0)
    assert same_bits(optimizer.merged(name).to(torch.bfloat16), optimizer._base[name])


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_that_autograd_finds_through_the_sum(model: str) -> None:
    """The reference differentiates base + alpha / rank * B A by itself, in one graph with the model."""
    cfg = lora(MODELS[model], format="bf16", **{"precision.base_dtype": "float32", "trainer.lora.alpha": 10})
    trainer = randomized(TorchTrainer(cfg))
    optimizer, (sample, *_) = optimizer_of(trainer), batch(cfg).samples
    optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]  # keep the gradients to look at
    trainer.sft_step([(sample.tokens, sample.prompt_length)], lr=1.0)
    leaves = {name: row.clone().requires_grad_() for name, row in optimizer.adapters.items()}
    weights = {}
    for name in optimizer.targets:
        product = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        weights[name] = optimizer._base[name] + 10 / 4 * product
    logits = functional_call(trainer.model, weights, kwargs={"input_ids": sample.tokens.unsqueeze(0)}).logits[0].float()
    start = sample.prompt_length - 1
    logprobs = torch.log_softmax(logits, -1)[start:-1].gather(1, sample.response_tokens.unsqueeze(1))
    (-logprobs.mean()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(optimizer._inner.grads[name], leaf.grad, rtol=2e-4, atol=1e-6)
    assert optimizer.gradient.norm() > 0


@pytest.mark.parametrize("model", MODELS)
def test_both_placements_of_quantization_train_the_same(model: str) -> None:
    results = []
    for placement in (QatPlacement.in_place, QatPlacement.forward):
        cfg = lora(MODELS[model], format="int4", **{"precision.qat_placement": placement})
        trainer = TorchTrainer(cfg)
        history = [trainer.step(batch(cfg, seed=seed)).metrics for seed in range(3)]
        results.append((history, {name: row.clone() for name, row in optimizer_of(trainer).adapters.items()}))
    assert results[0][0] == results[1][0]
    assert all(same_bits(row, results[1][1][name]) for name, row in results[0][1].items())


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_the_base_stays_and_the_engine_gets_what_is_trained_with(format: str) -> None:
    cfg = lora(MOE, format=format, **{"trainer.lora.targets": [Role.attention, Role.routed_expert]})
    trainer = TorchTrainer(cfg)
    optimizer = optimizer_of(trainer)
    base = {name: weight.clone() for name, weight in optimizer.frozen()}
    buffers = {name: buffer.clone() for name, buffer in trainer._buffers.items()}
    for seed in range(3):
        trainer.step(batch(cfg, seed=seed))
    assert all(same_bits(weight, base[name]) for name, weight in optimizer.frozen())
    assert all(same_bits(buffer, buffers[name]) for name, buffer in trainer._buffers.items())
    moved = {
        name for name, param in optimizer.params.items() if not torch.equal(optimizer.masters[name].float(), base[name].float())
    }
    assert (
        moved == set(optimizer.targets) and any("experts" in name for name in moved) and any("q_proj" in name for name in moved)
    )
    sent = exported(trainer)
    for name, pieces in trainer._rollout_layout.pieces.items():
        for piece in pieces if name in optimizer.params else ():
            weight = decode(sent[piece.name], trainer._rollout_layout.formats[name])
            assert torch.equal(weight.to(torch.bfloat16), piece.of(optimizer.params[name]).detach()), name


def test_a_quantized_weight_without_adapter_stays_quantized_once(tmp_path: Path) -> None:
    cfg = lora(MOE, format="int4", **{"trainer.lora.targets": [Role.attention]})
    trainer, whole = TorchTrainer(cfg), TorchTrainer(config(MOE, format="int4"))
    trainer.step(batch(cfg))
    name = next(name for name in trainer._train_layout.quantized)
    assert name not in optimizer_of(trainer).targets
    assert same_bits(trainer.optimizer.params[name], whole.optimizer.params[name])
    assert same_bits(trainer.unquantized_weights()[name], whole.unquantized_weights()[name])


# ---- checkpoints


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_resume_is_bit_exact_and_holds_adapters_alone(tmp_path: Path, format: str) -> None:
    cfg = lora(MOE, format=format, **{"algorithm.kl_coef": 0.1})
    straight, stopped = TorchTrainer(cfg), TorchTrainer(cfg)
    for seed in range(2):
        assert straight.step(batch(cfg, seed=seed)).metrics == stopped.step(batch(cfg, seed=seed)).metrics
    stopped.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    for file in ("masters", "reference"):
        held = load_file(tmp_path / f"{file}.safetensors")
        assert held and all(name.endswith((".lora_A", ".lora_B")) for name in held)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 4 * 4 * 1.3 * straight.optimizer.gradient.numel()
    resumed = TorchTrainer(cfg)
    resumed.load(tmp_path)
    for seed in range(2, 4):
        assert straight.step(batch(cfg, seed=seed)).metrics == resumed.step(batch(cfg, seed=seed)).metrics
    for name, param in straight.optimizer.params.items():
        assert same_bits(param, resumed.optimizer.params[name]), name


def test_adapters_of_another_base_rank_or_kind_are_refused(tmp_path: Path) -> None:
    cfg = lora()
    TorchTrainer(cfg).save(tmp_path)
    for changed, key, problem in (
        (lora(seed=4), "model.hf_checkpoint", "trained beside other weights"),
        (lora(rank=8), "trainer.lora.rank", "have rank 4"),
        (lora(**{"trainer.lora.alpha": 8}), "trainer.lora.rank", "have alpha 32"),
        (lora(**{"trainer.lora.targets": [Role.attention]}), "trainer.lora.rank", "have targets"),
        (config(DENSE), "trainer.lora.rank", "the adapters of"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            TorchTrainer(changed).load(tmp_path)
        assert caught.value.key == key and caught.value.fix
    (tmp_path / "whole").mkdir()
    TorchTrainer(config(DENSE)).save(tmp_path / "whole")
    with pytest.raises(UserError, match="without adapters"):
        TorchTrainer(cfg).load(tmp_path / "whole")


def test_the_reference_policy_is_the_adapters_as_they_were() -> None:
    cfg = lora(MOE, format="int4", **{"algorithm.kl_coef": 0.1})
    trainer = TorchTrainer(cfg)
    before = trainer.reference_logprobs(batch(cfg))
    weights = {name: param.clone() for name, param in trainer.optimizer.params.items()}
    trainer.step(batch(cfg))
    after = trainer.reference_logprobs(batch(cfg))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(weights[name], param) for name, param in trainer.optimizer.params.items())
    trainer.reset_optimizer()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.reference_logprobs(batch(cfg)), strict=True))


def test_supervised_steps_learn() -> None:
    cfg = lora(rank=8)
    trainer, samples = TorchTrainer(cfg), batch(cfg).samples
    pairs = [(sample.tokens, sample.prompt_length) for sample in samples]
    losses = [trainer.sft_step(pairs, lr=1e-2)["sft/loss"] for _ in range(25)]
    assert losses[-1] < losses[0] - 1.0, losses


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_rewards_teach_adapters_through_the_engine(format: str) -> None:
    """On-policy RL: the engine samples with the merged weights, half of the vocabulary is rewarded; the base stays."""
    changes = {
        "trainer.optimizer.lr_schedule": "constant",
        "trainer.max_tokens_per_gpu": 4096,
        "algorithm.normalize_by_std": True,
    }
    cfg = lora(DENSE | {"initializer_range": 0.5}, rank=8, format=format, **changes)
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    base = {name: weight.clone() for name, weight in optimizer_of(trainer).frozen()}
    sampling, means = SamplingParams(1.0, 8), []
    for step in range(10):
        assert pool.update_weights(step, trainer.export()).problems == []
        asked = [
            Request(prompt, index, (40 + number, 50), sampling, request_seed(0, step, prompt, index))
            for number, prompt in enumerate(("a", "b", "c", "d"))
            for index in range(16)
        ]
        samples = sorted(pool.generate(asked), key=lambda sample: (sample.prompt_id, sample.sample_index))
        rewards = torch.tensor([float((sample.response_tokens < 136).float().mean()) for sample in samples])
        means.append(float(rewards.mean()))
        groups = rewards.view(4, 16)
        scores = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
        advantages = [torch.full((sample.response_length,), float(score)) for sample, score in zip(samples, scores, strict=True)]
        trainer.step(Batch(samples, advantages, temperature=1.0))
    assert means[0] < 0.75 and min(means[-3:]) > 0.95, means
    assert all(same_bits(weight, base[name]) for name, weight in optimizer_of(trainer).frozen())


# ---- what is planned and refused


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("roles", [None, [Role.attention]])
def test_the_plan_counts_what_there_is(model: str, roles: list[Role] | None) -> None:
    cfg = lora(MODELS[model], format="int4", **{"trainer.lora.targets": roles, "algorithm.kl_coef": 0.1})
    trainer, inventory = TorchTrainer(cfg), take_inventory(cfg)
    optimizer = optimizer_of(trainer)
    adapters = optimizer.gradient.numel()
    assert adapter_elements(cfg, inventory) == adapters
    assert base_elements(cfg, inventory) == sum(weight.numel() for weight in optimizer._base.values())
    (run,) = plan_memory(cfg, inventory).phases
    assert run.items["gradients"] == run.items["fp32 masters"] == run.items["reference weights"] == 4 * adapters
    assert run.items["Adam moments"] == 8 * adapters
    (whole,) = plan_memory(config(MODELS[model], format="int4", **{"algorithm.kl_coef": 0.1}), inventory).phases
    assert whole.items["Adam moments"] > 5 * run.items["Adam moments"] and "frozen base" not in whole.items


def refused(*overrides: str) -> dict[str, str]:
    return {str(error.key): error.problem for error in problems(*overrides)}


def test_what_it_refuses() -> None:
    on = "trainer.lora.rank=4"
    assert "no LoRA" in refused("trainer=megatron", on)["trainer.lora.rank"]
    assert "no LoRA" in refused("rollout=sglang", on)["trainer.lora.rank"]
    assert "embedding have no adapters" in refused(on, "trainer.lora.targets=[attention,embedding]")["trainer.lora.targets"]
    assert "no such matrix" in refused(on, "model=tiny_dense", "trainer.lora.targets=[routed_expert]")["trainer.lora.targets"]
    assert "fp32 masters" in refused(on, "trainer.master_weights=false")["trainer.master_weights"]
    assert "MTP" in refused(on, "model=tiny_mtp", "speculative=mtp")["speculative.online_training"]
    assert rules.check(lora()) == []


def test_without_a_rank_a_checkpoint_says_nothing_of_adapters(tmp_path: Path) -> None:
    TorchTrainer(config()).save(tmp_path)
    assert "lora" not in json.loads((tmp_path / "trainer.json").read_text())


# ---- export


def saved(cfg: Config, folder: Path) -> TorchTrainer:
    trainer = randomized(TorchTrainer(cfg))
    trainer.step(batch(cfg))
    folder.mkdir()
    trainer.save(folder)
    return trainer


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_the_exported_folder_holds_the_merged_weights(tmp_path: Path, format: str) -> None:
    cfg = lora(MOE, format=format)
    trainer = saved(cfg, tmp_path / "checkpoint")
    export.write(cfg, export.plan_of(cfg, None), export._weights(cfg, tmp_path / "checkpoint"), tmp_path / "out")
    written = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    streamed = {name: part for tensor in trainer.export() for name, part in tensor.parts.items()}
    assert written.keys() == streamed.keys()
    assert all(same_bits(written[name], part.contiguous()) for name, part in streamed.items())


def test_adapters_are_written_as_peft_has_them(tmp_path: Path) -> None:
    """Module by module, from the folder alone: x W^T + alpha / r x A^T B^T is what the merged weight gives."""
    cfg = lora(format="bf16")
    trainer = saved(cfg, tmp_path / "checkpoint")
    count, _ = TorchTrainer.write_adapters(cfg, tmp_path / "checkpoint", tmp_path / "out")
    config, tensors = (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text()),
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
    )
    assert count == len(config["target_modules"]) == 14 and len(tensors) == 28
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        base = optimizer_of(trainer)._base[f"{module}.weight"].float()
        merged = (base + config["lora_alpha"] / config["r"] * b @ a).to(torch.bfloat16)
        torch.testing.assert_close(trainer.model.get_submodule(module).weight, merged, rtol=1e-2, atol=1e-6)


def test_peft_itself_loads_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="not a dependency")
    cfg = lora(format="bf16", **{"precision.base_dtype": "float32"})
    trainer, whole = (
        saved(cfg, tmp_path / "checkpoint"),
        TorchTrainer(config(DENSE, format="bf16", **{"precision.base_dtype": "float32"})),
    )
    TorchTrainer.write_adapters(cfg, tmp_path / "checkpoint", tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(whole.model, tmp_path / "out").eval()
    tokens = batch(cfg).samples[0].tokens.unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_has_no_place_in_peft_is_refused(tmp_path: Path) -> None:
    saved(lora(MOE), tmp_path / "experts")
    with pytest.raises(UserError, match="stacked experts"):
        TorchTrainer.write_adapters(lora(MOE), tmp_path / "experts", tmp_path / "out")
    (tmp_path / "whole").mkdir()
    TorchTrainer(config(DENSE)).save(tmp_path / "whole")
    with pytest.raises(UserError, match="has no adapters"):
        TorchTrainer.write_adapters(config(), tmp_path / "whole", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read"):
        TorchTrainer.write_adapters(config(), tmp_path / "nothing", tmp_path / "out")
