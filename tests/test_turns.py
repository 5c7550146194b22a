"""Conversations: tokens and what is aligned with them, caches between turns, templates, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from reference import reference_routes
from test_local_engine import FP32, config, make_pool

from runner import foreign
from runner.config import compose
from runner.config.choices import ObservationRole
from runner.config.schema import Config
from runner.data import Request, Sample, SamplingParams, Status, WeightSpan
from runner.errors import UserError, UserErrors
from runner.models.tokenizer import byte_tokenizer
from runner.rollout.feed import Feed
from runner.routing.reference import Part, RouteRef
from runner.run.collect import Collector
from runner.run.supervise import _build_task
from runner.tasks.protocol import Prompt
from runner.turns import conversations
from runner.turns.codec import THOUGHT, Codec
from runner.turns.context import Context, Engine
from runner.turns.conversations import Asked, Conversations
from runner.turns.failure import Failed
from runner.turns.returned import checked

END, VOCABULARY = 1, 272
HERE = __name__


class EchoPool:
    """Answers every request with the letter `a` as often as its prompt has tokens modulo 3, and an end token."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        for request in iter(requests):
            if request is None:
                continue
            self.requests.append(request)
            new = [ord("a") + 16] * (1 + len(request.tokens) % 3) + [END]
            total = len(request.tokens) + len(new)
            yield Sample(
                prompt_id=request.prompt_id,
                sample_index=request.sample_index,
                tokens=torch.tensor([*request.tokens, *new]),
                response_length=len(new),
                loss_mask=torch.ones(len(new), dtype=torch.bool),
                rollout_logprobs=torch.full((len(new),), -1.0),
                status=Status.completed,
                finish_reason="stop",
                routes=torch.arange(request.known_routes, total - 1).view(-1, 1, 1).to(torch.uint8),
                weight_spans=[WeightSpan(3, 0, len(new))],
                served=[("engine 0", float(total), total + 0.5)],
            )


class FarPool(EchoPool):
    """Its routes lie elsewhere."""

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        for sample in super().generate(requests):
            assert isinstance(sample.routes, torch.Tensor)
            far = RouteRef((Part(There(sample.routes.numpy()), len(sample.routes)),))
            yield dataclasses.replace(sample, routes=far)


@dataclasses.dataclass
class There:
    """Routes that nobody has fetched yet."""

    rows: np.ndarray
    fetched: int = 0

    def array(self) -> np.ndarray:
        self.fetched += 1
        return self.rows


class Talker:
    """Two observations, then done."""

    def __init__(self) -> None:
        self.turns = 0

    async def reset(self, prompt: Prompt) -> None:
        return None

    async def step(self, response: str) -> tuple[str, bool, dict[str, Any]]:
        self.turns += 1
        return f"<{self.turns}>", self.turns == 3, {"reward": 0.5, "heard": response}


class Bad(Talker):
    """Does what its prompt's text says, on its second turn."""

    def reset(self, prompt: Prompt) -> None:  # type: ignore[override]
        self.what = prompt.text

    def step(self, response: str) -> Any:  # type: ignore[override]
        self.turns += 1
        if self.turns == 1:
            return "go on", False, {}
        match self.what:
            case "raises":
                raise ValueError("the dragon ate it")
            case "exits":
                raise SystemExit(3)
            case "hangs":
                while True:
                    time.sleep(0.01)
            case "floods":
                return "x" * 10**7, False, {}
            case "floods a little":
                return "x" * 200, False, {}
            case "returns a text":
                return "what?"
            case "returns bytes":
                return b"what?", False, {}
            case "done is no bool":
                return "", "yes", {}
            case "half a character":
                return "\ud800", False, {}
            case "notes are endless":
                endless: list[Any] = []
                endless.append(endless)
                return "", True, {"start": 7, "stop": endless}
            case "reward is nan":
                return "", True, {"reward": float("nan")}
            case "reward is a text":
                return "", True, {"rewards": {"a": "much"}}
        return "", True, {"reward": 1.0, "stop": object(), "tool_calls": "many", "by": 3}


