"""`trainer=megatron` as the loop sees it: the trainer protocol over rank processes. Imports neither Megatron nor CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch

from runner.cluster import launcher_of
from runner.cluster.launcher import Ranks
from runner.config.schema import Config
from runner.data import Batch, Sample, WeightStream
from runner.errors import UserError, UserErrors
from runner.models.images import Images
from runner.trainer.megatron import arguments, untrusted
from runner.trainer.megatron.shares import Division
from runner.trainer.policy import PolicyTrainer, Rows, Updated
from runner.trainer.protocol import Routes, Saved, Saving, Weights
from runner.trainer.share import Share, lessons, steps
from runner.weights.published import Published, PublishedTensor, Session, merged, tensors
from runner.weights.transports.ranks import Order

MEGATRON = "0.16.1"  # internals of this version are relied on: optimizer, DDP hooks, router replay


class MegatronTrainer(PolicyTrainer):
    """`runner.trainer.protocol.Trainer` over one Megatron rank per process.

    A rank that dies, raises or falls silent ends all ranks, and the call raises RankFailure within
    trainer.rank_timeout_seconds (at once when the process is gone).
    """

    def __init__(self, cfg: Config, run_dir: Path | None = None) -> None:
        check_installation()
        self.cfg = cfg
        self.family = arguments.check(cfg)
        if start := arguments.trainer_config(cfg).initial_checkpoint:
            initial_folder(start)  # before processes are started for nothing
        self._version = 0
        self._division = Division(cfg)
        self._launcher = launcher_of(cfg)
        self.ranks = self._launcher.ranks(cfg, run_dir)
        if start := arguments.trainer_config(cfg).initial_checkpoint:
            self.ranks.call("start_from", initial_folder(start))

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, value: int) -> None:
        self.ranks.call("set_version", value)
        self._version = value

    # ---- forward

    def _logprobs(self, batch: Batch, weights: Weights, routes: Routes) -> list[torch.Tensor]:
        return _in_order(self._each("logprobs", self._shared(batch), weights, routes), len(batch))

    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        return _in_order(self._each("reference_logprobs", self._shared(batch)), len(batch))

    def _shared(self, batch: Batch) -> list[tuple[Batch, Share]]:
        """Of every data-parallel rank."""
        light = _light(batch)
        return [(light.select(share.indices), share) for share in self._division.divide([len(s.tokens) for s in light.samples])]

    def _each(self, name: str, shared: Sequence[tuple[Any, ...]], *rest: Any) -> list[Any]:
        """A call of every rank with what its data-parallel rank gets of `shared`, and `rest`."""
        return self.ranks.each(name, self._division.by_rank([(*part, *rest) for part in shared]))

    # ---- updates

    def _updates(self, batch: Batch) -> Updated:
        return self._merged(self._each("updates", [(part,) for part in steps(self.cfg, _light(batch), self._division.divide)]))

    def sft_step(
        self, samples: list[tuple[torch.Tensor, int]], lr: float, images: list[Images] | None = None
    ) -> dict[str, float]:
        """See the protocol. Uses the same masters and moments as RL: call `reset_optimizer` between the two. No images: rules
        refuse vision models."""
        parts = lessons(self.cfg, samples, divide=self._division.divide)
        return self._merged(self._each("supervised", [(part,) for part in parts], lr)).metrics

    def _merged(self, results: list[Updated]) -> Updated:
        self._version = results[0].version
        busy = [span for result in results for span in result.busy]
        return replace(results[-1], old_logprobs=_merged([result.old_logprobs for result in results]), busy=busy)

    def reset_optimizer(self) -> None:
        """RL starts here: moments and schedule from zero, and the reference policy is the policy as it is now."""
        self.ranks.call("reset_optimizer")

    # ---- weights out, checkpoints

    def export(self, format: Literal["rollout", "bf16"] = "rollout") -> WeightStream:
        """See the protocol. Ranks send their parts as they are gathered, so the order of tensors is not fixed.

        Where the launcher says so, ranks bring the rollout's weights to every node: the stream has PublishedTensors.
        """
        if format == "rollout" and self._launcher.publishes:
            return cast(WeightStream, self._published())
        return self.ranks.stream("export", format)

    def _published(self) -> Iterator[PublishedTensor]:
        found: list[Published] = self.ranks.call("publish")
        changes, problems = merged(found)
        if problems:
            for part in found:
                differ = self.ranks.call("compare_published", part.rank, part.digests, part.files)
                problems += [f"{name}: bytes on the node of rank {r} differ" for r, names in enumerate(differ) for name in names]
        files = [file for part in found for file in part.files]
        folders = sorted({str(Path(file).parent) for file in files})
        session = Session(
            f"version {self._version}", changes, problems, files, lambda: self._launcher.forget_weights(folders), self._send
        )
        yield from tensors(found, session)

    def _send(self, orders: Mapping[int, Order]) -> list[str]:
        """Have ranks send what they published; what went wrong, by rank. From any thread: a rank does one thing at a time."""
        return self.ranks.each("send_published", [(orders.get(rank),) for rank in range(self.cfg.parallelism.ranks)])

    def save(self, folder: Path) -> None:
        self.ranks.call("save", folder.resolve())

    def begin_save(self, folder: Path) -> Saving:
        """With trainer.async_save the ranks write while they train; without, this is `save`."""
        if not arguments.trainer_config(self.cfg).async_save:
            self.save(folder)
            return Saved()
        self.ranks.call("begin_save", folder.resolve())
        return RankSaving(self.ranks)

    def load(self, folder: Path) -> None:
        _check(folder)
        self._version = self.ranks.call("load", folder.resolve())[0]

    def sleep(self) -> None:
        self.ranks.call("sleep")

    def wake(self) -> None:
        self.ranks.call("wake")

    def close(self) -> None:
        self.ranks.close()


class RankSaving:
    """`runner.trainer.protocol.Saving` of all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def finished(self) -> bool:
        return all(self.ranks.call("save_finished"))

    def wait(self) -> None:
        self.ranks.call("finish_save")


