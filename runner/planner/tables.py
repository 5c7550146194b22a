"""The plan as tables: what goes on which GPU, what fits, what moves per step. Needs no GPU and imports no torch."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from runner.cluster.placement import Place, Placement, place, placement, placement_problems, placement_warnings
from runner.config.option import chosen, one_process
from runner.config.schema import Config
from runner.planner.fit import largest_max_tokens, what_would_fit
from runner.planner.memory import MemoryPlan, Phase, plan_memory, stream_bytes
from runner.planner.parameters import Inventory, take_inventory
from runner.planner.traffic import bf16_stream_bytes, step_flows, sync_flows
from runner.planner.workload import GIB, longest_sequence_tokens
from runner.precision.tensor_format import TensorFormat

TIGHT = 0.05  # a memory with less than this share free is called tight
SHOWN_PLACES = 16


def show(cfg: Config, console: Console | None = None) -> int:
    """Print the plan; 0 when it fits, 1 when it does not. Raises UserError for a config that has no plan."""
    console = console or make_console()
    inventory = take_inventory(cfg)
    console.print(title(cfg, inventory))
    console.print(parameters_table(cfg, inventory))
    problems = placement_problems(cfg)
    if problems:
        for problem in problems:
            console.print(f"does not fit: {problem}", style="bold red", markup=False)
        return 1
    memory = plan_memory(cfg, inventory)
    if cfg.parallelism.gpus or cfg.parallelism.rollout_gpus:
        console.print(placement_table(cfg))
    elif not one_process(cfg):
        console.print(processes_table(placement(cfg)))
    console.print(memory_table(memory))
    console.print(kv_line(memory), markup=False)
    console.print(traffic_table(cfg, inventory))
    for warning in placement_warnings(cfg) + memory_warnings(cfg, inventory, memory) + not_run_yet(cfg):
        console.print(f"note: {warning}", style="yellow", markup=False)
    return verdict(cfg, inventory, memory, console)


def make_console() -> Console:
    """Colours and width of the terminal; plain, wide lines where the output is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


def table(caption: str, *columns: str, numeric: tuple[int, ...] = ()) -> Table:
    made = Table(title=caption, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in numeric else "left", overflow="fold")
    return made


def gib(size: float) -> str:
    """Bytes for people: GiB, or MiB and KiB below a tenth."""
    for unit, scale in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(size) >= scale / 10:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def count(parameters: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.2f} {unit}"
    return f"{parameters:.0f}"


def title(cfg: Config, inventory: Inventory) -> str:
    where = f"{cfg.parallelism.gpus} GPUs" if cfg.parallelism.gpus else "the CPU"
    return (
        f"{cfg.model.name}: {count(inventory.total)} parameters, {count(inventory.active)} active per token; "
        f"precision {cfg.precision.name}; trainer {cfg.trainer.name} on {where}; rollout {cfg.rollout.name}"
    )


def parameters_table(cfg: Config, inventory: Inventory) -> Table:
    made = table("Parameters", "role", "parameters", "share", "trained as", "rolled out as", "rollout size", numeric=(1, 2, 5))
    for role, elements in inventory.by_role().items():
        groups = [g for g in inventory.groups if g.role is role]
        part = Inventory(inventory.model, tuple(groups))
        train = sorted({format_name(g.train) for g in groups})
        rollout = sorted({format_name(g.rollout) for g in groups})
        size = gib(stream_bytes(cfg, part))
        made.add_row(
            role.name, count(elements), f"{elements / inventory.total:.1%}", " + ".join(train), " + ".join(rollout), size
        )
    total, plain = stream_bytes(cfg, inventory), bf16_stream_bytes(cfg, inventory)
    made.add_row("all", count(inventory.total), "100%", "", f"{plain / total:.2f}x smaller than {gib(plain)} of bf16", gib(total))
    return made


def format_name(grid: TensorFormat) -> str:
    return f"{grid.format} g{grid.group_size}" if grid.spec.group_sizes and grid.group_size > 0 else grid.format


def placement_table(cfg: Config) -> Table:
    places = place(cfg)
    made = table(
        f"Placement ({len(places)} GPUs, rank order tp-cp-ep-dp-pp)",
        "node",
        "GPUs",
        "ranks",
        "pp",
        "dp",
        "cp",
        "tp",
        "ep",
        "engines",
    )
    for row in placement_rows(places):
        made.add_row(*row)
    return made


def processes_table(placed: Placement) -> Table:
    """Of a run on CPUs: which node starts which ranks and engines."""
    made = table("Placement (CPU)", "node", "ranks", "engines")
    for node in placed.nodes:
        made.add_row(str(node.node), ranges(rank.rank for rank in node.ranks), ranges(e.engine for e in node.engines))
    return made


