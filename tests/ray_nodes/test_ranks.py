"""trainer=megatron with a rank on each of two nodes: the numbers of cluster=local, and ends that are found in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.data import Batch
from runner.errors import Failure, UserError
from runner.routing.reference import Part, RouteRef, head, joined
from runner.trainer.megatron import MegatronTrainer
from runner.trainer.megatron.ranks import RankFailure
from runner.weights.published import PublishedTensor, collect, read_back, sum_of
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, run
from tests.ray_nodes.conftest import two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

REPLAYED: dict[str, object] = {"router_replay.rollout": True, "router_replay.trainer": True}


def gone(pid: int) -> bool:
    """A zombie waits for whoever collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return all(map(gone, pids))


def strike(trainer: MegatronTrainer, harm: Callable[[], None]) -> tuple[RankFailure, float]:
    """Steps, harm in the middle of one: the failure, and seconds from the harm to it."""
    trainer.step(batch(trainer.cfg))
    struck: list[float] = []

    def now() -> None:
        struck.append(time.monotonic())
        harm()

    timer = threading.Timer(0.2, now)
    timer.start()
    with pytest.raises(RankFailure) as caught:
        for seed in range(100_000):
            trainer.step(batch(trainer.cfg, seed=seed))
    return caught.value, time.monotonic() - struck[0]


