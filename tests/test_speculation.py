"""Speculation is lossless: the joint distribution of what comes out is the target's, and wrong rules are caught.

Goodness of fit: Pearson's chi-square of the counts of 3-token continuations against the exact joint probabilities
(transformers' own fp32 logits, enumerated), cells with an expected count under 5 pooled.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from test_local_engine import config, disk_tensors, exported, family_of, make_pool, named_weights, requests

from runner.config.schema import Config
from runner.data import ExportedTensor, Request, SamplingParams
from runner.errors import UserError
from runner.models.build import build_model, save_config
from runner.rollout.local import LocalPool, engine
from runner.rollout.local import verify as rules
from runner.rollout.local.attention import ATTENTION
from runner.rollout.local.draft import draft_from_module
from runner.rollout.local.sampling import draw, uniforms
from runner.rollout.local.speculation import DraftSpeculation, NgramSpeculation, lookup

VOCAB, LENGTH = 12, 3
PROMPTS = ((5, 11, 5, 11, 5), (11, 5, 11, 5, 11))  # both invite proposals from their own text, and some are right
SAMPLES = 17_500  # per prompt: 2 x 17,500 x 3 = 105,000 tokens


def small_config() -> Config:
    cfg = config("model=tiny_dense", "precision=bf16", "precision.base_dtype=float32", "rollout.device=cpu", "speculative=none")
    cfg.model.vocab_size, cfg.model.num_layers, cfg.model.hidden_size = VOCAB, 1, 32
    cfg.rollout.max_concurrency = 2500
    return cfg


def pool_with(method: str) -> tuple[LocalPool, torch.nn.Module]:
    cfg = small_config()
    pool = LocalPool(cfg)
    built, items = exported(cfg, spread=3.0)
    assert pool.update_weights(0, iter(items)).problems == []
    if method == "ngram":
        pool.engine.speculation = NgramSpeculation(2, 1, 3, False, 0)
    elif method == "draft":
        draft = build_model(cfg.model, dtype=torch.float32, seed=8, attention=ATTENTION, experts="eager")
        with torch.no_grad():
            for parameter in draft.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
        pool.engine.speculation = DraftSpeculation(draft_from_module(cfg.model, draft), 2, False, 0)
    return pool, built


def exact_joint(built: torch.nn.Module, prompt: tuple[int, ...], temperature: float) -> np.ndarray:
    """[VOCAB ** LENGTH] fp64 probabilities of every continuation."""
    paths = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    tokens = torch.cat([torch.tensor(prompt).expand(len(paths), -1), paths], 1)
    with torch.no_grad():
        logits = built(tokens).logits[:, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, paths.unsqueeze(-1)).sum((1, 2)).exp().numpy()


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 5:  # too rare even together: one cell with the last
        observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def fits(pool: LocalPool, built: torch.nn.Module, temperature: float, samples: int = SAMPLES) -> list[float]:
    values = []
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature, LENGTH)
        source = (Request(str(index), i, prompt, params, seed=1_000_003 * index + i) for i in range(samples))
        counts = Counter(tuple(sample.response_tokens.tolist()) for sample in pool.generate(source))
        joint = exact_joint(built, prompt, temperature)
        assert -(joint * np.log(joint)).sum() > 1.0 and abs(joint.sum() - 1) < 1e-9
        order = itertools.product(range(VOCAB), repeat=LENGTH)
        values.append(p_value(np.array([counts[path] for path in order], dtype=float), joint))
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "temperature"), [("none", 1.0), ("ngram", 1.0), ("draft", 1.0), ("ngram", 0.6), ("draft", 0.6)]
)
def test_joint_distribution_is_the_targets(method: str, temperature: float) -> None:
    pool, built = pool_with(method)
    assert min(fits(pool, built, temperature)) > 1e-3
    if method != "none":
        metrics = pool.metrics()
        assert metrics["rollout/spec_proposed_tokens"] > 1_000 and 0.02 < metrics["rollout/spec_accept_rate"] < 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "temperature"),
    [
        ("keep_everything", 1.0),
        ("residual_is_the_target", 1.0),
        ("half_the_ratio", 1.0),
        ("ratio_upside_down", 1.0),
        ("residual_is_the_target", 0.6),
    ],
)
def test_wrong_acceptance_rules_fail_the_same_check(wrong: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    replacement = {
        "keep_everything": ("accept_probability", lambda p, q: torch.ones_like(p)),
        "residual_is_the_target": ("residual", lambda p, q: p),
        "half_the_ratio": ("accept_probability", lambda p, q: (0.5 * p / q).clamp(max=1.0)),
        "ratio_upside_down": ("accept_probability", lambda p, q: (q / p).clamp(max=1.0)),
    }[wrong]
    monkeypatch.setattr(rules, *replacement)
    pool, built = pool_with("draft")
    assert min(fits(pool, built, temperature, samples=5_000)) < 1e-6


def test_a_lookup_that_always_keeps_its_proposal_fails_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, built = pool_with("ngram")
    honest = rules.verify_drawn

    def keep_first(drawn, proposal):
        has = proposal.counts > 0
        drawn[has, 0] = proposal.tokens[has, 0]
        return honest(drawn, proposal)

    monkeypatch.setattr(engine, "verify_drawn", keep_first)
    assert min(fits(pool, built, 1.0, samples=5_000)) < 1e-6


def test_lookup_proposes_only_what_plain_decoding_would_draw_anyway() -> None:
    """Same seeds, same tokens: with proposals from text a position's token is the one plain decoding draws."""
    tokens = []
    for method in ("none", "ngram"):
        pool, _ = pool_with(method)
        samples = pool.generate([Request("p", i, PROMPTS[0], SamplingParams(0.8, 40), seed=i) for i in range(50)])
        tokens.append({sample.sample_index: sample.tokens.tolist() for sample in samples})
    assert tokens[0] == tokens[1]


