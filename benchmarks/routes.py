"""Routes of long samples from an engine to a rank, by reference: what passes through the driver, and what stays in it.

    python -m benchmarks.routes [samples] [held] [tokens]    default 1024, 64 and 32768 (15 MiB of routes each); make setup-sglang

Two Ray nodes of this machine. A stand-in server answers as SGLang does (32K tokens, 60 layers, 8 experts of 256 per token: 80 MiB
of JSON), a few answers at a time; which routes it says depends on the request's seed. The actor of the server's node decodes,
checks and stores them; the driver holds the references of `held` samples, and hands the oldest to an actor on the other node,
which fetches the rows and layers of its micro-batch as a rank does, and compares every one. "here" is the same without Ray: the
driver decodes, and holds the routes. Memory is what a process has for itself, in MiB, after the first `held` samples and at its
most after that.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from aiohttp import web

from runner.config import compose
from runner.config.schema import Config, ModelConfig
from runner.data import Request, Sample, SamplingParams, Status
from runner.routing.reference import pick

SAMPLES, HELD, TOKENS = (int(given) for given in [*sys.argv[1:4], *("1024", "64", "32768")[len(sys.argv[1:4]) :]])
PROMPT, RESPONSE, LAYERS, TOP_K, EXPERTS = 1024, TOKENS - 1024, 60, 8, 256
ROWS, KINDS, ANSWERS, MIB = PROMPT + RESPONSE - 1, 3, 2, 1 << 20
HELD_HERE = 4  # samples at most that the driver holds without Ray: what each costs is to be seen, not the end of the machine
MODEL = (
    "model=qwen3_30b", f"model.num_layers={LAYERS}", f"model.num_experts={EXPERTS}", f"model.experts_top_k={TOP_K}",
    "model.max_context_tokens=40960",
)  # fmt: skip
RUN = (
    "scale=laptop", "cluster=ray", "cluster.nodes=2", "trainer=megatron", "rollout=sglang", "parallelism=cpu2",
    "rollout.cpu_engines=2", "speculative=none", "router_replay=r3",
)  # fmt: skip


def recorded(kind: int) -> np.ndarray:
    """[rows, layers, K] int32: what the server says of a request whose seed is `kind` modulo KINDS."""
    first = (np.arange(ROWS * LAYERS).reshape(ROWS, LAYERS, 1) * 7 + kind) % EXPERTS
    return ((first + np.arange(TOP_K)) % EXPERTS).astype(np.int32)


def serve(pipe: Pipe) -> None:
    """A process: tells its address, answers /generate until it is killed."""

    def body(kind: int) -> bytes:
        meta = {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [(-0.5, 7, None)] * RESPONSE,
            "weight_version": "1.1",
            "routed_experts": base64.b64encode(recorded(kind).tobytes()).decode(),
        }
        return json.dumps({"output_ids": [7] * RESPONSE, "meta_info": meta}).encode()

    bodies, room = [body(kind) for kind in range(KINDS)], asyncio.Semaphore(ANSWERS)

    async def generate(request: web.Request) -> web.StreamResponse:
        seed = (await request.json())["sampling_params"]["sampling_seed"]
        async with room:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(bodies[seed % KINDS])
            await response.write_eof()
        return response

    async def run() -> None:
        app = web.Application(client_max_size=64 * MIB)
        app.router.add_post("/generate", generate)
        server = web.AppRunner(app)
        await server.setup()
        await web.TCPSite(server, "127.0.0.1", 0).start()
        pipe.send(f"http://127.0.0.1:{server.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(run())


@asynccontextmanager
async def standing_in() -> AsyncIterator[str]:
    """The address of such a server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(ours.recv)
    finally:
        process.kill()
        process.join()


class Rank:
    """The half of a sample that one of two context-parallel ranks computes, and one of two pipeline stages' layers."""

    def take(self, message: np.ndarray, references: list[Any], seed: int) -> int:
        """Rows that it fetched, all of them right; MiB of its own memory."""
        from runner.trainer.megatron import wire

        sample: Sample = wire.loads(message, references)
        check(sample, seed)
        return own_memory()