def test_two_nodes_compute_what_one_machine_does(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with routes that ranks fetch from where they lie; and what the ranks publish on both nodes is what the local
    export sends. A bit that flips on one of them is named."""
    local = MegatronTrainer(megatron_config("moe", "tp2_sp", format="int4", **REPLAYED))
    expected = run(local, local.cfg)
    local.close()
    cfg = two_nodes(**REPLAYED)
    launcher = launched(cfg)
    launcher.publishes = False
    trainer = MegatronTrainer(cfg)
    found = run(trainer, cfg, given=far)
    assert torch.equal(found.logprobs, expected.logprobs) and found.metrics == expected.metrics
    for ours, theirs in ((found.weights, expected.weights), (found.packed, expected.packed)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    launcher.publishes = True
    weights = collect(3, _published(trainer))
    assert not weights.problems and set(weights.digests) == set(expected.packed)
    roots = [Path(node.where["weights"]) for node in launcher.nodes.all()]
    assert roots[0] != roots[1]
    for root in roots:
        assert read_back(root / file for file in weights.files) == weights.digests
    assert weights.changes.share("integers") is None
    again = collect(4, _published(trainer))
    assert again.changes.share("integers") == 0.0 and again.digests == weights.digests
    weights.remove()
    assert all(not (root / file).exists() for root in roots for file in weights.files)
    assert all((root / file).exists() for root in roots for file in again.files)
    _a_flipped_bit_is_named(trainer, roots[1], monkeypatch)
    trainer.close()


def far(batch: Batch) -> Batch:
    """With routes in the object store, in two parts each, as an engine's answers of two turns leave them."""
    import ray

    from runner.cluster.ray.clients import Stored

    samples = []
    for sample in batch.samples:
        assert isinstance(sample.routes, torch.Tensor)
        turns = [Stored(ray.put(part.numpy())) for part in (sample.routes[:3], sample.routes[2:])]
        routes = joined([head(RouteRef((Part(turns[0], 3),)), 2), RouteRef((Part(turns[1], len(sample.routes) - 2),))])
        samples.append(replace(sample, routes=routes))
    return replace(batch, samples=samples)


def _published(trainer: MegatronTrainer) -> Iterator[PublishedTensor]:
    for item in trainer.export("rollout"):
        assert isinstance(item, PublishedTensor)
        yield item


def _a_flipped_bit_is_named(trainer: MegatronTrainer, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the node of rank 1, between the broadcast and the reading back, as bad memory would flip it."""
    call = trainer.ranks.call

    def flipping(name: str, *args: Any) -> list[Any]:
        found = call(name, *args)
        if name == "publish":
            path = root / found[0].files[0]
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            found[1].sums[0] = sum_of(read_back(root / file for file in found[0].files))
        return found

    monkeypatch.setattr(trainer.ranks, "call", flipping)
    weights = collect(5, _published(trainer))
    assert "rank 1's node has other bytes of rank 0's weights than it wrote" in weights.problems
    (named,) = [problem for problem in weights.problems if problem.endswith("bytes on the node of rank 1 differ")]
    assert named.partition(":")[0] in weights.digests


def test_a_killed_rank_is_named_new_ranks_take_its_place_and_one_that_stops_is_found(launched: Any, tmp_path: Path) -> None:
    """The stopped one with the stack of a rank that waits."""
    cfg = two_nodes("dp2")
    launcher = launched(cfg)
    trainer = MegatronTrainer(cfg)
    pids, agents = trainer.ranks.pids, [node.where["pid"] for node in launcher.nodes.all()]
    (tmp_path / "saved").mkdir()
    trainer.save(tmp_path / "saved")
    error, seconds = strike(trainer, lambda: os.kill(pids[1], signal.SIGKILL))
    assert "trainer rank 1 was lost during updates: its process ended" in str(error)
    assert seconds < 30 and all_gone(pids)
    with pytest.raises(RankFailure, match="closed"):
        trainer.step(batch(cfg))
    trainer.close()
    again = MegatronTrainer(cfg)
    again.load(tmp_path / "saved")
    assert again.version == 0 and [node.where["pid"] for node in launcher.nodes.all()] == agents
    new, again.ranks.timeout = again.ranks.pids, 8.0
    error, seconds = strike(again, lambda: os.kill(new[1], signal.SIGSTOP))
    text = str(error)
    assert "gave no answer to updates within 8 s" in text and "runner/trainer" in text
    assert seconds < 60 and all_gone(new)
    again.close()


def test_a_lost_node_ends_its_ranks_and_is_replaced(launched: Any, connection: Any) -> None:
    cfg = two_nodes("dp2", **{"cluster.node_wait_seconds": 60.0})
    launcher = launched(cfg)
    trainer = MegatronTrainer(cfg)
    pids, nodes = trainer.ranks.pids, launcher.nodes.all()
    raylets = [_raylet(node.where["pid"]) for node in nodes]
    (lost,) = [index for index, raylet in enumerate(raylets) if "--head" not in raylet.cmdline()]  # the driver is on the other
    error, seconds = strike(trainer, lambda: os.kill(raylets[lost].pid, signal.SIGKILL))
    assert "trainer rank" in str(error) and "was lost" in str(error)
    assert seconds < 30 and all_gone([*pids, nodes[lost].where["pid"]])
    trainer.close()
    launcher.cfg.cluster.node_wait_seconds = 1.0
    with pytest.raises(Failure, match=r"a node was lost, and there is no room within 1 s.*1 are there"):
        MegatronTrainer(cfg)
    launcher.cfg.cluster.node_wait_seconds = 60.0
    threading.Timer(2.0, connection.add_node).start()
    again = MegatronTrainer(cfg)
    assert len({node.where["pid"] for node in launcher.nodes.all()} | {node.where["pid"] for node in nodes}) == 3
    again.step(batch(cfg))
    again.close()


def _raylet(agent: int) -> Any:
    """The raylet process that started this agent."""
    import psutil

    return next(parent for parent in psutil.Process(agent).parents() if parent.name() == "raylet")


def test_two_runs_want_the_same_nodes(launched: Any) -> None:
    launched(two_nodes())
    with pytest.raises(
        UserError, match=r"no room within 1 s: 2 nodes with a `runner_node` are needed; 2 are there, 2 have that, 0"
    ):
        launched(two_nodes(**{"cluster.wait_seconds": 1.0}))


def test_what_differs_on_a_node_is_said_at_once(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every agent is asked; a report that differs in several ways gives as many problems, each with the node's name."""
    from runner.cluster.ray.report import problems, warnings

    launcher = launched(two_nodes())
    nodes, driver, canary = launcher.reports()
    assert len(nodes) == 2 and not list(problems(launcher.cfg, nodes, driver, canary))
    assert {node.address for node in nodes} == {"127.0.0.1"} and all(node.canary == canary for node in nodes)
    broken = replace(
        nodes[1], name="odd", code="other", clock=driver.clock - 60, canary="", packages=nodes[1].packages | {"torch": "1.0"}
    )
    found = [str(problem) for problem in problems(launcher.cfg, [nodes[0], broken], driver, canary)]
    assert len(found) == 4 and all("odd (127.0.0.1)" in problem for problem in found)
    small = replace(nodes[0], store=1 << 20)
    assert not list(warnings(launcher.cfg, nodes)) and nodes[0].store > 300 << 20
    assert ["--object-store-memory=" in line for line in warnings(launcher.cfg, [small, nodes[1]])] == [True]
    text = "\n".join(found)
    assert (
        "has 1.0 torch" in text and "other code" in text and "off by -6" in text and "does not see what the driver writes" in text
    )


def test_doctor_cluster_looks_at_every_node_and_measures(connection: Any, tmp_path: Path) -> None:
    from runner.doctor.cluster import check_cluster
    from runner.findings import Status

    cfg = two_nodes()
    cfg.outputs_dir = str(tmp_path)
    found = list(check_cluster(cfg, connection))
    assert [finding.name for finding in found] == ["sockets", "node 0", "node 1", "object store", "all-reduce"]
    assert all(finding.status is Status.ok for finding in found)
    assert "127.0.0.1 alone" in found[0].found and "64 MiB over 2 nodes" in found[-1].found