async def blocks(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    talk = context.start(prompt)
    await engine.generate(talk)
    if prompt.text == "blocks":
        while True:
            pass
    return talk.sample()


async def returns_nothing(engine: Engine, prompt: Prompt, context: Context) -> None:
    await engine.generate(context.start(prompt))


async def three_turns(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """Whatever the model says."""
    talk = context.start(prompt)
    for number in range(3):
        await engine.generate(talk, max_tokens=4 + number)
        talk.observe(f"<{prompt.text}>")
    return talk.sample()


async def two_samples(engine: Engine, prompt: Prompt, context: Context) -> list[Sample]:
    talks = [context.start(prompt), context.start(prompt)]
    await asyncio.gather(*(engine.generate(talk) for talk in talks))
    return [talk.sample() for talk in talks]


def conversation(target: str = "runner.turns.drive", **section: Any) -> Config:
    cfg = compose.load_config(["task=calculator"])
    values = {"_target_": target, "environment": None, "arguments": {}, "max_turn_tokens": None, **section}
    return dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, rollout=dataclasses.replace(cfg.task.rollout, **values)))


def codec(role: str = "none", tokenizer: Any = None) -> Codec:
    tokenizer = tokenizer or byte_tokenizer()
    return Codec(tokenizer, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), (END,), ObservationRole(role))


def run(cfg: Config, texts: list[str], pool: Any = None, budget: int = 64, samples: int = 1, routes: bool = True) -> list[Sample]:
    prompts = [Prompt(f"p{i}", text, tuple(16 + ord(c) for c in "prompt"), "a") for i, text in enumerate(texts)]
    asked = Asked(SamplingParams(1.0, budget, stop_token_ids=(END,)), step=0, capture_routes=routes, evaluating=False)
    talks = Conversations(cfg, None, codec(), concurrency=4, lockstep=True)
    return talks.run(pool or EchoPool(), prompts, samples, asked, lambda: None)


# ---- tokens


def test_everything_is_aligned_over_turns() -> None:
    pool = EchoPool()
    (sample,) = run(conversation(environment=f"{HERE}.Talker"), ["hello"], pool)
    text = byte_tokenizer().decode(sample.tokens)
    assert text == "prompta<eos><1>aa<eos><2>aaa<eos>"[: len(text)] or "<1>" in text
    own = sample.response_tokens[sample.loss_mask]
    assert set(own.tolist()) == {END, ord("a") + 16}  # the model's, and nothing of the environment
    assert byte_tokenizer().decode(sample.response_tokens[~sample.loss_mask]) == "<1><2>"
    assert (sample.rollout_logprobs[sample.loss_mask] == -1).all() and (sample.rollout_logprobs[~sample.loss_mask] == 0).all()
    assert sample.routes is not None and sample.routes.flatten().tolist() == list(range(len(sample.tokens) - 1))
    spans = torch.zeros(sample.response_length, dtype=torch.bool)
    assert len(sample.served) == 3 and sample.served == sorted(sample.served)  # of every turn
    for span in sample.weight_spans:
        spans[span.start : span.stop] = True
    assert torch.equal(spans, sample.loss_mask)
    assert sample.status is Status.completed and sample.rewards == {"environment": 1.5}
    # what is asked for grows with the tokens: every row of routes once
    known = [request.known_routes for request in pool.requests]
    assert known[0] == 0 and known == sorted(known) and all(k < len(r.tokens) for k, r in zip(known, pool.requests, strict=True))
    assert [turn["by"] for turn in sample.info["turns"]] == [
        "model",
        "environment",
        "model",
        "environment",
        "model",
        "environment",
    ]


@pytest.mark.parametrize("budget", range(2, 24))
def test_the_budget_ends_a_conversation_wherever_it_falls(budget: int) -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Talker"), ["hello"], budget=budget)
    assert sample.routes is not None and len(sample.routes) == len(sample.tokens) - 1
    assert bool(sample.loss_mask[-1])  # it ends with the model's last token
    assert sample.status is (Status.completed if sample.finish_reason == "done" else Status.truncated)


def test_max_turns_truncates_and_a_function_may_return_several_samples() -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Talker", max_turns=2), ["hello"])
    assert sample.status is Status.truncated and sample.finish_reason == "max_turns" and bool(sample.loss_mask[-1])
    found = run(conversation(f"{HERE}.two_samples"), ["one", "two"], samples=2)
    assert [(s.prompt_id, s.sample_index) for s in found] == [(p, i) for p in ("p0", "p1") for i in (0, 0, 1, 1)]


def test_a_stop_text_ends_a_turn_and_what_came_after_is_dropped() -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Talker", stop=["aa"]), ["hello"], budget=40)
    said = [turn["text"] for turn in sample.info["turns"] if turn["by"] == "model"]
    assert said and all(text in ("a", "aa") for text in said) and "aa" in said
    assert sample.routes is not None and len(sample.routes) == len(sample.tokens) - 1


