"""What of a batch each rank gets: its own samples, and the numbers that only the whole batch has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.trainer import policy_step
from runner.trainer.megatron import wire
from runner.trainer.megatron.shares import Division
from runner.trainer.share import alone, lessons, steps
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, megatron

ROUTED: dict[str, object] = {"format": "int4", "router_replay.trainer": True}
MTP: dict[str, object] = {"speculative.online_training": True}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.sampled_from(["single", "dp2", "cp2", "mix4"]))
def test_shares_are_a_division_and_keep_the_whole_batchs_weights(size: int, updates: int, layout: str) -> None:
    limits: dict[str, object] = {"algorithm.updates_per_rollout": updates, "trainer.max_tokens_per_gpu": 30}
    cfg = megatron_config("mtp", layout, **MTP, **limits)
    made = batch(cfg, size=size)
    (whole,), parts = steps(cfg, made, alone), steps(cfg, made, Division(cfg).divide)
    assert len(parts) == cfg.parallelism.ranks // (cfg.parallelism.tp * cfg.parallelism.cp * cfg.parallelism.pp)
    assert len(whole) == len(policy_step.split_updates(size, updates))
    for number, of_all in enumerate(whole):
        shares = [of_rank[number] for of_rank in parts]
        assert sorted(i for step in shares for i in step.share.indices) == of_all.share.indices
        assert len({len(step.share.micro_batches or ()) for step in shares}) == 1
        for step in shares:
            assert sorted(place for micro in step.share.micro_batches or () for place in micro) == list(range(len(step.batch)))
            assert (step.weights.normalizer, step.weights.tokens) == (of_all.weights.normalizer, of_all.weights.tokens)
            assert step.predictions == of_all.predictions > 0
            for place, index in enumerate(step.share.indices):
                assert step.batch.samples[place] is made.samples[index]
                assert step.batch.advantages[place] is made.advantages[index]
                row = of_all.weights.rows[of_all.share.indices.index(index)]
                assert torch.equal(step.weights.rows[place], row)


def test_supervised_shares_know_all_response_tokens() -> None:
    cfg = megatron_config("mtp", "dp2", **MTP)
    sequences = [(sample.tokens, sample.prompt_length) for sample in batch(cfg).samples]
    (whole,), parts = lessons(cfg, sequences), lessons(cfg, sequences, divide=Division(cfg).divide)
    assert len(parts) == 2 and all(0 < len(part.sequences) < len(sequences) for part in parts)
    assert {part.response_tokens for part in parts} == {sum(len(tokens) - prompt for tokens, prompt in sequences)}
    assert {part.predictions for part in parts} == {whole.predictions} and whole.predictions > 0
    for part in parts:
        assert all(part.sequences[place] is sequences[index] for place, index in enumerate(part.share.indices))


def test_ranks_of_one_data_parallel_rank_get_the_same_message() -> None:
    assert Division(megatron_config("moe", "mix4")).by_rank(["only"]) == ["only"] * 4
    assert Division(megatron_config("moe", "dp2")).by_rank([0, 1]) == [0, 1]
    wide = megatron_config("moe", "mix4", **{"parallelism.ranks": 8})
    assert Division(wide).by_rank([0, 1]) == [0, 0, 1, 1, 0, 0, 1, 1]  # tp is fastest, then dp, then pp


@pytest.mark.megatron
def test_a_rank_is_sent_its_own_samples_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and rows of every message that leaves the driver, with routes, in updates, logprobs and supervised steps."""
    cfg = megatron_config("moe", "dp2", **ROUTED, **{"algorithm.kl_coef": 0.1})
    made = batch(cfg, size=64)
    with megatron(cfg) as trainer:
        sent: dict[str, list[int]] = {}
        rows: dict[str, list[int]] = {}
        for rank, connection in enumerate(trainer.ranks._connections):
            monkeypatch.setattr(connection, "send_bytes", _counted(connection.send_bytes, rank, sent, rows))
        trainer.step(made)
        trainer.logprobs(made)
        trainer.sft_step([(sample.tokens, sample.prompt_length) for sample in made.samples], 1e-3)
    assert sent.keys() == {"reference_logprobs", "updates", "logprobs", "supervised"}
    total, whole = sum(len(sample.tokens) for sample in made.samples), len(wire.dumps(made))
    for name, tokens in rows.items():
        assert sum(tokens) == total and max(tokens) < 0.52 * total, name
        assert max(sent[name]) < 0.65 * whole, name  # updates hold the reference's logprobs and the loss's weights, too


def _counted(send: Any, rank: int, sent: dict[str, list[int]], rows: dict[str, list[int]]) -> Any:
    def counted(message: bytes) -> None:
        name, arguments = wire.loads(message)
        sent.setdefault(name, []).append(len(message))
        rows.setdefault(name, []).append(_tokens(arguments[0]))
        send(message)

    return counted


def _tokens(argument: Any) -> int:
    """Of all samples in a call's first argument: a batch, a rollout's steps, or a lesson."""
    if isinstance(argument, list):
        return sum(step.batch.num_tokens for step in argument)
    if hasattr(argument, "sequences"):
        return sum(len(tokens) for tokens, _ in argument.sequences)
    return int(argument.num_tokens)
