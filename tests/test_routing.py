"""Router replay: recorded routes are used, checked, and never repaired."""

from __future__ import annotations

import pytest
import torch

from runner.config.choices import RouterScore
from runner.data import Batch
from runner.errors import UserError
from runner.routing import routes
from runner.routing.replay import replayed_weights
from runner.routing.routes import RouteError
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import MLA, MOE, batch, config

REPLAY = {"router_replay.trainer": True, "format": "bf16"}


def _record_own(trainer: TorchTrainer, data: Batch) -> None:
    """Give every sample the routes that the trainer's own router takes, as an engine without mismatch would."""
    assert trainer._replay is not None
    for sample in data.samples:
        with trainer._replay.recording() as used, torch.no_grad():
            trainer.model.base_model(input_ids=sample.tokens.unsqueeze(0), use_cache=False)
        sample.routes = torch.stack(used, dim=1)[:-1].to(torch.uint8)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [MOE, MLA], ids=["softmax", "sigmoid"])
def test_replaying_the_own_routes_changes_nothing(model: dict[str, object]) -> None:
    trainer = TorchTrainer(cfg := config(model, **REPLAY, **{"precision.base_dtype": "float32"}))
    data = batch(cfg)
    _record_own(trainer, data)
    for own, replayed in zip(trainer.logprobs(data, routes="own"), trainer.logprobs(data), strict=True):
        torch.testing.assert_close(own, replayed, rtol=1e-5, atol=1e-6)
    assert trainer.step(data).metrics["router_replay/disagreement"] == 0


@pytest.mark.parametrize("model", [MOE, MLA], ids=["softmax", "sigmoid"])
def test_recorded_routes_are_obeyed_and_counted(model: dict[str, object]) -> None:
    trainer = TorchTrainer(cfg := config(model, **REPLAY))
    data = batch(cfg)
    _record_own(trainer, data)
    changed, total = 0, 0
    for sample in data.samples[:2]:
        assert sample.routes is not None
        sample.routes = (sample.routes + 1) % cfg.model.num_experts  # two neighbours of four: always another set
        changed += sample.routes.shape[0] * sample.routes.shape[1]
    total = sum(s.routes.shape[0] * s.routes.shape[1] for s in data.samples if s.routes is not None)
    own, replayed = trainer.logprobs(data, routes="own"), trainer.logprobs(data)
    assert not torch.equal(own[0], replayed[0]) and not torch.equal(own[1], replayed[1])
    assert torch.equal(own[2], replayed[2])
    metrics = trainer.step(data).metrics
    assert metrics["router_replay/disagreement"] == pytest.approx(changed / total)


def test_the_order_of_experts_in_a_row_is_no_disagreement() -> None:
    trainer = TorchTrainer(cfg := config(**REPLAY))
    data = batch(cfg)
    _record_own(trainer, data)
    for sample in data.samples:
        assert sample.routes is not None
        sample.routes = sample.routes.flip(2)
    assert trainer.step(data).metrics["router_replay/disagreement"] == 0


def test_an_experts_module_that_gets_other_routes_is_an_error() -> None:
    trainer = TorchTrainer(cfg := config(**REPLAY))
    data = batch(cfg)
    _record_own(trainer, data)
    router = trainer.model.get_submodule("model.layers.1.mlp.gate")
    router.register_forward_hook(lambda m, a, out: (out[0], out[1], (out[2] + 1) % 4))  # a later hook meddles
    with pytest.raises(RouteError, match="differ from the recorded"):
        trainer.step(data)


def test_the_router_gets_its_gradient_under_replay() -> None:
    trainer = TorchTrainer(cfg := config(**REPLAY))
    trainer.optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]
    trainer.step(batch(cfg, routes=True))
    assert trainer.optimizer.grads["model.layers.0.mlp.gate.weight"].abs().max() > 0


def test_replayed_weights_by_hand() -> None:
    logits, experts = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2, 0]])
    e = torch.exp(torch.tensor([1.0, 2.0, 0.0]))
    plain = replayed_weights(logits, experts, score=RouterScore.softmax, normalize=False, scaling=1.0)
    torch.testing.assert_close(plain, (e[[2, 0]] / e.sum()).unsqueeze(0))
    normal = replayed_weights(logits, experts, score=RouterScore.softmax, normalize=True, scaling=1.0)
    torch.testing.assert_close(normal, (e[[2, 0]] / e[[2, 0]].sum()).unsqueeze(0))
    s = torch.sigmoid(torch.tensor([0.0, 1.0]))
    sigmoid = replayed_weights(logits, experts, score=RouterScore.sigmoid, normalize=True, scaling=2.5)
    torch.testing.assert_close(sigmoid, (2.5 * s / s.sum()).unsqueeze(0))


@pytest.mark.parametrize("defect", ["missing", "short", "layers", "zero_layer", "zero_row", "range", "float"])
def test_defective_routes_are_errors_that_name_the_sample(defect: str) -> None:
    trainer = TorchTrainer(cfg := config(**REPLAY))
    data = batch(cfg, routes=True)
    sample = data.samples[3]
    recorded = sample.routes
    assert recorded is not None
    zero_layer, zero_row, wrong = recorded.clone(), recorded.clone(), recorded.clone()
    zero_layer[:, 1], zero_row[4, 0], wrong[2, 1, 0] = 0, 0, 77
    sample.routes = {
        "missing": None, "short": recorded[:-1], "layers": recorded[:, :1], "zero_layer": zero_layer, "zero_row": zero_row,
        "range": wrong, "float": recorded.float(),
    }[defect]  # fmt: skip
    for call in (trainer.step, trainer.logprobs):
        with pytest.raises(UserError, match="sample 3 of prompt p0"):
            call(data)


def test_routes_of_dense_first_models_are_picked_by_global_layer_id() -> None:
    full = torch.arange(2 * 4 * 1).view(2, 4, 1)
    assert routes.select_layers(full, [1, 3], 4).flatten().tolist() == [1, 3, 5, 7]
    with pytest.raises(RouteError, match="expected"):
        routes.select_layers(full[:, 1:], [1, 3], 4)


def test_padding_spreads_over_all_experts() -> None:
    rows = routes.padding_routes(torch.arange(12), 2, 8)
    assert torch.bincount(rows.flatten(), minlength=8).tolist() == [3] * 8
    assert bool((rows[:, 0] != rows[:, 1]).all())
    data = batch(config(), size=2, routes=True)
    layout, recorded = routes.replay_layout(data.samples, 12, 2, 2, 4, "cpu")
    assert layout.shape == (2, 24, 2)
    assert recorded.sum() == sum(len(sample.tokens) - 1 for sample in data.samples)
    first = data.samples[0]
    assert first.routes is not None and torch.equal(layout[1, : len(first.routes)], first.routes[:, 1].long())


def test_storage_is_compact() -> None:
    wide = torch.tensor([[[0, 255]]], dtype=torch.int32)
    assert routes.compact(wide, 256).dtype == torch.uint8
    assert routes.compact(wide, 384).dtype == torch.uint16
    with pytest.raises(RouteError):
        routes.compact(wide, 128)
    with pytest.raises(RouteError):
        routes.compact(wide - 1, 256)


def test_uint16_routes_replay() -> None:
    trainer = TorchTrainer(cfg := config(**REPLAY))
    data = batch(cfg, routes=True)
    small = trainer.logprobs(data)
    for sample in data.samples:
        assert sample.routes is not None
        sample.routes = sample.routes.to(torch.uint16)
    assert all(torch.equal(a, b) for a, b in zip(small, trainer.logprobs(data), strict=True))