@pytest.mark.parametrize("stop", [(), ("a",)])
def test_routes_of_all_turns_stay_where_they_were_decoded(stop: tuple[str, ...]) -> None:
    """What a stop text cuts off a turn is cut off its routes as well, and nothing is fetched for that."""
    cfg = conversation(environment=f"{HERE}.Talker", stop=list(stop))
    (near,), (far,) = run(cfg, ["a"]), run(cfg, ["a"], FarPool())
    assert isinstance(near.routes, torch.Tensor) and isinstance(far.routes, RouteRef) and torch.equal(near.tokens, far.tokens)
    assert len(far.routes.parts) == 3 and len(far.routes) == len(far.tokens) - 1
    held = [cast(There, part.held) for part in far.routes.parts]
    assert any(len(one.rows) > part.rows for one, part in zip(held, far.routes.parts, strict=True)) == bool(stop)
    assert [one.fetched for one in held] == [0, 0, 0] and torch.equal(far.routes.fetch(), near.routes)


def test_checked_refuses_what_cannot_be_trained_on() -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Talker"), ["hello"])
    prompt = Prompt("p0", "hello", tuple(sample.tokens[: sample.prompt_length].tolist()), "a")
    assert checked(sample, prompt, 0, True, VOCABULARY) == [sample]
    assert sample.routes is not None
    for change, message in (
        ({"loss_mask": sample.loss_mask[:-1]}, "mask entries"),
        ({"routes": sample.routes[:-1]}, "rows of routes"),
        ({"routes": None}, "has no routes"),
        ({"loss_mask": torch.zeros_like(sample.loss_mask)}, "no token of the model"),
        ({"prompt_id": "other"}, "names another prompt"),
        ({"tokens": sample.tokens + 1}, "does not begin with its prompt"),
    ):
        with pytest.raises(Failed, match=message):
            checked(dataclasses.replace(sample, **change), prompt, 0, True, VOCABULARY)


# ---- what fails


FAILURES = {
    "raises": ("environment", "step raised ValueError: the dragon ate it (tests/test_turns.py:"),
    "exits": ("environment", "SystemExit"),
    "floods": ("flood", "10,000,000 characters"),
    "floods a little": ("flood", "200 tokens; 100 are allowed"),
    "returns a text": ("rubbish", "returned str"),
    "returns bytes": ("rubbish", "is a bytes"),
    "done is no bool": ("rubbish", "done is a str"),
    "half a character": ("rubbish", "half a character"),
    "notes are endless": ("rubbish", "cannot be written down"),
    "reward is nan": ("rubbish", "is nan"),
    "reward is a text": ("rubbish", "is a str"),
}


def test_a_bad_environment_ends_its_sample_with_the_reason_and_no_other() -> None:
    cfg = conversation(environment=f"{HERE}.Bad", max_observation_tokens=100)
    texts = [name for name in FAILURES for name in (name, "fine")]
    samples = run(cfg, texts, budget=10**6)
    for text, sample in zip(texts, samples, strict=True):
        if text == "fine":
            assert sample.status is Status.completed and sample.rewards == {"environment": 1.0}
        else:
            kind, reason = FAILURES[text]
            assert sample.status is Status.failed and sample.info["failed"] == kind and reason in sample.finish_reason
    counts = conversations.metrics(samples)
    assert counts["rollout/failed"] == len(FAILURES) and counts["rollout/failed_rubbish"] == 7


def test_an_environment_that_hangs_ends_its_sample() -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Bad", timeout_seconds=1.0), ["hangs"])
    assert sample.info["failed"] == "timeout" and sample.finish_reason == "not done within 1 s"


class Unbuilt(Talker):
    def __init__(self) -> None:
        raise ValueError("no tables")


def test_a_constructor_that_raises_and_a_function_that_returns_nothing() -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Unbuilt"), ["hello"])
    assert sample.info["failed"] == "environment" and "constructor" in sample.finish_reason
    (sample,) = run(conversation(f"{HERE}.returns_nothing"), ["hello"])
    assert sample.info["failed"] == "rubbish" and "NoneType" in sample.finish_reason


def test_a_function_that_never_gives_the_loop_back_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "BLOCKED_SECONDS", 0.5)
    found = run(conversation(f"{HERE}.blocks"), ["fine", "blocks", "fine", "fine", "fine", "fine"])
    assert [sample.info.get("failed") for sample in found] == [None, "timeout", None, None, None, None]


