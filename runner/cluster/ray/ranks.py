"""The trainer's ranks as actors, on the nodes and devices of the placement. Each has a process with one thread of calls."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from runner import scratch
from runner.cluster.ray import numa
from runner.cluster.ray.nodes import ANSWER_SECONDS, Node, Nodes
from runner.config.schema import Config
from runner.errors import Failure, UserError
from runner.precision import cpu_matmul
from runner.trainer.megatron import arguments, process, wire
from runner.trainer.megatron.ranks import LOG_LINES, STACK_SECONDS, RankFailure, indented, silence
from runner.weights.place import ROOT

PARTS_AHEAD = 2  # parts of a stream that a rank makes before somebody takes them


class RankHost:
    """The process of one rank: what process.py serves over a socket, as methods."""

    def __init__(self, log: str) -> None:
        process.die_with_parent()
        os.register_at_fork(after_in_child=process.die_with_parent)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        self.worker: Any = None

    def where(self, address: str) -> tuple[int, int]:
        """(process id, a port of this address that is free now)."""
        with socket.socket() as probe:
            probe.bind((address, 0))
            return os.getpid(), int(probe.getsockname()[1])

    def build(self, cfg: Config, rank: int, rendezvous: str, device: int) -> wire.Failure | None:
        try:
            if arguments.Device.of(cfg).cuda:
                numa.bind(device)
            process.preload()
            from runner.trainer.megatron import worker

            worker.initialize(cfg, rank, rendezvous, device)
            self.worker = worker.Worker(cfg)
        except Exception as error:
            return process.failure(error)
        return None

    def run(self, name: str, message: np.ndarray, references: list[Any]) -> np.ndarray:
        """`references`: what the message holds numbers for; they are fetched when they are needed."""
        return _packed(process.run(self.worker, name, wire.loads(message, references)))

    def stream(self, name: str, message: np.ndarray) -> Iterator[np.ndarray]:
        """Parts of a generator's items; Ray makes an object of each as it is yielded."""
        items = process.run(self.worker, name, wire.loads(message))
        if isinstance(items, wire.Failure):
            yield _packed(items)
            return
        for part in process.parts(items):
            yield _packed(part)


