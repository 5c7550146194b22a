"""model=auto on every published config.json that is known here."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config import compose
from runner.models import family_of
from tests import twins


@pytest.mark.parametrize("name", sorted(twins.PUBLISHED))
def test_every_published_config_json_composes(tmp_path: Path, name: str) -> None:
    """With its own numbers, R3 where it has routers, and groups that divide its matrices."""
    cfg = compose.load(["model=auto", twins.config_alone(tmp_path / "some-model", name), "precision=int4_qat"]).config
    model, published = cfg.model, twins.PUBLISHED[name]
    assert (model.num_layers, model.hidden_size) == (published["num_hidden_layers"], published["hidden_size"])
    assert model.max_context_tokens == published["max_position_embeddings"] and model.name == "some-model"
    assert cfg.router_replay.trainer == cfg.router_replay.rollout == bool(model.num_experts)
    assert not cfg.warm_start.enabled and cfg.precision.group_size == model.int4_group_size
    read = family_of(model).from_hf_config(published, "some-model")
    assert read == {field: getattr(model, field) for field in read}