def test_a_failed_engine_and_a_conversation_past_the_context() -> None:
    class Broken(EchoPool):
        def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
            for sample in super().generate(requests):
                yield dataclasses.replace(sample, status=Status.failed, finish_reason="the engine died")

    (sample,) = run(conversation(environment=f"{HERE}.Talker"), ["hello"], Broken())
    assert sample.info["failed"] == "engine" and sample.finish_reason == "the engine died"
    cfg = conversation(environment=f"{HERE}.Talker")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, max_context_tokens=6))
    (sample,) = run(cfg, ["hello"])
    assert sample.info["failed"] == "context"


def test_what_cannot_be_imported_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match="no_such_module"):
        conversations.user_code(conversation("no_such_module.rollout"))
    for overrides, message in (
        (["task.rollout._target_=runner.turns.drive"], "none is named"),
        (["task.rollout.environment=a.B"], "no function takes turns"),
        (["task.rollout._target_=nodots"], "is no package.module.name"),
        (["task=calculator", "task.rollout._target_=null", "task.rollout.environment=null"], "several turns"),
    ):
        with pytest.raises(UserErrors, match=message):
            compose.load(overrides)


class Wants(Talker):
    def __init__(self, discount: float) -> None:
        self.discount = discount


def test_code_that_cannot_be_called_so_is_said_before_the_run() -> None:
    with pytest.raises(UserError, match="too many positional") as caught:
        conversations.user_code(conversation("os.getcwd"))
    assert caught.value.key == "task.rollout._target_"
    with pytest.raises(UserError, match="discount") as caught:
        conversations.user_code(conversation(environment=f"{HERE}.Wants"))
    assert caught.value.key == "task.rollout.arguments"
    conversations.user_code(conversation(environment=f"{HERE}.Wants", arguments={"discount": 0.5}))


def test_a_module_that_exits_when_it_is_imported_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="leaves_at_once"):
        conversations.user_code(conversation("leaves_at_once.rollout"))


def test_the_collector_grades_and_leaves_out_what_failed() -> None:
    cfg, warnings = conversation(environment=f"{HERE}.Bad"), list[str]()
    cfg = dataclasses.replace(
        cfg, algorithm=dataclasses.replace(cfg.algorithm, prompts_per_step=2, samples_per_prompt=2, dynamic_sampling=False)
    )

    class Two:
        name = "two"

        def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
            return [Prompt(f"p{i}", text, (20, 21), "a") for i, text in enumerate(("fine", "raises"))]

    tokenizer = byte_tokenizer()
    collector = Collector(
        cfg, Two(), EchoPool(), tokenizer.decode, (END,), lambda: False, warnings.append, tokenizer  # type: ignore[arg-type]
    )  # fmt: skip
    rollout = collector.collect(0)
    assert [group.prompt.prompt_id for group in rollout.groups] == ["p0"] and rollout.groups[0].rewards == [1.0, 1.0]
    assert rollout.metrics["reward/environment"] == 1.0 and rollout.metrics["rollout/failed"] == 2
    assert len(warnings) == 1 and "2 of 4 samples failed on the way" in warnings[0] and "dragon" in warnings[0]


# ---- the feed


def test_requests_are_handed_out_in_the_order_of_their_conversations() -> None:
    feed = Feed(wait_seconds=5.0)
    for place in range(3):
        feed.begin(place)
    feed.close()
    for place in (2, 0, 1):
        feed.put(Request(str(place), 0, (1,), SamplingParams(1.0, 1), seed=0), place)
    first = [next(feed) for _ in range(3)]
    assert [request.prompt_id for request in first if request] == ["0", "1", "2"] and next(feed) is None
    for place in range(3):
        feed.delivered(place)
        feed.end(place)
    with pytest.raises(StopIteration):
        next(feed)


# ---- the in-process engine


