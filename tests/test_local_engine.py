"""The in-process engine against transformers on tiny random models, its random streams, and its life cycle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from reference import reference_routes

from runner.config import compose
from runner.config.schema import Config
from runner.data import ExportedTensor, Request, Sample, SamplingParams, Status
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision.codec import decode, encode
from runner.precision.plan import PrecisionPlan
from runner.rollout.local import LocalPool

FP32 = ("precision=bf16", "precision.base_dtype=float32", "speculative=none", "rollout.device=cpu")
MODELS = ("tiny_moe", "tiny_dense", "tiny_mla")


def config(*overrides: str) -> Config:
    return compose.load_config(["rollout.max_concurrency=16", *overrides])


def exported(cfg: Config, seed: int = 1, spread: float = 3.0) -> tuple[torch.nn.Module, list[ExportedTensor]]:
    """A random model (weights spread wider than a fresh start, so that logits are peaked) and its export."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    built = build_model(cfg.model, dtype=getattr(torch, cfg.precision.base_dtype), seed=seed)
    with torch.no_grad():
        for name, tensor in named_weights(cfg.model, built):
            if tensor.dim() > 1:
                tensor.mul_(spread)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
    items = []
    for name, tensor in disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, built)):
        tensor_format = plan.format_of(name)
        if tensor_format.quantized:
            item = encode(name, tensor.to(torch.bfloat16), tensor_format)
            tensor.detach().copy_(decode(item, tensor_format))  # the reference computes with the effective weights
            items.append(item)
        else:
            items.append(ExportedTensor(name, "bf16", {name: tensor.detach()}))
    return built, items


def make_pool(cfg: Config) -> tuple[LocalPool, torch.nn.Module]:
    pool = LocalPool(cfg)
    built, items = exported(cfg)
    assert pool.update_weights(0, iter(items)).problems == []
    return pool, built