def _merged(parts: list[Rows]) -> Rows:
    """Reporters' rows; every sample must have come from exactly one rank."""
    rows: Rows = {}
    for part in parts:
        assert not rows.keys() & part.keys(), f"samples {rows.keys() & part.keys()} were computed twice"
        rows |= part
    return rows


def _in_order(parts: list[Rows], count: int) -> list[torch.Tensor]:
    rows = _merged(parts)
    return [rows[index] for index in range(count)]


def _light(batch: Batch) -> Batch:
    """The batch as ranks need it: texts and reports stay here."""

    def light(sample: Sample) -> Sample:
        return replace(sample, info={}, raw_logprobs=None, weight_spans=[], served=[])

    return replace(batch, samples=[light(sample) for sample in batch.samples])


def initial_folder(path: str) -> Path:
    """The trainer's part of a checkpoint, given that or the checkpoint; UserError when it is neither."""
    given = Path(path).expanduser().resolve()
    for folder in (given / "trainer", given):
        if (folder / "trainer.json").is_file():
            _check(folder)
            return folder
    raise UserError(
        f"{path} is no checkpoint of a run", key="trainer.initial_checkpoint", fix="outputs/<run>/checkpoints/step_<N>"
    )


def _check(folder: Path) -> None:
    """Refuse what must not be read before ranks do (they check it again); they say what a folder of another trainer is."""
    if (folder / untrusted.FOLDER).is_dir():
        untrusted.check(folder / untrusted.FOLDER)


def check_installation() -> None:
    """UserErrors with what trainer=megatron lacks on this machine."""
    missing: list[UserError] = []
    fix = "make setup (or pip install 'runner[megatron]')"
    try:
        found = version("megatron-core")
        if found != MEGATRON:
            missing.append(UserError(f"megatron-core {found} is installed, {MEGATRON} is needed", key="trainer", fix=fix))
    except PackageNotFoundError:
        missing.append(UserError("megatron-core is not installed", key="trainer", fix=fix))
    if find_spec("psutil") is None:  # undeclared by megatron-core: without it saving a checkpoint hangs for ever
        missing.append(UserError("psutil is not installed; Megatron's checkpoints need it", key="trainer", fix=fix))
    if missing:
        raise UserErrors(missing)
