"""Prompts in, rewarded groups out: the generate and reward half of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner.config.choices import Schedule
from runner.config.option import engine_layout
from runner.config.schema import Config
from runner.data import Request, Sample, SamplingParams, Status, request_seed
from runner.errors import UserError
from runner.models.images import image_processor
from runner.rollout.protocol import RolloutPool
from runner.run.surplus import Surplus
from runner.tasks import parts
from runner.tasks.protocol import Prompt, Task, WalksThroughData
from runner.tasks.rewards import score
from runner.turns.codec import Codec
from runner.turns.conversations import Asked, Conversations
from runner.turns.conversations import metrics as conversation_metrics
from runner.turns.pictures import Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Interrupted(Exception):
    """The user asked the run to stop; raised only where nothing of the step has been kept yet."""


@dataclass
class Group:
    """All samples of one prompt, in sample order."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward or 0.0 for sample in self.samples]

    @property
    def is_flat(self) -> bool:
        """Equal rewards carry no advantage."""
        return max(self.rewards) == min(self.rewards)


@dataclass
class Rollout:
    """The groups that a step trains on, and counts over everything that was generated for it."""

    groups: list[Group]
    generated: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    @property
    def all_samples(self) -> list[Sample]:
        return [sample for group in self.generated for sample in group.samples]