def check(sample: Sample, seed: int) -> None:
    """The rows and layers of a rank are those that the server said."""
    assert sample.routes is not None and len(sample.routes) == ROWS
    rows, layers = torch.arange(ROWS // 4, 3 * ROWS // 4), range(LAYERS // 2)
    expected = recorded(seed % KINDS)[ROWS // 4 : 3 * ROWS // 4, : LAYERS // 2]
    assert np.array_equal(pick(sample.routes, rows, layers).numpy(), expected)


def own_memory() -> int:
    return int(psutil.Process().memory_full_info().uss // MIB)


def generation(seed: int, model: ModelConfig) -> Any:
    from runner.rollout.sglang.decoding import Generation, RouteDecoder

    request = Request("p", seed, tuple(range(PROMPT)), SamplingParams(1.0, RESPONSE), seed=seed, capture_routes=True)
    return Generation(request, 1 << 20, RouteDecoder(model), str(seed))


async def stream(client: Any, model: ModelConfig, samples: int, held: int, hand_over: Any) -> tuple[float, list[int]]:
    """(seconds, the driver's memory after each sample once `held` are held)."""
    waiting: deque[tuple[int, Sample]] = deque()
    room, seen = asyncio.Semaphore(held), list[int]()

    async def one(seed: int) -> None:
        async with room:
            asked = generation(seed, model)
            reason = asked.add(await client.generate(asked.payload(0)), lambda label: 1)
            waiting.append((seed, asked.sample(Status.truncated, reason)))
            if len(waiting) > held:
                await hand_over(*waiting.popleft())
            if len(waiting) >= held:
                seen.append(own_memory())

    began = time.perf_counter()
    await asyncio.gather(*map(one, range(samples)))
    while waiting:
        await hand_over(*waiting.popleft())
    return time.perf_counter() - began, seen


def show(way: str, samples: int, held: int, seconds: float, seen: list[int], before: int) -> None:
    rate = samples / seconds
    print(
        f"{way:13} {samples:5} samples, {held:3} held: {seconds:6.1f} s ({rate:.2f}/s); driver {before} MiB before, "
        f"{seen[0]} with {held}, {max(seen)} at most",
        flush=True,
    )


async def by_reference(launcher: Any, model: ModelConfig, samples: int, held: int) -> None:
    import ray

    from runner.cluster.ray.clients import RemoteClient
    from runner.cluster.ray.ranks import stored

    nodes = launcher.nodes.all()
    rank = launcher.nodes.actor(nodes[0], Rank, {}).remote()
    ranks_memory = [0]

    async def hand_over(seed: int, sample: Sample) -> None:
        ranks_memory.append(await rank.take.remote(*stored(sample), seed))

    async with standing_in() as url, aiohttp.ClientSession() as session:
        client = RemoteClient(launcher.nodes.clients(nodes[1]), "key", session, url, 600.0)
        before = own_memory()
        seconds, seen = await stream(client, model, samples, held, hand_over)
    show("by reference", samples, held, seconds, seen, before)
    print(f"{'':13} the rank {max(ranks_memory)} MiB at most, rows of {samples} samples compared", flush=True)
    ray.kill(rank)


async def here(model: ModelConfig, samples: int, held: int) -> None:
    from runner.rollout.sglang.client import Client

    async def hand_over(seed: int, sample: Sample) -> None:
        check(sample, seed)

    async with standing_in() as url, aiohttp.ClientSession() as session:
        before = own_memory()
        seconds, seen = await stream(Client(session, url, "key", 600.0), model, samples, held, hand_over)
    show("here", samples, held, seconds, seen, before)


def config(held: int) -> Config:
    """A step of it has as many samples as are held and under way: what nodes size their stores by."""
    cfg = compose.load(
        [*RUN, f"algorithm.prompts_per_step={2 * held}", "algorithm.samples_per_prompt=1"], check_rules=False
    ).config
    cfg.model = compose.load(list(MODEL), check_rules=False).config.model
    cfg.task.max_prompt_tokens, cfg.rollout.sampling.max_response_tokens = PROMPT, RESPONSE
    return cfg


def main() -> None:
    from runner.cluster.ray import RayLauncher

    cfg = config(HELD)
    print(f"{ROWS * LAYERS * TOP_K / MIB:.1f} MiB of routes each", flush=True)
    asyncio.run(here(cfg.model, min(SAMPLES, 2 * HELD_HERE), min(HELD, HELD_HERE)))
    launcher = RayLauncher(cfg)
    try:
        asyncio.run(by_reference(launcher, cfg.model, SAMPLES, HELD))
    finally:
        launcher.close()


if __name__ == "__main__":
    main()
