"""Routes by reference: decoded and checked on the engine's node, fetched by who needs them; the driver's memory stays flat."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
from collections.abc import Iterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("aiohttp", reason="make setup-sglang")

import aiohttp
from aiohttp import web

from runner.config import compose
from runner.data import SamplingParams, Status
from runner.rollout.sglang.client import EngineFailure
from runner.rollout.sglang.decoding import Generation, RouteDecoder
from runner.routing.reference import RouteRef, here
from runner.routing.routes import RouteError
from tests.ray_nodes.conftest import two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROMPT, RESPONSE, SAMPLES, AHEAD = 16, 1008, 96, 16
ROWS = PROMPT + RESPONSE - 1
MIB = 1 << 20


def _ids(seed: int, layers: int, top_k: int, experts: int) -> np.ndarray:
    """[rows, layers, K] int32, distinct within a row, another for every seed."""
    first = (np.arange(ROWS * layers).reshape(ROWS, layers, 1) + seed) % experts
    return ((first + np.arange(top_k)) % experts).astype(np.int32)


def _serve(connection: Connection, layers: int, top_k: int, experts: int, break_row: bool) -> None:
    """A server that answers /generate as SGLang does, on loopback, in a process of its own: the JSON that it makes is no memory
    of the driver's. Sends its address, and serves until it is killed."""

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        ids = _ids(body["sampling_params"]["sampling_seed"], layers, top_k, experts)
        if break_row:
            ids[5, 1] = 0
        meta = {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [(-0.5, 7, None)] * RESPONSE,
            "weight_version": "1.1",
            "routed_experts": base64.b64encode(ids.tobytes()).decode(),
        }
        return web.json_response({"output_ids": [7] * RESPONSE, "meta_info": meta})

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        server = web.AppRunner(app)
        await server.setup()
        await web.TCPSite(server, "127.0.0.1", 0).start()
        connection.send(f"http://127.0.0.1:{server.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(serve())


@asynccontextmanager
async def stand_in(model: Any, break_row: bool = False) -> Any:
    """The address of such a server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sizes = (model.num_layers, model.experts_top_k, model.num_experts)
    process = context.Process(target=_serve, args=(theirs, *sizes, break_row), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(ours.recv)
    finally:
        process.kill()
        process.join()


@pytest.fixture
def node(launched: Any) -> Iterator[Any]:
    launcher = launched(two_nodes())
    model = compose.load(["model=qwen3_30b"], check_rules=False).config.model
    launcher.nodes.cfg.model = model
    yield launcher, launcher.nodes.all()[1], model


def _generation(seed: int, decoder: RouteDecoder) -> Generation:
    from runner.data import Request

    request = Request("p", seed, tuple(range(PROMPT)), SamplingParams(1.0, RESPONSE), seed=seed, capture_routes=True)
    return Generation(request, 1 << 20, decoder, str(seed))


def test_the_driver_holds_references_and_its_memory_is_flat(node: Any) -> None:
    """96 samples of 0.4 MiB of routes (2 MiB of JSON each) through one server, all of them kept by the driver."""
    from runner.cluster.ray.clients import RemoteClient

    launcher, place, model = node
    decoder, samples, grown = RouteDecoder(model), list[Any](), list[int]()

    async def run() -> None:
        async with stand_in(model) as url, aiohttp.ClientSession() as session:
            client = RemoteClient(launcher.nodes.clients(place), "key", session, url, 120.0)
            room = asyncio.Semaphore(AHEAD)

            async def one(seed: int) -> None:
                async with room:
                    generation = _generation(seed, decoder)
                    reason = generation.add(await client.generate(generation.payload(0)), lambda label: 1)
                    samples.append(generation.sample(Status.truncated, reason))

            await one(0)
            before = psutil.Process().memory_full_info().uss
            await asyncio.gather(*map(one, range(1, SAMPLES)))
            grown.append((psutil.Process().memory_full_info().uss - before) // MIB)

    asyncio.run(run())
    assert len(samples) == SAMPLES and all(isinstance(sample.routes, RouteRef) for sample in samples)
    whole = SAMPLES * ROWS * model.num_layers * model.experts_top_k / MIB
    assert whole > 35 and grown[0] < whole / 2, grown
    for sample in samples[::16]:
        routes = here(sample.routes)
        assert routes is not None and routes.dtype == torch.uint8 and len(sample.routes) == len(sample.tokens) - 1
        expected = _ids(sample.sample_index, model.num_layers, model.experts_top_k, model.num_experts)
        assert torch.equal(routes.to(torch.int32), torch.from_numpy(expected))


def test_a_wrong_row_and_a_dead_server_are_what_they_are_here(node: Any) -> None:
    from runner.cluster.ray.clients import RemoteClient

    launcher, place, model = node
    decoder = RouteDecoder(model)

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            async with stand_in(model, break_row=True) as url:
                client = RemoteClient(launcher.nodes.clients(place), "key", session, url, 60.0)
                with pytest.raises(RouteError, match="no valid route for token 5 in MoE layer 1"):
                    await client.generate(_generation(1, decoder).payload(0))
            with pytest.raises(EngineFailure, match="/generate"):
                await client.generate(_generation(1, decoder).payload(0))

    asyncio.run(run())