class Collector:
    """Draws prompts, drives the pool and grades what comes back."""

    def __init__(
        self,
        cfg: Config,
        task: Task,
        pool: RolloutPool,
        decode: Callable[[list[int]], str],
        stop_token_ids: tuple[int, ...],
        should_stop: Callable[[], bool],
        warn: Callable[[str], None],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`decode` turns response ids into text without special tokens; `warn` gets one line about samples or
        rewards that failed. `tokenizer`: for conversations, where task.rollout names a function."""
        self.conversations: Conversations | None = None
        if cfg.task.rollout._target_ is not None:
            assert tokenizer is not None
            talk, engines = cfg.task.rollout, engine_layout(cfg)
            pictures = None
            if cfg.model.vision:
                pixels = talk.min_image_pixels, talk.max_image_pixels
                pictures = Pictures(image_processor(cfg.model, tokenizer), talk.max_images, *pixels)
            codec = Codec(tokenizer, decode, stop_token_ids, talk.observation_role, pictures)
            room = cfg.rollout.max_concurrency * engines.engines
            self.conversations = Conversations(cfg, task, codec, room, lockstep=engines.in_process)
        self.cfg, self.task, self.pool = cfg, task, pool
        self.decode, self.stop_token_ids, self.should_stop, self.warn = decode, stop_token_ids, should_stop, warn
        # parts of the reward that have a weight alone: somebody gives them, or their name is misspelt
        self._only_weighed = {
            name for name, p in cfg.task.rewards.items() if p._target_ is None and p.url is None and name != "task"
        }

    def collect(self, step: int) -> Rollout:
        """One step's groups. With dynamic sampling (DAPO, arXiv 2503.14476) flat groups are replaced by other prompts,
        for at most `max_resample_rounds` further rounds; flat groups fill what is still missing then."""
        algorithm = self.cfg.algorithm
        sampling = SamplingParams(
            temperature=self.cfg.rollout.sampling.temperature,
            max_response_tokens=self.cfg.rollout.sampling.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
        )
        wanted = algorithm.prompts_per_step
        per_round = self.prompts_per_round
        rounds = 1 + (algorithm.max_resample_rounds if algorithm.dynamic_sampling else 0)
        everything: list[Sample] = []
        generated: list[Group] = []
        kept: list[Group] = []
        aborted = 0
        for number in range(rounds):
            prompts = self.task.train_prompts(step, per_round, number)
            surplus = self._surplus(prompts, wanted - len(kept))
            samples = self.generate(
                prompts, algorithm.samples_per_prompt, sampling, step, self.cfg.router_replay.rollout, surplus
            )
            aborted += surplus.aborted if surplus else 0
            everything += samples
            new = _groups(prompts, samples)
            generated += new
            kept += [group for group in new if not (algorithm.dynamic_sampling and group.is_flat)]
            if len(kept) >= wanted:
                break
        if len(kept) < wanted:
            kept += [group for group in generated if algorithm.dynamic_sampling and group.is_flat][: wanted - len(kept)]
        kept = kept[:wanted]
        if not kept:
            first = next((sample.finish_reason for sample in everything if "failed" in sample.info), None)
            if first is not None:
                raise UserError(
                    f"step {step}: no conversation came back with a reward; the first failed because {first}",
                    key="task.rollout",
                    fix="mend the rollout function or the environment",
                )
            raise UserError(
                f"step {step}: no sample of the rollout came back with a reward",
                key="rollout",
                fix="the messages above say why: the engine failed, or the task's reward function did",
            )
        metrics = _metrics(generated, rounds_used=number + 1)
        if unseen := sorted(self._only_weighed - {name for sample in everything for name in sample.rewards}):
            there = ", ".join(sorted({name for sample in everything for name in sample.rewards})) or "none"
            self.warn(f"task.rewards weighs {', '.join(unseen)}, which no sample of step {step} has; its parts: {there}")
        self._only_weighed = set()
        if self.cfg.algorithm.schedule == Schedule["async"] and self.cfg.algorithm.oversample_prompts:
            metrics["rollout/aborted"] = float(aborted)
        if self.conversations is not None:
            metrics |= conversation_metrics(everything)
        return Rollout(kept, generated, metrics)

    def _surplus(self, prompts: Sequence[Prompt], wanted: int) -> Surplus | None:
        """What tells when enough of a round's prompts are complete; None where all of them are waited for: then the same prompts
        are trained on whoever is fast, which only an asynchronous schedule gives up."""
        algorithm = self.cfg.algorithm
        if algorithm.schedule != Schedule["async"] or len(prompts) <= wanted:
            return None

        def usable(prompt: Prompt, samples: list[Sample]) -> bool:
            self._grade_whole([(prompt, sample) for sample in samples])
            group = _groups([prompt], samples)
            return bool(group) and not (algorithm.dynamic_sampling and group[0].is_flat)

        return Surplus(prompts, algorithm.samples_per_prompt, wanted, usable)

    @property
    def prompts_per_round(self) -> int:
        return self.cfg.algorithm.oversample_prompts or self.cfg.algorithm.prompts_per_step

    def data_state(self, step: int) -> dict[str, Any]:
        """Where training data stand after `step` steps; {} for a task that makes its problems up."""
        return self.task.data_state(step, self.prompts_per_round) if isinstance(self.task, WalksThroughData) else {}

    def continue_at(self, step: int, state: dict[str, Any] | None) -> str | None:
        """Go on from `data_state`; returns what the user should know. None: a start, or a checkpoint that holds none."""
        return self.task.continue_at(step, state) if isinstance(self.task, WalksThroughData) else None

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParams,
        step: int,
        capture_routes: bool,
        surplus: Surplus | None = None,
    ) -> list[Sample]:
        """Rewarded samples in request order; failed ones keep reward None. Raises Interrupted between samples. With `surplus`
        those of complete groups only: as soon as it has enough, what is still under way is aborted."""
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        if self.conversations is None:
            samples = self._respond(prompts, samples_per_prompt, sampling, step, capture_routes, surplus)
        else:
            asked = Asked(sampling, step, capture_routes, evaluating=step < 0)
            enough = surplus.add if surplus else None
            samples = self.conversations.run(self.pool, prompts, samples_per_prompt, asked, self._look, enough)
        if surplus is not None:
            samples = surplus.samples
        failed = [sample for sample in samples if sample.status is Status.failed]
        if failed:
            first = f"prompt {failed[0].prompt_id}, sample {failed[0].sample_index}: {failed[0].finish_reason}"
            where = "in the engine" if self.conversations is None else "on the way"
            self.warn(f"{len(failed)} of {len(samples)} samples failed {where} and are left out ({first})")
        if surplus is None:
            self._grade_whole([(by_id[sample.prompt_id], sample) for sample in samples])
        return samples

    def _grade_whole(self, pairs: list[tuple[Prompt, Sample]]) -> None:
        self._grade([(prompt, sample) for prompt, sample in pairs if sample.status is not Status.failed])

    def _look(self) -> None:
        if self.should_stop():
            raise Interrupted

    def _respond(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParams,
        step: int,
        capture_routes: bool,
        surplus: Surplus | None,
    ) -> list[Sample]:
        """One response to every request, in their order; nothing where `surplus` took them."""
        requests = [
            Request(
                prompt_id=prompt.prompt_id,
                sample_index=index,
                tokens=tuple(prompt.tokens),
                sampling=sampling,
                seed=request_seed(self.cfg.seed, step, prompt.prompt_id, index),
                capture_routes=capture_routes,
                images=prompt.images,
            )
            for prompt in prompts
            for index in range(samples_per_prompt)
        ]
        finished: dict[tuple[str, int], Sample] = {}
        generating = self.pool.generate(requests)
        for sample in generating:
            if self.should_stop():
                raise Interrupted
            finished[sample.prompt_id, sample.sample_index] = sample
            if surplus is not None and surplus.add(sample.prompt_id, sample.sample_index, [sample]):
                if close := getattr(generating, "close", None):
                    close()  # aborts what runs
                return []
        if len(finished) != len(requests):
            raise RuntimeError(f"the pool returned {len(finished)} samples for {len(requests)} requests")
        return [finished[request.prompt_id, request.sample_index] for request in requests]

    def _grade(self, pairs: list[tuple[Prompt, Sample]]) -> None:
        """Rewards of the samples that were not rewarded on the way, by the task (of a conversation its last turn is graded);
        then the parts that task.rewards adds, and their weights."""
        items = []
        for prompt, sample in pairs:
            text = self.decode(sample.response_tokens.tolist())
            sample.info |= {"prompt": prompt.text, "text": text}
            said = [turn["text"] for turn in sample.info.get("turns", ()) if turn["by"] == "model"]
            items.append((prompt, said[-1] if said else text, sample))
        open_ones = [item for item in items if item[2].reward is None and not item[2].rewards]
        report = score(self.task, open_ones, self.cfg.task.reward_timeout_seconds)
        for (_, _, sample), reward in zip(open_ones, report.rewards, strict=True):
            sample.reward = reward
        if message := report.message():
            self.warn(message)
        for _, _, sample in items:
            penalties = sample.info.get("penalties", {})
            if sample.reward is not None and (penalties or self.cfg.task.rewards) and not sample.rewards:
                sample.rewards = {"task": sample.reward, **penalties}
            if sample.rewards:
                sample.reward = sum(sample.rewards.values())
        if self.cfg.task.rewards:
            for warning in parts.add(self.cfg.task.rewards, items):
                self.warn(warning)


def _groups(prompts: Sequence[Prompt], samples: list[Sample]) -> list[Group]:
    by_prompt: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None:
            by_prompt[sample.prompt_id].append(sample)
    return [Group(prompt, by_prompt[prompt.prompt_id]) for prompt in prompts if by_prompt[prompt.prompt_id]]


def _metrics(groups: list[Group], rounds_used: int) -> dict[str, float]:
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        return {"rollout/rounds": float(rounds_used)}
    lengths = [sample.response_length for sample in samples]
    names = sorted({name for sample in samples for name in sample.rewards})
    return {
        **{f"reward/{name}": sum(sample.rewards.get(name, 0.0) for sample in samples) / len(samples) for name in names},
        "rollout/raw_reward": sum(sample.reward or 0.0 for sample in samples) / len(samples),
        "rollout/response_len/mean": sum(lengths) / len(lengths),
        "rollout/response_len/max": float(max(lengths)),
        "rollout/truncated_ratio": sum(sample.status is Status.truncated for sample in samples) / len(samples),
        "rollout/zero_std": sum(group.is_flat for group in groups) / len(groups),
        "rollout/samples": float(len(samples)),
        "rollout/rounds": float(rounds_used),
    }
