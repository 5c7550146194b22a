"""One conversation as tokens: what the engine produced is what is trained on, never tokenized again.

Shape legend: P prompt tokens, R response tokens (the model's and the observations between them), T = P + R, L MoE layers,
K experts per token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.data import Sample, Status, WeightSpan
from runner.errors import told
from runner.models.images import PlacedImage
from runner.routing.reference import RouteRef, head, joined
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import no_reward
from runner.turns.codec import Codec
from runner.turns.failure import Failed
from runner.turns.pictures import text_of

MAX_NOTE_CHARACTERS = 20_000  # of a turn


@dataclass(frozen=True)
class Turn:
    """What the model said.

    text    without the end token; a stop text that ended it is its end
    tokens  all of them
    finish  "stop": an end token or a stop text; "length": the turn or the conversation had no room for more
    """

    text: str
    tokens: list[int]
    finish: str

    @property
    def finished(self) -> bool:
        return self.finish == "stop"


@dataclass
class Transcript:
    """Tokens of a prompt and of what followed, with everything that training wants of them.

    `engine.generate(transcript)` adds a turn of the model, `observe` what an environment answers. All turns together have room
    for `budget` tokens. The rows after the prompt are aligned: mask, logprobs, and routes one row shorter than the tokens.
    """

    prompt: Prompt
    sample_index: int
    key: str  # names the conversation to the engine
    seed: int
    codec: Codec
    budget: int
    max_observation_tokens: int
    tokens: list[int] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)  # the prompt's, then those of observations
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw: list[float] | None = field(default_factory=list)
    routes: list[torch.Tensor | RouteRef] = field(default_factory=list)
    rows: int = 0  # of routes
    spans: list[WeightSpan] = field(default_factory=list)
    served: list[tuple[str, float, float]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)  # what a reader sees
    rewards: dict[str, float] = field(default_factory=dict)
    penalties: dict[str, float] = field(default_factory=dict)  # beside the task's own reward
    turn_rewards: list[tuple[int, str, float]] = field(default_factory=list)
    full: bool = False  # something did not fit any more
    asking: bool = False  # a turn of the model is under way

    def __post_init__(self) -> None:
        self.tokens, self.images = list(self.prompt.tokens), list(self.prompt.images)

    @property
    def room(self) -> int:
        return 0 if self.full else self.budget - len(self.mask)

    @property
    def texts(self) -> list[str]:
        """Of the model's turns."""
        return [turn["text"] for turn in self.turns if turn["by"] == "model"]

    def add(self, piece: Sample, stop: tuple[str, ...]) -> Turn:
        """The engine's answer to the tokens so far. What came after the first of the `stop` texts is dropped: it was never
        seen by anyone, so the rest is what the model says up to there."""
        new = piece.response_tokens.tolist()
        count, text = self.codec.until_stop(new, stop)
        cut = count < len(new) or text is not None
        start, total = len(self.mask), len(self.tokens) + count
        self.tokens += new[:count]
        self.mask += [True] * count
        self.logprobs += piece.rollout_logprobs[:count].tolist()
        if self.raw is not None:
            self.raw = None if piece.raw_logprobs is None else self.raw + piece.raw_logprobs[:count].tolist()
        if piece.routes is not None:
            rows = head(piece.routes, total - 1 - self.rows)
            self.routes.append(rows)
            self.rows += len(rows)
        for span in piece.weight_spans:
            if span.start < count:
                self.spans.append(WeightSpan(span.version, start + span.start, start + min(span.stop, count)))
        self.served += piece.served
        finish = "stop" if cut or piece.status is Status.completed else "length"
        turn = Turn(self.codec.decode(new[:count]) if text is None else text, new[:count], finish)
        self.turns.append({"by": "model", "text": turn.text, "start": start, "stop": start + count, "finish": finish})
        self.codec.look_at(turn)
        return turn

    def observe(self, seen: Any) -> bool:
        """Add what an environment says, with loss_mask 0: a text, an image (of PIL, or a uint8 array [height, width, 3]), or a
        list of both. False where that and a turn after it do not fit any more: then the conversation is over.

        Failed for anything else, for more than task.rollout.max_observation_tokens, and for images that cannot be shown.
        """
        self.check_idle()
        closed = self.tokens[-1] in self.codec.ends
        tokens, images = self.codec.observation(
            seen, self.max_observation_tokens, not self.turns, closed, len(self.tokens), len(self.images)
        )
        note: dict[str, Any] = {"by": "environment", "text": text_of(seen), **({"images": len(images)} if images else {})}
        if len(tokens) >= self.room:
            self.full = True
            self.turns.append(note | {"left_out": True})
            return False
        start = len(self.mask)
        self.tokens += tokens
        self.images += images
        self.mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        if self.raw is not None:
            self.raw += [0.0] * len(tokens)
        self.turns.append(note | {"start": start, "stop": start + len(tokens)})
        return True

    def check_idle(self) -> None:
        """Failed while the model's next turn is under way: what else were added meanwhile, it would not have seen."""
        if self.asking:
            raise Failed(
                "rubbish", "a transcript got something new while its next turn was generated; context.start makes another"
            )

    def note(self, /, **notes: Any) -> None:
        """What a reader of the sample should see beside the last turn; anything that is no JSON as its text."""
        if self.turns and notes:
            length = len(json.dumps(written := plain(notes)))
            short = written if length <= MAX_NOTE_CHARACTERS else {"notes": f"{length} characters, left out"}
            self.turns[-1].setdefault("notes", {}).update(short)

    def reward(self, value: float, name: str = "environment") -> None:
        """Add to a part of the reward, as given for the turn before. A conversation without any is rewarded by its task.

        Failed for what is no number, not finite, or so large that advantages would not be.
        """
        self._give(self.rewards, value, name)

    def penalty(self, value: float, name: str) -> None:
        """Add to a part that stands beside the task's own reward. Failed as with `reward`."""
        self._give(self.penalties, value, name)

    def _give(self, parts: dict[str, float], value: float, name: str) -> None:
        if problem := no_reward(value):
            raise Failed("rubbish", f"the reward {name} {problem}")
        parts[str(name)] = parts.get(str(name), 0.0) + float(value)
        self.turn_rewards.append((len(self.mask), str(name), float(value)))

    def sample(self, status: Status | None = None, reason: str | None = None) -> Sample:
        """The conversation as a Sample. It ends with the model's last turn: nobody was asked about an observation after it.

        Without a status: completed where the last turn was finished, truncated where something did not fit.
        """
        turns = [turn for turn in self.turns if turn["by"] == "model"]
        response = turns[-1]["stop"] if turns else 0
        total = len(self.prompt.tokens) + response
        if status is None:
            ended = bool(turns) and turns[-1]["finish"] == "stop" and not self.full
            status = Status.completed if ended else Status.truncated
        for turn in self.turns:
            if turn.get("stop", 0) > response:
                turn["left_out"] = True
        return Sample(
            prompt_id=self.prompt.prompt_id,
            sample_index=self.sample_index,
            tokens=torch.tensor(self.tokens[:total], dtype=torch.int64),
            response_length=response,
            loss_mask=torch.tensor(self.mask[:response], dtype=torch.bool),
            rollout_logprobs=torch.tensor(self.logprobs[:response], dtype=torch.float32),
            raw_logprobs=None if self.raw is None else torch.tensor(self.raw[:response], dtype=torch.float32),
            status=status,
            finish_reason=reason or ("stop" if status is Status.completed else "length"),
            routes=joined(self.routes) if self.routes else None,
            weight_spans=list(self.spans),
            served=list(self.served),
            rewards=dict(self.rewards),
            turn_rewards=list(self.turn_rewards),
            info={"turns": self.turns, **({"penalties": dict(self.penalties)} if self.penalties else {})},
            images=tuple(image for image in self.images if image.start + image.tokens <= total),
        )


def plain(notes: dict[str, Any]) -> dict[str, Any]:
    """The notes as JSON and a terminal hold them. Failed for what is endless, or whose text cannot be had."""
    try:
        text = json.dumps(notes, default=str, ensure_ascii=False)
        return dict(json.loads(text.encode(errors="replace")))  # half a character, which no file takes, becomes a question mark
    except Exception as error:  # a __str__ of the user's may raise anything
        raise Failed("rubbish", f"the notes of a turn cannot be written down: {told(error)}") from None
