"""Online training of MTP layers in the torch trainer: what the loss is, that it falls, and that the policy never notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from runner.config.schema import Config, QatPlacement
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import batch, config, model

ONLINE: dict[str, object] = {"speculative.online_training": True, "speculative.mtp_loss_coef": 0.2}
FP32: dict[str, object] = {"precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward, "format": "bf16"}


def mtp_config(layers: int = 1, **changes: object) -> Config:
    return config(model("tiny_mtp", num_mtp_layers=layers), **changes)


def weights(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    return {name: part.clone() for tensor in trainer.export("bf16") for name, part in tensor.parts.items()}


def test_the_policy_gets_the_same_bits_with_and_without() -> None:
    """Three updates, clipped: metrics, logprobs and weights. Only the MTP layers differ: trained, or untouched."""
    plain, online = TorchTrainer(mtp_config()), TorchTrainer(mtp_config(**ONLINE))
    start = weights(plain)
    for seed in range(3):
        ours, theirs = online.step(batch(online.cfg, seed=seed)).metrics, plain.step(batch(plain.cfg, seed=seed)).metrics
        assert ours.pop("train/mtp_loss") > 0 and ours.pop("train/mtp_grad_norm") > 0
        assert ours == theirs
    data = batch(plain.cfg, seed=9)
    assert torch.equal(torch.cat(online.logprobs(data)), torch.cat(plain.logprobs(data)))
    trained, untouched = weights(online), weights(plain)
    for name, tensor in untouched.items():
        if ".mtp_layers." in name:
            assert torch.equal(tensor, start[name]) and not torch.equal(tensor, trained[name]), name
        else:
            assert torch.equal(tensor, trained[name]) and (tensor.dim() < 2 or not torch.equal(tensor, start[name])), name


def test_the_loss_is_the_cross_entropy_of_the_token_after_next() -> None:
    """Sample by sample, without padding, written out; two layers, the second fed with the first one's states."""
    trainer = TorchTrainer(mtp_config(layers=2, **FP32, **ONLINE))
    base, head = trainer.model.base_model, trainer.model.get_output_embeddings()
    data = batch(trainer.cfg)
    losses = []
    with torch.no_grad():
        for sample in data.samples:
            tokens = sample.tokens.unsqueeze(0)
            states = base(input_ids=tokens, use_cache=False).last_hidden_state
            for depth, layer in enumerate(base.mtp_layers):
                seen = tokens.shape[1] - 1 - depth
                rotary = base.rotary_emb(states, torch.arange(seen).unsqueeze(0))
                states = layer(states[:, :seen], base.embed_tokens(tokens[:, 1 + depth :]), rotary)
                logprobs = head(states[0, :-1]).log_softmax(-1)
                for place in range(seen - 1):
                    target = place + 2 + depth
                    if target >= sample.prompt_length and sample.loss_mask[target - sample.prompt_length]:
                        losses.append(-float(logprobs[place, tokens[0, target]]))
    found = trainer.step(data).metrics["train/mtp_loss"]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1000, 30])
def test_gradients_are_those_of_the_mean_and_reach_the_layers_alone(micro_batch_tokens: int) -> None:
    """Against autograd through the same loss, for one micro-batch and for many."""
    trainer = TorchTrainer(mtp_config(**FP32, **ONLINE, **{"trainer.max_tokens_per_gpu": micro_batch_tokens}))
    base, head = trainer.model.base_model, trainer.model.get_output_embeddings()
    data = batch(trainer.cfg)
    (layer,) = base.mtp_layers
    total, count = torch.zeros(()), 0
    for sample in data.samples:
        tokens = sample.tokens.unsqueeze(0)
        with torch.no_grad():
            states = base(input_ids=tokens, use_cache=False).last_hidden_state
            following, rotary = base.embed_tokens(tokens[:, 1:]), base.rotary_emb(states, torch.arange(tokens.shape[1] - 1)[None])
        logits = F.linear(layer(states[:, :-1], following, rotary)[0], head.weight.detach())
        wanted = sample.prompt_length + sample.loss_mask.nonzero().squeeze(1)
        wanted = wanted[wanted >= 2]
        total = total + F.cross_entropy(logits[wanted - 2], tokens[0, wanted], reduction="sum")
        count += len(wanted)
    named = dict(layer.named_parameters())
    expected = torch.autograd.grad(0.2 * total / count, list(named.values()))
    seen: dict[str, torch.Tensor] = {}
    trainer.mtp.update = lambda lr: seen.update({k: v.clone() for k, v in trainer.mtp.optimizer.grads.items()})
    trainer.step(data)
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(seen[f"0.{name}"], gradient, rtol=1e-4, atol=1e-7)


def test_the_loss_falls_also_in_supervised_steps() -> None:
    trainer = TorchTrainer(mtp_config(**ONLINE))
    data = batch(trainer.cfg)
    pairs = [(sample.tokens, sample.prompt_length) for sample in data.samples]
    supervised = [trainer.sft_step(pairs, lr=3e-3)["sft/mtp_loss"] for _ in range(10)]
    trainer.reset_optimizer()
    losses = [trainer.step(batch(trainer.cfg)).metrics["train/mtp_loss"] for _ in range(10)]
    assert supervised[-1] < 0.9 * supervised[0] and losses[-1] < 0.8 * losses[0], (supervised, losses)


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    trainer = TorchTrainer(mtp_config(**ONLINE))
    for seed in range(2):
        trainer.step(batch(trainer.cfg, seed=seed))
    trainer.save(tmp_path)
    expected = [trainer.step(batch(trainer.cfg, seed=seed)).metrics for seed in (2, 3)]
    resumed = TorchTrainer(mtp_config(**ONLINE))
    resumed.load(tmp_path)
    assert [resumed.step(batch(resumed.cfg, seed=seed)).metrics for seed in (2, 3)] == expected
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(resumed).items())


def test_training_may_begin_at_a_checkpoint_of_a_run_without_it(tmp_path: Path) -> None:
    plain = TorchTrainer(mtp_config())
    plain.step(batch(plain.cfg))
    plain.save(tmp_path)
    trainer = TorchTrainer(mtp_config(**ONLINE, seed=99))
    trainer.load(tmp_path)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(trainer).items())
    trainer.step(batch(trainer.cfg, seed=1))
    plain.step(batch(plain.cfg, seed=1))
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, weights(plain)[name])}
    assert changed and all(".mtp_layers." in name for name in changed)