def requests(count: int, *, vocab: int = 272, same_prompt: int = 1, **sampling: Any) -> list[Request]:
    """`count` requests; each prompt is used `same_prompt` times; prompt lengths differ."""
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(2, vocab, (5 + 3 * (i % 4),), generator=generator).tolist()) for i in range(count)]
    params = SamplingParams(**({"temperature": 1.0, "max_response_tokens": 12} | sampling))
    return [
        Request(f"p{i // same_prompt}", i % same_prompt, prompts[i // same_prompt], params, seed=77 * i + 3, capture_routes=True)
        for i in range(count)
    ]


def by_key(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    found = {(sample.prompt_id, sample.sample_index): sample for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.mark.parametrize("model", [*MODELS, "tiny_mtp"])
def test_greedy_tokens_equal_transformers_generate(model: str) -> None:
    pool, built = make_pool(config(f"model={model}", *FP32))
    wanted = requests(6, temperature=0.0)
    samples = by_key(list(pool.generate(wanted)))
    for request in wanted:
        prompt = torch.tensor([request.tokens])
        reference = built.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert samples[request.prompt_id, 0].tokens.tolist() == reference[0].tolist()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("speculative", ["none", "ngram"])
def test_logprobs_and_routes_equal_transformers(model: str, speculative: str) -> None:
    cfg = config(f"model={model}", *FP32[:2], f"speculative={speculative}", "speculative.ngram_min=1")
    cfg.speculative.auto_disable = False
    pool, built = make_pool(cfg)
    samples = list(pool.generate(requests(40, same_prompt=5, temperature=0.7, stop_token_ids=(9, 40, 41))))
    assert len(samples) == 40
    for sample in samples:
        with torch.no_grad():
            logits = built(sample.tokens[None]).logits[0].float()
        for logprobs, temperature in ((sample.rollout_logprobs, 0.7), (sample.raw_logprobs, 1.0)):
            expected = (logits / temperature).log_softmax(-1)[sample.prompt_length - 1 : -1]
            expected = expected.gather(-1, sample.response_tokens[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        if sample.routes is None:
            assert model == "tiny_dense"
        else:
            assert sample.routes.dtype == torch.uint8
            ours, theirs = sample.routes.long(), reference_routes(built, sample.tokens)
            assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("model", MODELS)
def test_score_equals_transformers_in_chunks_too(model: str) -> None:
    cfg = config(f"model={model}", *FP32)
    cfg.rollout.prefill_chunk_tokens = 7  # type: ignore[attr-defined]
    pool, built = make_pool(cfg)
    tokens = torch.randint(2, 272, (23,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = built(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(pool.score([tokens])[0], expected, atol=1e-4, rtol=0)
    greedy = by_key(list(pool.generate(requests(5, temperature=0.0))))  # chunked prefill of several rows
    cfg.rollout.prefill_chunk_tokens = 8192  # type: ignore[attr-defined]
    whole = by_key(list(make_pool(cfg)[0].generate(requests(5, temperature=0.0))))
    for key in whole:
        assert torch.equal(greedy[key].tokens, whole[key].tokens)
        if whole[key].routes is not None:
            assert torch.equal(greedy[key].routes, whole[key].routes)


@pytest.mark.parametrize("speculative", ["none", "ngram"])
def test_a_samples_tokens_do_not_depend_on_its_batch(speculative: str) -> None:
    cfg = config("model=tiny_moe", *FP32[:2], f"speculative={speculative}", "speculative.ngram_min=1")
    pool, _ = make_pool(cfg)
    wanted = requests(30, same_prompt=3)
    together = by_key(list(pool.generate(wanted)))
    reversed_order = by_key(list(pool.generate(wanted[::-1])))
    alone = by_key([sample for request in wanted[:8] for sample in pool.generate([request])])
    for key, sample in together.items():
        assert torch.equal(sample.tokens, reversed_order[key].tokens)
    for key, sample in alone.items():
        assert torch.equal(sample.tokens, together[key].tokens)
    tokens = {tuple(sample.response_tokens.tolist()) for sample in together.values()}
    assert len(tokens) == 30  # seeds differ, so samples of one prompt differ


def test_status_limits_and_order() -> None:
    pool, _ = make_pool(config("model=tiny_dense", *FP32))
    wanted = requests(20, max_response_tokens=9, stop_token_ids=tuple(range(0, 272, 7)))
    samples = list(pool.generate(wanted))
    served = [piece for sample in samples for piece in sample.served]
    assert len(served) == 20 and all(name == "engine 0" and begin < end for name, begin, end in served)
    late = sorted(begin for _, begin, _ in served)[16:]  # admitted when others had left their slots
    assert min(late) >= min(end for _, _, end in served)
    assert {sample.status for sample in samples} == {Status.completed, Status.truncated}
    for sample in samples:
        inner = sample.response_tokens[:-1] % 7
        assert (inner != 0).all() and len(sample.loss_mask) == len(sample.rollout_logprobs) == sample.response_length
        if sample.status is Status.completed:
            assert sample.response_tokens[-1] % 7 == 0 and sample.finish_reason == "stop"
        else:
            assert sample.response_length == 9 and sample.finish_reason == "length"
        assert [(s.version, s.start, s.stop) for s in sample.weight_spans] == [(0, 0, sample.response_length)]
    long = dataclasses.replace(wanted[0], tokens=(5,) * 250, sampling=SamplingParams(1.0, 64))
    assert next(iter(pool.generate([long]))).response_length == 256 - 250  # the context ends first
    with pytest.raises(UserError, match="256"):
        list(pool.generate([dataclasses.replace(long, tokens=(5,) * 256)]))


def test_requests_are_pulled_lazily_and_a_run_can_be_abandoned() -> None:
    pool, _ = make_pool(config("model=tiny_dense", *FP32, "rollout.max_concurrency=4"))
    wanted = requests(20)
    pulled = []

    def source():
        for request in wanted:
            pulled.append(request)
            yield request

    running = pool.generate(source())
    first = next(running)
    assert len(pulled) == 4
    with pytest.raises(RuntimeError, match="generating already"):
        next(pool.generate(wanted))
    running.close()
    again = by_key(list(pool.generate(wanted)))
    assert len(again) == 20 and torch.equal(again[first.prompt_id, first.sample_index].tokens, first.tokens)


def test_kv_cache_tokens_bounds_what_runs_and_changes_nothing() -> None:
    cfg = config("model=tiny_dense", *FP32)
    whole = by_key(list(make_pool(cfg)[0].generate(requests(12))))
    cfg.rollout.kv_cache_tokens = 100  # type: ignore[attr-defined]
    pool, _ = make_pool(cfg)
    few = by_key(list(pool.generate(requests(12))))
    assert pool.engine.cache is not None and pool.engine.cache.slots * pool.engine.cache.length <= 100
    assert all(torch.equal(few[key].tokens, whole[key].tokens) for key in whole)


def test_new_weights_in_the_middle_of_a_run_start_a_new_span() -> None:
    cfg = config("model=tiny_moe", *FP32, "rollout.max_concurrency=3")
    pool, _ = make_pool(cfg)
    other, items = exported(cfg, seed=2)
    running = pool.generate(
        [dataclasses.replace(r, sampling=SamplingParams(1.0, 4 + 8 * (i > 0))) for i, r in enumerate(requests(3))]
    )
    next(running)
    assert pool.update_weights(1, iter(items)).problems == []
    for sample in running:
        old, new = sample.weight_spans
        assert (old.version, old.start, new.version, new.stop) == (0, 0, 1, sample.response_length) and old.stop == new.start == 4
        with torch.no_grad():  # tokens after the sync are the new model's, over keys and values of the new weights
            expected = other(sample.tokens[None]).logits[0].log_softmax(-1)[sample.prompt_length - 1 : -1]
        expected = expected.gather(-1, sample.response_tokens[:, None])[:, 0]
        torch.testing.assert_close(sample.rollout_logprobs[new.start :], expected[new.start :], atol=1e-4, rtol=0)
        assert sample.routes is not None and len(sample.routes) == len(sample.tokens) - 1


def test_top_k_and_top_p_keep_to_the_likely_tokens() -> None:
    pool, built = make_pool(config("model=tiny_dense", *FP32))
    for kwargs, most in (({"top_k": 3}, 3), ({"top_p": 1e-6}, 1)):
        for sample in pool.generate(requests(10, **kwargs)):
            with torch.no_grad():
                logits = built(sample.tokens[None]).logits[0][sample.prompt_length - 1 : -1]
            rank = (logits > logits.gather(-1, sample.response_tokens[:, None])).sum(-1)
            assert (rank < most).all()


def test_nothing_runs_before_the_first_sync() -> None:
    pool = LocalPool(config("model=tiny_dense", *FP32))
    with pytest.raises(UserError, match="no weights yet"):
        pool.generate(requests(1))
    with pytest.raises(UserError, match="no weights yet"):
        pool.score([torch.arange(4)])
