"""The SGLang rollout pool: the protocol's surface over servers that run as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch

from runner import scratch
from runner.cluster import launcher_of
from runner.cluster.launcher import EngineOrder, EngineProcess
from runner.config.choices import Drafting
from runner.config.schema import Config, Role
from runner.data import ExportedTensor, Request, Sample
from runner.errors import UserError
from runner.models.draft_folder import check_folder
from runner.models.images import Images
from runner.precision.plan import PrecisionPlan
from runner.rollout.feed import WATCH_SECONDS, Feed
from runner.rollout.protocol import EngineDescription, SyncReport
from runner.rollout.sglang import arguments
from runner.rollout.sglang.background import BackgroundLoop
from runner.rollout.sglang.client import EngineFailure, Refused
from runner.rollout.sglang.config import layout, on_cpu, settings
from runner.rollout.sglang.decoding import Generation, RouteDecoder
from runner.rollout.sglang.engines import EngineUpdate, Settings
from runner.rollout.sglang.fleet import Fleet
from runner.rollout.sglang.interface import name_of
from runner.rollout.sglang.plugin.residency import layer_of
from runner.rollout.sglang.router import Router, RouterProcess, router_arguments
from runner.routing.routes import RouteError
from runner.weights.stream import SealedTensor
from runner.weights.transports import TRANSPORTS, Site, Transport
from runner.weights.weight_set import WeightSet

ON_GPUS = {"bf16": "none", "int4": "marlin"}  # rollout format -> how its kernels hold quantized weights; others: as they arrive


class SglangPool:
    """Servers start with dummy weights from a config.json; generating or scoring before the first sync is a UserError."""

    def __init__(self, cfg: Config, run_dir: Path | None = None, transport: Transport | None = None) -> None:
        """Starts every server and waits until all answer. UserError with the reason and the log file otherwise.

        Logs and weights on disk lie in the run's folder. Outside of a run, logs that tell of a failure stay in one of their own.
        `transport`: in place of the one that `rollout.weight_transport` names.
        """
        check_folder(cfg)
        rollout = settings(cfg)
        self.version = -1
        self.plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
        self._cfg, self._rollout = cfg, rollout
        self._draft = frozenset(name for name, parameter in self.plan.parameters.items() if parameter.role is Role.mtp)
        self._loaded = [name for name in self.plan.tensors if name not in self._draft or cfg.speculative.method == Drafting.mtp]
        self._repacks = not on_cpu(cfg) and cfg.precision.rollout.format != "bf16"
        self._context = cfg.model.max_context_tokens
        self._residency_tensors = cfg.mismatch.residency_tensors
        self._routes = RouteDecoder(cfg.model) if cfg.router_replay.rollout else None
        self._ids = itertools.count()
        self._tokens, self._seconds, self._stall = 0, 0.0, 0.0
        for line in arguments.warnings(cfg):
            print(f"warning: {line}", file=sys.stderr)
        self._scratch = scratch.make("runner-sglang-")
        self._run_dir = run_dir
        self._own_logs = None if run_dir else Path(tempfile.mkdtemp(prefix="runner-logs-"))
        self._logs = self._own_logs or cast(Path, run_dir) / "logs"
        self._loop = BackgroundLoop("sglang-pool")
        api_key = secrets.token_urlsafe(32)
        self._host = launcher_of(cfg).host(cfg)
        chosen = transport or TRANSPORTS[self._rollout.weight_transport]
        self.driver = chosen.driver(self._site())
        self._fleet = Fleet(self._servers(api_key), api_key, self._settings(), self.driver, self._router(api_key))
        self._max_running = self._rollout.max_concurrency * len(self._fleet.roster.engines)
        self._room = asyncio.Semaphore(self._max_running)  # of all calls together: asynchronous rollouts overlap
        try:
            self._loop.run(self._fleet.start())
            self._info = self._loop.run(self._fleet.ask("describe"))
        except BaseException:
            self.close(keep_logs=True)
            raise

    def _servers(self, api_key: str) -> list[EngineProcess]:
        common = {**arguments.server_arguments(self._cfg), "random_seed": self._cfg.seed}
        logs = [self._logs / f"sglang_{index}.log" for index in range(layout(self._cfg).engines)]
        orders = [EngineOrder(index, common, api_key, log) for index, log in enumerate(logs)]
        return launcher_of(self._cfg).engines(self._cfg, orders, self._scratch)

    def _router(self, api_key: str) -> Router | None:
        if not self._rollout.use_router:
            return None
        seconds = self._rollout.request_timeout_seconds
        log = self._logs / "sglang_router.log"
        return Router(RouterProcess(router_arguments(seconds), host=self._host, api_key=api_key, log=log), api_key, seconds)

    def _settings(self) -> Settings:
        rollout = self._rollout
        return Settings(
            startup_seconds=rollout.startup_timeout_seconds,
            request_seconds=rollout.request_timeout_seconds,
            health_seconds=rollout.health_interval_seconds,
            max_retries=rollout.max_retries,
            pause_mode=rollout.pause_mode,
            repacks=self._repacks,
            draft=self._draft,
        )

    def _site(self) -> Site:
        rollout = self._rollout
        return Site(
            host=self._host,
            interface=name_of(self._host),
            on_gpus=not on_cpu(self._cfg),
            disk=(self._run_dir or self._scratch) / "weights",
            logs=self._logs,
            needed_bytes=sum(self.plan.tensors[name].stored_bytes(self.plan.parameters[name].shape) for name in self._loaded),
            transfer_protocol=rollout.transfer_protocol,
            transfer_devices=rollout.transfer_devices,
        )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        """Samples as they finish; `requests` is pulled as room appears. May be closed at any sample: what runs is aborted.

        A request whose engine died is asked for again, at most rollout.max_retries times; then its sample is `failed`.
        """
        self._need_weights()
        return self._generate(iter(requests))

    def _generate(self, requests: Iterator[Request | None]) -> Iterator[Sample]:
        room = self._max_running
        finished: queue.SimpleQueue[Future[Sample] | None] = queue.SimpleQueue()  # None: the feed has something new
        feed = requests if isinstance(requests, Feed) else None
        if feed is not None:
            feed.woken = lambda: finished.put(None)
        running: set[Future[Sample]] = set()
        began = time.perf_counter()
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < room:
                    request = next(requests, None)
                    if request is None:
                        exhausted = feed is None
                        break
                    future = self._loop.submit(self._complete(self._generation(request)))
                    running.add(future)
                    future.add_done_callback(finished.put)
                if not running:
                    return
                try:
                    done = finished.get(timeout=WATCH_SECONDS if feed else None)
                except queue.Empty:
                    done = None
                if done is None:
                    if feed:
                        feed.watch()
                    continue
                future = done
                running.discard(future)
                try:
                    sample = future.result()
                except (RouteError, Refused) as error:
                    raise UserError(str(error), key="rollout", fix="look at the servers' logs") from error
                self._tokens += sample.response_length
                yield sample
        finally:
            self._seconds += time.perf_counter() - began
            for future in running:
                future.cancel()

    async def _complete(self, generation: Generation) -> Sample:
        async with self._room:
            return await self._fleet.complete(generation)

    def _generation(self, request: Request) -> Generation:
        if len(request.tokens) >= self._context:
            raise UserError(
                f"the prompt of {request.prompt_id} has {len(request.tokens)} tokens, the context is {self._context}",
                key="task.max_prompt_tokens",
                fix=f"task.max_prompt_tokens={self._context // 2}",
            )
        routes = self._routes if request.capture_routes else None
        return Generation(request, self._context, routes, str(next(self._ids)))

    def update_weights(self, version: int, stream: Iterable[ExportedTensor | SealedTensor]) -> SyncReport:
        """Load every tensor of the plan in every engine, verified on arrival and where it resides (all at the first sync).

        Running requests are paused (rollout.pause_mode) only while the engines load; writing the set happens before. With
        problems (named in the report) the version stays what it was and nothing is generated until a later sync is whole.
        """
        began = time.perf_counter()
        first = self.version < 0
        previous = self._fleet.versions.weights
        weights = self.driver.write(version, self._without_unused(stream), previous)
        problems = weights.problems + self._unfit(weights)
        updates: list[EngineUpdate] = []
        stall = 0.0
        if not problems:
            parts = weights.parts_of(self._checked_now(first))
            updates, stall = self._loop.run(self._fleet.update(weights, parts, time.perf_counter))
            problems = _problems(updates)
        if problems:
            weights.remove()
        else:
            self.version = version
            if previous is not None:
                previous.remove()
        self._stall = stall
        return SyncReport(
            version=version,
            seconds=time.perf_counter() - began,
            wire_bytes=weights.wire_bytes,
            arrived=len(weights.parts) if updates and not problems else 0,
            resident_checked=len(self._checked_now(first)) if updates and not problems else 0,
            changed_integers=None if first else weights.changes.share("integers"),
            changed_scales=None if first else weights.changes.share("scales"),
            problems=problems,
        )

    def sleep(self) -> None:
        """Engines give their GPU memory back, until `wake` or the next weights. What runs is aborted. Safe to call again."""
        self._loop.run(self._fleet.sleep())

    def wake(self) -> None:
        """With the weights that they had before. Nothing to do for engines that are awake."""
        self._loop.run(self._fleet.wake())

    def _without_unused(self, stream: Iterable[ExportedTensor | SealedTensor]) -> Iterator[ExportedTensor | SealedTensor]:
        """Multi-token-prediction layers that nothing drafts with are not in the engines."""
        unused = self.plan.tensors.keys() - set(self._loaded)
        for item in stream:
            name = item.exported.name if isinstance(item, SealedTensor) else item.name
            if name not in unused:
                yield item

    def _unfit(self, weights: WeightSet) -> list[str]:
        """A session sends every tensor, in the plan's format: an expert that is left out would keep old bits."""
        found = [f"{name}: did not arrive" for name in self._loaded if name not in weights.parts]
        for name, form in weights.formats.items():
            if name not in self.plan.tensors:
                found.append(f"{name}: the precision plan has no such tensor")
            elif form != self.plan.tensors[name].format:
                found.append(f"{name}: arrived as {form}, the engine computes with {self.plan.tensors[name]}")
        return found

    def _checked_now(self, first: bool) -> list[str]:
        """Weights whose residency is checked at this sync: all at the first, then a rotating sample, each with what SGLang
        fuses it with: its loader waits for both low-rank projections of latent attention before it writes either. Weights that
        are repacked for a kernel are loaded again a layer at a time, so all of the layer is needed."""
        order = self._loaded
        count = len(order) if first else min(self._residency_tensors, len(order))
        start = self._fleet.roster.updates * count
        chosen = [order[(start + i) % len(order)] for i in range(count)]
        if self._repacks:
            layers = {layer_of(name) for name in chosen} - {""}
            chosen += [name for name in order if layer_of(name) in layers]
        return list(dict.fromkeys(part for name in chosen for part in self.plan.same_matrix(name)))

    def score(self, sequences: list[torch.Tensor], images: list[Images] | None = None) -> list[torch.Tensor]:
        """Teacher-forced logprobs [T - 1] fp32 at temperature 1."""
        self._need_weights()
        futures = [self._loop.submit(self._fleet.score(sequence.tolist())) for sequence in sequences]
        try:
            return [torch.tensor(future.result(), dtype=torch.float32) for future in futures]
        except EngineFailure as failure:
            raise UserError(f"SGLang could not score a sequence: {failure}", key="rollout", fix="look at its log") from failure

    def describe(self) -> list[EngineDescription]:
        """Formats as read back from every engine; `info`: what it says about itself."""
        grid, plain = self._cfg.precision.rollout, dict.fromkeys(self.plan.tensors, "bf16")
        return [
            EngineDescription(
                formats=plain | answer["formats"],
                group_size=grid.group_size,
                convention=grid.convention.name,
                product_rounding="bf16",  # the CPU twin's effective weights and Marlin's products alike
                info={
                    "engine": "sglang",
                    "device": answer["device"],
                    "attention_backend": answer["attention_backend"],
                    "quantized_weights": "dequantized" if answer["device"] == "cpu" else ON_GPUS.get(grid.format, grid.format),
                },
            )
            for answer in self._info
        ]

    def metrics(self) -> dict[str, float]:
        """`perf/rollout_*`, `rollout/spec_*` and the pool's own counts since the last call."""
        counters = self._fleet.roster.counters
        metrics = {
            "perf/rollout_tokens": float(self._tokens),
            "perf/rollout_stall_time": self._stall,  # of the last weight update
            "rollout/engine_restarts": counters["restarts"],
            "rollout/requests_retried": counters["failures"],
            "rollout/requests_continued": counters["continued"],
        }
        if counters["draft_proposed"]:
            metrics["rollout/spec_accept_length"] = 1 + counters["draft_accepted"] / counters["draft_steps"]
            metrics["rollout/spec_accept_rate"] = counters["draft_accepted"] / counters["draft_proposed"]
        if counters["cached_tokens"]:  # of later turns, found in the servers' radix caches
            metrics["perf/rollout_cached_tokens"] = counters["cached_tokens"]
        if self._seconds:
            metrics["perf/rollout_tokens_per_second"] = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        counters.clear()
        return metrics

    def notices(self) -> list[str]:
        found = []
        while self._fleet.roster.notices:  # the event loop's thread may append meanwhile
            found.append(self._fleet.roster.notices.popleft())
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass  # servers make no decisions that a resumed run has to repeat

    def decide(self) -> dict[str, Any] | None:
        return None

    def apply(self, decision: dict[str, Any]) -> None:
        raise ValueError(f"an SGLang pool decides nothing, yet the run recorded {decision}")

    def close(self, *, keep_logs: bool = False) -> None:
        """Stop every server and remove what was written. Safe to call again."""
        if self._loop.loop.is_closed():
            return
        with contextlib.suppress(KeyboardInterrupt):
            self._loop.run(self._fleet.close())
        self._loop.close()
        self.driver.close()
        scratch.remove(self._scratch)
        if self._own_logs and not keep_logs:
            shutil.rmtree(self._own_logs, ignore_errors=True)

    def _need_weights(self) -> None:
        if self.version < 0:
            raise UserError("the SGLang engines have no weights yet", fix="call update_weights with the trainer's export first")


def _problems(updates: list[EngineUpdate]) -> list[str]:
    """Problems of all engines; an engine that died is none as long as another one took the weights."""
    found = [
        f"server {update.engine.server.index}: {problem}" if len(updates) > 1 else problem
        for update in updates
        for problem in update.problems
    ]
    if all(update.died for update in updates):
        found += [f"server {update.engine.server.index}: {update.died}" for update in updates]
    return found
