"""How large a node's object store must be: the routes of a step lie in it, until its ranks have trained on them."""

from __future__ import annotations

from runner.config.choices import Schedule
from runner.config.schema import Config
from runner.planner.workload import route_bytes_per_step

LEAST_BYTES = 384 << 20  # batches, weights of a node that came later, and what Ray itself keeps


def needed_bytes(cfg: Config) -> int:
    """Of each node. Routes lie where they were decoded, and once more where the ranks are that fetched them; engines that run
    ahead make those of later steps meanwhile. Ray writes what does not fit to disk, which is slow and no error."""
    schedule = cfg.algorithm.schedule
    ahead = cfg.algorithm.max_staleness if schedule == Schedule["async"] else int(schedule == Schedule.one_step_off)
    return LEAST_BYTES + 2 * route_bytes_per_step(cfg) * (1 + ahead) // cfg.cluster.nodes
