"""What every rollout pool promises: one suite, run against the in-process engine and against SGLang servers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import by_key, exported, flipped, reference_logprobs, requests
from reference import reference_routes, rows_before_a_tie

from runner.data import Status
from runner.errors import UserError


def test_greedy_tokens_equal_transformers_generate(running: Any) -> None:
    built = running.fresh()
    wanted = requests(6, temperature=0.0)
    samples = by_key(list(running.pool.generate(wanted)))
    for sample in samples.values():
        ((engine, begin, end),) = sample.served
        assert engine.startswith("engine") and begin < end
    for request in wanted:
        prompt = torch.tensor([request.tokens])
        reference = built.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert samples[request.prompt_id, 0].tokens.tolist() == reference[0].tolist()


@pytest.mark.promise("logprobs come after the temperature")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_routes_equal_transformers(running: Any, temperature: float) -> None:
    built = running.fresh()
    samples = list(running.pool.generate(requests(40, same_prompt=5, temperature=temperature, stop_token_ids=(9, 40, 41))))
    assert len(by_key(samples)) == 40
    compared = 0
    for sample in samples:
        expected = reference_logprobs(built, sample, temperature)
        assert sample.rollout_logprobs.dtype == torch.float32 and sample.tokens.dtype == torch.int64
        assert sample.routes is not None and sample.routes.dtype == torch.uint8
        theirs = reference_routes(built, sample.tokens)
        rows = rows_before_a_tie(built, sample.tokens)
        compared += rows
        tokens = max(rows - sample.prompt_length + 1, 0)
        torch.testing.assert_close(sample.rollout_logprobs[:tokens], expected[:tokens], atol=1e-4, rtol=0)
        assert torch.equal(sample.routes[:rows].long().sort(-1).values, theirs[:rows].sort(-1).values)
    assert compared > 0.98 * sum(len(sample.tokens) - 1 for sample in samples)


def test_score_equals_transformers(running: Any) -> None:
    built = running.fresh()
    sequences = [torch.randint(2, 272, (length,), generator=torch.Generator().manual_seed(length)) for length in (2, 23, 256)]
    for tokens, scored in zip(sequences, running.pool.score(sequences), strict=True):
        with torch.no_grad():
            expected = built(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)


def test_a_samples_tokens_depend_on_its_seed_and_not_on_its_batch(running: Any) -> None:
    """Neither on how many are in it, nor on what they sample with: a health check is greedy, an evaluation is."""
    running.fresh()
    wanted = requests(24, same_prompt=3)
    others = [
        dataclasses.replace(request, prompt_id=f"{name}-{request.prompt_id}")
        for name, params in (("greedy", {"temperature": 0.0}), ("nucleus", {"top_p": 0.7}), ("top", {"top_k": 3}))
        for request in requests(4, **params)
    ]
    mixed = [request for pair in zip(wanted, others, strict=False) for request in pair] + wanted[len(others) :]
    together = by_key(list(running.pool.generate(wanted)))
    between = by_key(list(running.pool.generate(mixed)))
    for request in wanted:
        key = (request.prompt_id, request.sample_index)
        assert torch.equal(between[key].tokens, together[key].tokens)
    alone = by_key([sample for request in wanted[:6] for sample in running.pool.generate([request])])
    for key, sample in alone.items():
        assert torch.equal(sample.tokens, together[key].tokens)
    assert len({tuple(sample.response_tokens.tolist()) for sample in together.values()}) == 24


def test_status_and_limits(running: Any) -> None:
    running.fresh(version=3)
    wanted = requests(20, max_response_tokens=9, stop_token_ids=tuple(range(0, 272, 7)))
    samples = list(running.pool.generate(wanted))
    assert {sample.status for sample in samples} == {Status.completed, Status.truncated}
    for sample in samples:
        assert (sample.response_tokens[:-1] % 7 != 0).all()
        assert len(sample.loss_mask) == len(sample.rollout_logprobs) == sample.response_length
        if sample.status is Status.completed:
            assert sample.response_tokens[-1] % 7 == 0 and sample.finish_reason == "stop"
        else:
            assert sample.response_length == 9 and sample.finish_reason == "length"
        assert [(s.version, s.start, s.stop) for s in sample.weight_spans] == [(3, 0, sample.response_length)]
    long = dataclasses.replace(requests(1, max_response_tokens=64)[0], tokens=(5,) * 250)
    assert next(iter(running.pool.generate([long]))).response_length == 256 - 250  # the context ends first
    with pytest.raises(UserError, match="256"):
        list(running.pool.generate([dataclasses.replace(long, tokens=(5,) * 256)]))


@pytest.mark.promise("concurrency is bounded, requests are pulled as room appears, a run can be abandoned")
def test_requests_are_pulled_lazily_and_a_run_can_be_abandoned(running: Any) -> None:
    running.fresh()
    wanted = requests(60)
    pulled = []

    def source() -> Any:
        for request in wanted:
            pulled.append(request)
            yield request

    run = running.pool.generate(source())
    first = next(run)
    assert len(pulled) <= 17  # max_concurrency, and one for the sample that came
    run.close()
    again = by_key(list(running.pool.generate(wanted[:20])))
    assert torch.equal(again[first.prompt_id, first.sample_index].tokens, first.tokens)


@pytest.mark.promise("without a flush, answers mix old and new weights")
def test_an_update_is_seen_by_cached_prompts(running: Any) -> None:
    """The same prompts before and after: a prefix cached under old weights must not be met again."""
    running.fresh()
    wanted = requests(8, temperature=0.0)
    before = by_key(list(running.pool.generate(wanted)))
    other, items = exported(running.cfg, seed=2)
    running.sync(items, 1)
    after = by_key(list(running.pool.generate(wanted)))
    assert running.pool.version == 1
    assert any(not torch.equal(before[key].tokens, after[key].tokens) for key in before)
    for sample in after.values():
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(other, sample), atol=1e-4, rtol=0)
        assert sample.weight_spans[0].version == 1


@pytest.mark.promise("partial rollouts: kept prefix, spans per token and per row of routes")
def test_new_weights_in_the_middle_of_a_run_start_a_new_span(running: Any) -> None:
    """Tokens keep the version that they were sampled from; those after the update are the new model's, over its own cache."""
    built = running.fresh()
    other, items = exported(running.cfg, seed=2)
    short, long = requests(1, max_response_tokens=4), requests(4, max_response_tokens=200)
    run = running.pool.generate([*short, *[dataclasses.replace(r, prompt_id=f"long{i}") for i, r in enumerate(long)]])
    next(run)
    running.sync(items, 1)
    continued = list(run)
    assert len(by_key(continued)) == 4
    for sample in continued:
        old, new = sample.weight_spans
        assert (old.version, old.start, new.version, new.stop) == (0, 0, 1, sample.response_length) and old.stop == new.start
        before = reference_logprobs(built, sample)[: old.stop]
        torch.testing.assert_close(sample.rollout_logprobs[: old.stop], before, atol=1e-4, rtol=0)
        after = reference_logprobs(other, sample)[new.start :]
        torch.testing.assert_close(sample.rollout_logprobs[new.start :], after, atol=1e-4, rtol=0)
        kept = sample.prompt_length + old.stop - 1  # rows of tokens after which something was predicted under old weights
        assert torch.equal(
            sample.routes[:kept].long().sort(-1).values, reference_routes(built, sample.tokens)[:kept].sort(-1).values
        )
        later = reference_routes(other, sample.tokens)[kept:].sort(-1).values
        assert torch.equal(sample.routes[kept:].long().sort(-1).values, later)