def placement_rows(places: list[Place]) -> list[tuple[str, ...]]:
    """One row per GPU up to 16 GPUs; beyond that one row per node, with ranges."""
    chunks: list[list[Place]] = []
    if len(places) <= SHOWN_PLACES:
        chunks = [[p] for p in places]
    else:
        for node in sorted({p.node for p in places}):
            chunks.append([p for p in places if p.node == node])
    rows = []
    for chunk in chunks:
        trained = [p for p in chunk if p.coordinates is not None]
        at = [p.coordinates for p in trained if p.coordinates is not None]
        cells = [ranges(getattr(c, axis) for c in at) for axis in ("pp", "dp", "cp", "tp", "ep")]
        engines = ranges(p.engine for p in chunk if p.engine is not None)
        rows.append((str(chunk[0].node), ranges(p.gpu for p in chunk), ranges(p.rank for p in trained), *cells, engines))
    return rows


def ranges(values: object) -> str:
    """'0-3,8' of a collection of integers, '-' of none."""
    numbers = sorted(set(values))  # type: ignore[call-overload]
    if not numbers:
        return "-"
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def memory_table(memory: MemoryPlan) -> Table:
    made = table("Memory at its peak", "phase", "in", "needs", "of", "free", "", "what", numeric=(2, 3, 4))
    for phase in memory.phases:
        what = ", ".join(f"{name} {gib(size)}" for name, size in sorted(phase.items.items(), key=lambda item: -item[1]) if size)
        mark = "fits" if phase.fits else "TOO BIG"
        if phase.fits and phase.headroom < TIGHT * phase.capacity:
            mark = "tight"
        style = {"fits": "green", "tight": "yellow", "TOO BIG": "bold red"}[mark]
        made.add_row(
            phase.name, phase.where, gib(phase.used), gib(phase.capacity), gib(phase.headroom), f"[{style}]{mark}[/]", what
        )
    return made


def kv_line(memory: MemoryPlan) -> str:
    kv = memory.kv
    return (
        f"KV cache: {gib(kv.bytes_per_token)} per token and GPU; {kv.tokens:,} tokens per engine = {kv.sequences} sequences of "
        f"{kv.longest_tokens:,} tokens at one time ({kv.wanted_sequences} wanted)"
    )


def traffic_table(cfg: Config, inventory: Inventory) -> Table:
    made = table("What moves per step", "what", "bytes", "how", numeric=(1,))
    plain, stream = bf16_stream_bytes(cfg, inventory), stream_bytes(cfg, inventory)
    made.add_row("one copy of the weights", gib(stream), f"bf16 would be {gib(plain)}: {plain / stream:.2f}x")
    for flow in sync_flows(cfg, inventory) + step_flows(cfg, inventory):
        made.add_row(flow.what, gib(flow.size), flow.how)
    return made


def not_run_yet(cfg: Config) -> list[str]:
    found = [problem for choice in chosen(cfg) for rule in choice.option.unbuilt for problem in rule(cfg)]
    return [f"a run is refused: {error.problem}; what works: {error.fix}" for error in found]


def memory_warnings(cfg: Config, inventory: Inventory, memory: MemoryPlan) -> list[str]:
    warnings, kv, limit = [], memory.kv, cfg.trainer.max_tokens_per_gpu
    if 1 <= kv.sequences < kv.wanted_sequences and not one_process(cfg):
        warnings.append(
            f"the KV cache holds {kv.sequences} of the {kv.wanted_sequences} longest sequences that "
            "rollout.max_concurrency allows: the rest waits, or is retracted"
        )
    if memory.micro_batch_tokens > limit:
        warnings.append(
            f"a sequence may have {longest_sequence_tokens(cfg):,} tokens, more than trainer.max_tokens_per_gpu={limit:,}: "
            f"it is a micro-batch of its own, and the plan counts {memory.micro_batch_tokens:,}"
        )
    best = largest_max_tokens(cfg, inventory)
    if best and memory.fits and best >= 2 * limit:
        warnings.append(f"trainer.max_tokens_per_gpu={best} would still fit with 5% to spare and balanced experts (now {limit})")
    if best and best < limit:
        warnings.append(f"trainer.max_tokens_per_gpu={best} is the largest that leaves 5% free (now {limit})")
    return warnings


def verdict(cfg: Config, inventory: Inventory, memory: MemoryPlan, console: Console) -> int:
    if memory.fits:
        tightest = min(memory.phases, key=lambda p: p.headroom / p.capacity)
        share = tightest.headroom / tightest.capacity
        console.print(
            f"FITS: least room in {tightest.name} on {tightest.where}, {gib(tightest.headroom)} free ({share:.0%})",
            style="bold green",
            markup=False,
        )
        return 0
    worst = [p for p in memory.phases if not p.fits]
    for phase in worst:
        console.print(too_big(phase), style="bold red", markup=False)
    if memory.kv.sequences < 1:
        console.print("DOES NOT FIT: the KV cache does not hold one sequence of the longest kind", style="bold red", markup=False)
    options = what_would_fit(cfg, inventory)
    console.print("what would make it fit, each line alone:" if options else "no change of up to three knobs makes it fit")
    for option in options:
        console.print(f"    {option}", markup=False, highlight=False)
    return 1


def too_big(phase: Phase) -> str:
    name, size = max(phase.items.items(), key=lambda item: item[1])
    needs = f"{gib(phase.used)}, {gib(-phase.headroom)} too much"
    return f"DOES NOT FIT: {phase.name} on {phase.where} needs {needs}; most of it {name} ({gib(size)})"