def test_the_in_process_engine_keeps_a_conversations_cache_and_gives_the_same() -> None:
    cfg = config("model=tiny_moe", *FP32)
    pool, built = make_pool(cfg)
    pool.metrics()
    talk = conversation(f"{HERE}.three_turns")
    talk = dataclasses.replace(talk, model=cfg.model)
    texts = [f"hello {i}" for i in range(6)]
    kept = run(talk, texts, pool, budget=60, samples=2)
    counted = pool.metrics()
    assert counted["perf/rollout_cached_tokens"] > 0

    class Forgetful:
        def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
            feed = requests
            forget = (None if request is None else dataclasses.replace(request, conversation="") for request in iter(feed))
            return pool.generate(_Through(forget))

    fresh = run(talk, texts, Forgetful(), budget=60, samples=2)
    anew = pool.metrics()
    assert (
        "perf/rollout_cached_tokens" not in anew and anew["perf/rollout_prefill_tokens"] > counted["perf/rollout_prefill_tokens"]
    )
    for one, other in zip(kept, fresh, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.loss_mask, other.loss_mask)
        torch.testing.assert_close(one.rollout_logprobs, other.rollout_logprobs, rtol=1e-4, atol=1e-4)
        assert one.routes is not None and other.routes is not None and torch.equal(one.routes, other.routes)
        reference = reference_routes(built, one.tokens)
        assert torch.equal(one.routes.sort(-1).values.long(), reference.sort(-1).values.long())
    scored = pool.score([sample.tokens for sample in kept])
    for sample, logprobs in zip(kept, scored, strict=True):
        own = logprobs[sample.prompt_length - 1 :][sample.loss_mask]
        torch.testing.assert_close(sample.rollout_logprobs[sample.loss_mask], own, rtol=1e-3, atol=1e-3)


def test_a_prompts_image_is_seen_in_all_turns() -> None:
    cfg = config("model=tiny_vlm", *FP32)
    pool, _ = make_pool(cfg)
    prompts = _build_task(cfg, byte_tokenizer()).train_prompts(0, 2)
    talk = dataclasses.replace(conversation(f"{HERE}.three_turns"), model=cfg.model)
    asked = Asked(SamplingParams(1.0, 100, stop_token_ids=(END,)), step=0, capture_routes=False, evaluating=False)
    found = Conversations(talk, None, codec(), concurrency=4, lockstep=True).run(pool, prompts, 2, asked, lambda: None)
    assert pool.metrics()["perf/rollout_cached_tokens"] > 0
    scored = pool.score([sample.tokens for sample in found], [sample.images for sample in found])
    blind = pool.score([sample.tokens for sample in found])
    for sample, logprobs, other in zip(found, scored, blind, strict=True):
        own = logprobs[sample.prompt_length - 1 :][sample.loss_mask]
        torch.testing.assert_close(sample.rollout_logprobs[sample.loss_mask], own, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(own, other[sample.prompt_length - 1 :][sample.loss_mask], atol=1e-2)


class _Through(Iterator[Request | None]):
    """A plain iterator: an engine sees no feed."""

    def __init__(self, requests: Iterator[Request | None]) -> None:
        self.requests = requests

    def __next__(self) -> Request | None:
        return next(self.requests)


# ---- templates


class Template:
    """The tokenizer of bytes with another chat template."""

    QWEN3: ClassVar[str] = (
        "{%- set ns = namespace(last=0) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}"
        "{%- set past = m.role == 'assistant' and loop.index0 < ns.last %}"
        "{%- set content = m.content.split('</think>\n\n')[-1] if past else m.content %}"
        "{{- m.role + ':' + content + '<eos>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
    )


def templated(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_an_observation_is_what_the_template_writes_between_two_turns() -> None:
    tokenizer = templated(Template.QWEN3)
    found = codec("tool", tokenizer).observation("46", 100, first=False, closed=True)[0]
    asked = [{"role": "user", "content": "12+34"}]
    answered = [*asked, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "46"}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) + "call<eos>"
    after = tokenizer.apply_chat_template(answered, add_generation_prompt=True, tokenize=False)
    assert before + tokenizer.decode(found) == after
    hidden = codec("tool", tokenizer).observation("46<eos>", 100, first=False, closed=True)[0]
    assert END in found and hidden.count(END) == found.count(END)  # the data's is text


def test_a_template_that_drops_earlier_thinking_is_refused_once_a_turn_thinks() -> None:
    tokenizer = templated(Template.QWEN3)
    for role, refused in (("tool", False), ("user", True)):
        found = codec(role, tokenizer)
        thinks = type("T", (), {"text": THOUGHT})()
        plain = type("T", (), {"text": "no thoughts"})()
        found.look_at(plain)
        if refused:
            with pytest.raises(UserError, match="rewrites earlier turns"):
                found.look_at(thinks)
        else:
            found.look_at(thinks)


def test_a_template_that_never_continues_is_refused_at_once() -> None:
    for template in (
        "{{ messages[-1].content }}",  # drops what came before
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}{% endfor %}",
    ):
        with pytest.raises(UserError, match="chat template"):
            codec("tool", templated(template))
