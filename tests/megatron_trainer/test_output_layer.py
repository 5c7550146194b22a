"""The output layer on CUDA without APEX's extension: Megatron's own class refuses to fuse, the context keeps it from trying."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="make setup")


def test_it_does_not_fuse_where_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_model

    from runner.trainer.megatron import model

    seen: list[bool] = []

    def layer(size: int, *, config: Any) -> None:
        seen.append(config.gradient_accumulation_fusion)

    monkeypatch.setattr(gpt_model.tensor_parallel, "ColumnParallelLinear", layer)
    config = SimpleNamespace(gradient_accumulation_fusion=True)
    for there in (None, object()):
        monkeypatch.setattr(model, "find_spec", lambda name, there=there: there)
        with model.plain_output_layer():
            gpt_model.tensor_parallel.ColumnParallelLinear(8, config=config)
    assert seen == [False, True] and config.gradient_accumulation_fusion
    assert gpt_model.tensor_parallel.ColumnParallelLinear is layer