class RayRanks:
    """See the protocol `Ranks`. A message lies once in the object store of each node that has ranks which read it."""

    def __init__(self, cfg: Config, nodes: Nodes, run_dir: Path | None) -> None:
        self.cfg, self.timeout = cfg, arguments.trainer_config(cfg).rank_timeout_seconds
        self._run_dir = run_dir
        self._hosts: list[Any] = []
        self._calling = threading.RLock()  # weights may be asked for while a step runs: their time begins when it has ended
        self._nodes: list[Node] = []  # by rank
        self._pids: list[int] = []
        world = arguments.world_size(cfg)
        there = nodes.all()
        places = sorted((place.rank, place.device, node) for node in there for place in node.place.ranks)
        assert [rank for rank, _, _ in places] == list(range(world))
        try:
            for rank, _, node in places:
                self._nodes.append(node)
                self._hosts.append(nodes.actor(node, RankHost, self._environment(node)).remote(str(self.log(rank))))
            found = self._gather(
                "starting", [h.where.remote(n.where["address"]) for h, n in zip(self._hosts, self._nodes, strict=True)]
            )
            self._pids = [pid for pid, _ in found]
            rendezvous = f"tcp://{self._nodes[0].where['address']}:{found[0][1]}"
            shared = ray.put(cfg)
            builds = [h.build.remote(shared, r, rendezvous, d) for h, (r, d, _) in zip(self._hosts, places, strict=True)]
            self._gather("starting", builds)
        except BaseException:
            self.close()
            raise

    def _environment(self, node: Node) -> dict[str, str]:
        variables = (
            scratch.environment(Path(node.where["scratch"]))
            | arguments.environment(self.cfg)
            | cpu_matmul.environment(self.cfg.precision.cpu_matmul)
        )
        interface = node.where["interface"]
        variables |= {ROOT: node.where["weights"]}
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "PYTHONUNBUFFERED": "1"}
        if arguments.Device.of(self.cfg).cuda:
            # every rank sees the node's devices in one order, as servers do; the second is what SGLang sets for itself
            variables |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "NCCL_CUMEM_ENABLE": "0"}
            if node.where["visible"]:
                variables["CUDA_VISIBLE_DEVICES"] = node.where["visible"]
        return variables

    def log(self, rank: int) -> Path:
        """Everything that a rank printed; in the run's logs/, or on its node where there is no run."""
        folder = self._run_dir / "logs" if self._run_dir else Path(self._nodes[rank].where["scratch"])
        return (folder / f"trainer_rank_{rank}.log").absolute()

    @property
    def pids(self) -> list[int]:
        return self._pids

    def call(self, name: str, *args: Any) -> list[Any]:
        return self.each(name, [args] * len(self._hosts))

    def each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._calling:
            return self._each(name, arguments)

    def _each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self._need_open()
        messages = {key: stored(args) for key, args in {id(args): args for args in arguments}.items()}
        return self._gather(
            name, [host.run.remote(name, *messages[id(args)]) for host, args in zip(self._hosts, arguments, strict=True)]
        )

    def stream(self, name: str, *args: Any) -> Iterator[Any]:
        self._need_open()
        message = ray.put(_packed(args))
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": PARTS_AHEAD}
        waiting = {host.stream.options(**options).remote(name, message): rank for rank, host in enumerate(self._hosts)}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=self.timeout)
            if not ready:
                self._silent(sorted(waiting.values()), name)
            generator = ready[0]
            try:
                reference = next(generator)  # type: ignore[arg-type]  # the stubs say ObjectRef
            except StopIteration:
                del waiting[generator]
                continue
            part = self._get(reference, waiting[generator], name)
            if isinstance(part, wire.Failure):
                self._failed(waiting[generator], name, part, {})
            yield from part

    def _gather(self, name: str, references: list[Any]) -> list[Any]:
        results: list[Any] = [None] * len(references)
        waiting = {reference: rank for rank, reference in enumerate(references)}
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._silent(sorted(waiting.values()), name)
            rank = waiting.pop(ready[0])
            answer = self._get(ready[0], rank, name)
            if isinstance(answer, wire.Failure):
                self._failed(rank, name, answer, waiting)
            results[rank] = answer
        return results

    def _get(self, reference: Any, rank: int, name: str) -> Any:
        try:
            answer = ray.get(reference, timeout=self.timeout)
        except RayTaskError as error:
            self._failed(rank, name, wire.Failure(str(error.cause), None, None, str(error)), {})
        except RayError as error:
            self._lost(rank, name, error)
        return wire.loads(answer) if isinstance(answer, np.ndarray) else answer

    def _failed(self, rank: int, name: str, failure: wire.Failure, waiting: dict[Any, int]) -> NoReturn:
        """A rank raised. Often another one died first and this one only noticed: then that one is named."""
        if failure.traceback:
            self._name_a_dead_rank(name, waiting)
        self.close()
        if failure.traceback is None:
            raise (Failure if failure.broke else UserError)(failure.problem, fix=failure.fix, key=failure.key)
        raise RankFailure(f"trainer rank {rank} failed in {name}: {failure.problem}\n{failure.traceback}")

    def _name_a_dead_rank(self, name: str, waiting: dict[Any, int]) -> None:
        """Raises for a rank that died; one of a killed node takes two seconds to be known as dead."""
        deadline = time.monotonic() + 3.0
        while waiting and time.monotonic() < deadline:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=deadline - time.monotonic())
            for reference in ready:
                rank = waiting.pop(reference)
                try:
                    ray.get(reference)
                except RayActorError as error:
                    self._lost(rank, name, error)

    def _lost(self, rank: int, name: str, error: RayError) -> NoReturn:
        node = self._nodes[rank]
        try:
            tail = indented(node.ask("tail", str(self.log(rank)), LOG_LINES))
            what = "its process ended"
        except RayError:
            tail, what = "", f"{node.who} was lost"
        self.close()
        raise RankFailure(f"trainer rank {rank} was lost during {name}: {what}; all ranks were ended{tail}")

    def _silent(self, ranks: list[int], name: str) -> NoReturn:
        lines: list[str] = []
        try:
            for rank in ranks:
                self._nodes[rank].ask("signal", self._pids[rank], int(signal.SIGUSR1))
            time.sleep(STACK_SECONDS)
            lines = self._nodes[ranks[0]].ask("tail", str(self.log(ranks[0])), 4 * LOG_LINES)
        except (RayError, IndexError):  # its node is silent as well, or it never said where it is
            pass
        self.close()
        raise silence(ranks, name, self.timeout, "\n".join(lines))

    def _need_open(self) -> None:
        if not self._hosts:
            raise RankFailure("the trainer's ranks have been closed")

    def close(self) -> None:
        """End every rank by SIGKILL, also a stopped one; safe to call again."""
        hosts, self._hosts = self._hosts, []
        for host in hosts:
            ray.kill(host)
        if hosts:  # their GPUs and ports are free when this returns
            ray.wait([host.where.remote("") for host in hosts], num_returns=len(hosts), timeout=ANSWER_SECONDS)


def stored(message: Any) -> tuple[Any, list[Any]]:
    """(the object that holds the message, the references in it: their objects stay where they are)."""
    references: list[Any] = []
    return ray.put(np.frombuffer(wire.dumps(message, references, ray.ObjectRef), dtype=np.uint8)), references


def _packed(message: Any) -> np.ndarray:
    """As bytes that Ray shares without a copy; tensors would be pickled in line, and copied by every reader."""
    return np.frombuffer(wire.dumps(message), dtype=np.uint8)