def test_greedy_is_the_same_with_every_method() -> None:
    results = []
    for method in ("none", "ngram", "draft"):
        pool, _ = pool_with(method)
        params = SamplingParams(0.0, 30, stop_token_ids=(11,))
        samples = pool.generate([Request("p", i, (*PROMPTS[i % 2], i % 10), params, seed=i) for i in range(20)])
        results.append({sample.sample_index: sample.tokens.tolist() for sample in samples})
    assert results[0] == results[1] == results[2]


def test_lookup_finds_the_longest_and_latest_match() -> None:
    #                  0  1  2  3  4  5  6  7  8  9
    text = np.array([[1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [5, 5, 5, 5, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0]])
    found = lookup(text, np.array([10, 4, 6]), most=3, shortest=1, longest=3)
    assert found.counts.tolist() == [3, 1, 0]
    assert found.tokens[0].tolist() == [9, 2, 3]  # three tokens match at the front; "2 3" alone would give 8
    assert found.tokens[1, 0] == 5
    assert lookup(text, np.array([10, 4, 6]), most=3, shortest=1, longest=2).tokens[0].tolist() == [8, 1, 2]


def test_random_streams_are_uniform_and_separate() -> None:
    seeds, positions = np.meshgrid(np.arange(200), np.arange(300), indexing="ij")
    streams = [uniforms(seeds.ravel(), positions.ravel(), purpose) for purpose in range(4)]
    for stream in streams:
        assert stats.kstest(stream, "uniform").pvalue > 1e-3 and stream.min() > 0 and stream.max() < 1
    correlation = np.corrcoef(np.stack([*streams, np.roll(streams[0], 1), np.roll(streams[0], 300)]))
    assert np.abs(correlation - np.eye(6)).max() < 5 / np.sqrt(seeds.size)
    tokens = draw(torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(40_000, 5), streams[0][:40_000])
    counts = torch.bincount(tokens, minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and stats.chisquare(counts[[1, 3]].numpy(), [10_000, 30_000]).pvalue > 1e-3


def test_speculation_that_is_slower_is_switched_off_for_good() -> None:
    cfg = config("model=tiny_dense", "precision=bf16", "speculative=ngram", "speculative.auto_disable_after_steps=3")
    pool, _ = make_pool(cfg)
    speculation = pool.engine.speculation
    zero = np.zeros(1, dtype=np.int64)
    for _ in range(3):  # proposing takes 2 ms a token, plain decoding 1 ms
        speculation._plain_turn = False
        speculation.record(None, zero, tokens=10, seconds=0.020)
        speculation._plain_turn = True
        speculation.record(None, zero, tokens=10, seconds=0.010)
    assert speculation.enabled  # until the end of the run's step
    decision = pool.decide()
    assert decision is not None and decision["disabled"] and not speculation.enabled and pool.decide() is None
    state = pool.state()
    for _ in range(50):
        speculation.record(None, zero, tokens=10, seconds=1.0)
    assert pool.state() == state
    resumed, _ = make_pool(cfg)
    resumed.load_state(state)
    list(resumed.generate(requests(5)))
    assert resumed.state() == state and resumed.metrics()["rollout/spec_proposed_tokens"] == 0
    assert resumed.metrics()["rollout/spec_enabled"] == 0


def test_a_measured_run_reaches_a_decision_from_both_kinds_of_steps() -> None:
    cfg = config("model=tiny_dense", "precision=bf16", "speculative=ngram", "speculative.auto_disable_after_steps=4")
    pool, _ = make_pool(cfg)
    assert pool.decide() is None
    list(pool.generate(requests(8, max_response_tokens=20)))
    decision = pool.decide()
    assert decision is not None
    slower = decision["seconds_per_token_speculative"] > decision["seconds_per_token_plain"]
    assert decision["disabled"] == slower and decision["seconds_per_token_plain"] > 0


def test_draft_model_comes_from_a_folder_and_must_share_the_vocabulary(tmp_path) -> None:
    cfg = config("model=tiny_dense", "precision=bf16", "precision.base_dtype=float32", "speculative=none")
    draft = build_model(cfg.model, dtype=torch.float32, seed=1)
    draft.save_pretrained(tmp_path / "draft")
    save_config(cfg.model, tmp_path / "draft")
    cfg.speculative.method, cfg.speculative.num_draft_tokens = "draft", 3
    cfg.speculative.draft_model = str(tmp_path / "draft")
    pool = LocalPool(cfg)
    plain = build_model(cfg.model, dtype=torch.float32, seed=1)
    views = disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, plain))
    assert pool.update_weights(0, (ExportedTensor(n, "bf16", {n: t.detach()}) for n, t in views)).problems == []
    list(pool.generate(requests(8)))
    assert pool.metrics()["rollout/spec_accept_rate"] > 0.99  # the draft is the target: everything is kept
    cfg.model.vocab_size = 300
    with pytest.raises(UserError, match="272 tokens"):
        LocalPool(cfg)
    cfg.speculative.draft_model = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="config.json"):
        LocalPool(cfg)