@pytest.mark.promise("an expert that is not sent again keeps repacked bits")
def test_what_is_wrong_with_a_sync_is_named_and_changes_no_version(running: Any) -> None:
    running.fresh(version=4)
    items = running.items
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    index = next(i for i, item in enumerate(items) if item.name == name)
    missing = [item for item in items if item.name != name]
    strange = dataclasses.replace(items[index], name="model.layers.9.mlp.experts.5.up_proj.weight")
    for stream, problem in (
        (missing, f"{name}: did not arrive"),
        ([*items, items[index]], f"{name}: arrived twice"),
        ([*items, strange], f"{strange.name}: the precision plan has no such tensor"),
        ([*missing, dataclasses.replace(items[index], format="fp8")], f"{name}: arrived as fp8"),
    ):
        report = running.pool.update_weights(5, iter(stream))
        assert report.problems and problem in report.problems[0], report.problems
        assert running.pool.version == 4
    running.fresh(version=5)
    assert running.pool.version == 5
    assert len(list(running.pool.generate(requests(2)))) == 2


def test_a_bit_that_flips_on_the_way_is_named(running: Any) -> None:
    from runner.weights.stream import seal

    running.fresh()
    sealed = list(seal(iter(running.items)))
    victim = 40
    item = sealed[victim].exported
    part = next(iter(item.parts))
    sealed[victim] = dataclasses.replace(sealed[victim], exported=flipped(item, part))
    report = running.pool.update_weights(1, iter(sealed))
    assert len(report.problems) == 1 and report.problems[0].startswith(f"{part}: bytes differ")
    running.fresh()


def test_description_and_metrics(running: Any) -> None:
    running.fresh()
    running.pool.metrics()
    samples = list(running.pool.generate(requests(5)))
    metrics = running.pool.metrics()
    assert metrics["perf/rollout_tokens"] == sum(sample.response_length for sample in samples)
    assert metrics["perf/rollout_tokens_per_second"] > 0
    description = running.pool.describe()[0]
    assert set(description.formats) == {item.name for item in running.items}
    assert set(description.formats.values()) == {"bf16"}
