"""report.html: one self-contained file per run, and a comparison of several runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from runner.errors import UserError
from runner.storage import atomic_write
from runner.tracking import page, pictures, seeds, timeline
from runner.tracking.base import STEP_PARTS
from runner.tracking.charts import NUM_COLORS, Series, line_chart, stacked_bars
from runner.tracking.folder import event_problem, leaves, read_jsonl, read_metrics, read_status, rollout_files, run_state

KEY_STEPS = 5  # steps at the start and at the end over which the key results are means
SHOWN_SAMPLE_STEPS = 4
SHOWN_SAMPLES = 3  # per shown step
ALARMS = "watch_"  # how the kinds of events begin that a watch rule makes


@dataclass(frozen=True)
class Chart:
    """What one card shows. Metrics are shell patterns; see `matching`."""

    title: str
    metrics: tuple[str, ...]
    hint: str = ""
    stacked: bool = False
    min_series: int = 1  # fewer say nothing that another card does not
    unless_zero: bool = False  # a card that is only worth its place when something happened
    smoothed: bool = False


EVALS = ("eval/*", "!eval/*_response_len")
CHARTS = (
    Chart("Reward and evaluation", ("rollout/raw_reward", *EVALS), "mean over samples", smoothed=True),
    Chart("Parts of the reward", ("reward/*",), "weighted, mean over samples", smoothed=True),
    Chart("Turns", ("rollout/turns/*", "rollout/observation_tokens"), "of a conversation"),
    Chart("Conversations that failed", ("rollout/failed*",), "left out of training", unless_zero=True),
    Chart(
        "Train-rollout mismatch",
        ("train/train_rollout_logprob_abs_diff",),
        "mean |logprob difference| per sampled token",
        smoothed=True,
    ),
    Chart("Train-rollout KL", ("train/train_rollout_kl_k1", "train/train_rollout_kl_k3"), "per token"),
    Chart(
        "Where the mismatch comes from",
        ("mismatch/quantization", "mismatch/routing", "mismatch/numerics"),
        "mean per token; the parts add up",
        stacked=True,
    ),
    Chart(
        "Size of each part",
        ("mismatch/quantization_abs", "mismatch/routing_abs", "mismatch/numerics_abs", "mismatch/total_abs"),
        "mean |difference| per token",
    ),
    Chart(
        "Mismatch by staleness",
        ("train/train_rollout_logprob_abs_diff/lag_*",),
        "by optimizer steps since the token's weights",
        min_series=2,
    ),
    Chart("Probe", ("probe/logprob_abs_diff",), "mean |logprob difference| on fixed prompts, own routes", smoothed=True),
    Chart(
        "Response length",
        ("rollout/response_len/mean", "rollout/response_len/max", "eval/*_response_len"),
        "tokens",
        smoothed=True,
    ),
    Chart("Truncated and zero-variance", ("rollout/truncated_ratio", "rollout/zero_std"), "share"),
    Chart(
        "Time per step",
        STEP_PARTS,
        "seconds",
        stacked=True,
    ),
    Chart("Throughput", ("perf/tokens_per_gpu_per_sec", "perf/tokens_per_sec"), "tokens/s"),
    Chart("Speculation", ("rollout/spec_accept_length", "rollout/spec_accept_rate"), "tokens per engine step; accepted share"),
    Chart("Entropy", ("train/entropy_loss",), "nats per token", smoothed=True),
    Chart("Gradient norm", ("train/grad_norm",), "before clipping", smoothed=True),
    Chart("Skipped steps", ("train/nan_steps",), "updates whose loss or gradient was not finite", unless_zero=True),
    Chart("Clipping", ("train/pg_clipfrac", "train/tis_clipfrac"), "share of tokens"),
    Chart("Changed by the update", ("sync/changed_integers", "sync/changed_scales"), "share of integers and scales per sync"),
    Chart("Router disagreement", ("router_replay/disagreement",), "share of choices the trainer's own top-k would change"),
)

# Comparisons: one metric per card, one curve per run.
COMPARED = (
    ("Reward", "rollout/raw_reward"),
    ("Train-rollout mismatch", "train/train_rollout_logprob_abs_diff"),
    ("Train-rollout KL (k3)", "train/train_rollout_kl_k3"),
    ("Response length", "rollout/response_len/mean"),
    ("Truncated", "rollout/truncated_ratio"),
    ("Entropy", "train/entropy_loss"),
    ("Gradient norm", "train/grad_norm"),
    ("Integers changed", "sync/changed_integers"),
    ("Router disagreement", "router_replay/disagreement"),
    ("Accepted length", "rollout/spec_accept_length"),
    ("Rollout time", "perf/rollout_time"),
    ("Train time", "perf/train_time"),
    ("Step time", "perf/step_time"),
)


@dataclass
class RunData:
    """A run's folder, read."""

    folder: Path
    state: str
    status: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, float]]
    events: list[dict[str, Any]]
    samples: list[tuple[int, dict[str, Any]]]
    timeline: list[tuple[int, list[timeline.Span]]]

    @property
    def name(self) -> str:
        return self.folder.name

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of the steps that have this metric; steps counted from 1, as the console does."""
        return [(row["step"] + 1, row[metric]) for row in self.metrics if metric in row]

    def names(self) -> list[str]:
        """Every metric, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if key != "step"))


def read_run(folder: Path) -> RunData:
    """Raises UserError where the folder is no run."""
    if not (folder / "metrics.jsonl").exists() and not (folder / "status.json").exists():
        raise UserError(f"{folder} is not a run's folder: it has neither metrics.jsonl nor status.json", fix="ls outputs")
    steps = rollout_files(folder)
    if len(steps) > SHOWN_SAMPLE_STEPS:  # first, last and evenly between
        steps = [steps[round(i * (len(steps) - 1) / (SHOWN_SAMPLE_STEPS - 1))] for i in range(SHOWN_SAMPLE_STEPS)]
    return RunData(
        folder=folder,
        state=run_state(folder),
        status=_status(folder),
        config=_mapping(folder / "resolved.yaml", yaml.safe_load),
        environment=_mapping(folder / "environment.json", json.loads),
        metrics=read_metrics(folder),
        events=read_jsonl(folder / "events.jsonl", event_problem),
        samples=[(step, with_images(path.parent, step, row)) for step, path in steps for row in read_jsonl(path)[:SHOWN_SAMPLES]],
        timeline=timeline.read(folder),
    )


def with_images(rollouts: Path, step: int, row: dict[str, Any]) -> dict[str, Any]:
    """A kept sample's row with its images in it, for a page that needs no other file."""
    files = pictures.of_row(rollouts, step, row)
    return row | {"images": [pictures.data_uri(file) for file in files]} if files else row


def _status(folder: Path) -> dict[str, Any]:
    """{} where status.json is damaged: the state then says "unknown"."""
    try:
        return read_status(folder) or {}
    except UserError:
        return {}


def _mapping(path: Path, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    """A file that is a mapping; {} where there is none, UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        found = parse(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}", fix="remove that file") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is no mapping", fix="remove that file")
    return found


# ---- key results


def tail_mean(run: RunData, metric: str) -> float | None:
    """Mean of the last KEY_STEPS finite values; None where the metric was never logged."""
    values = [y for _, y in run.points(metric) if math.isfinite(y)][-KEY_STEPS:]
    return sum(values) / len(values) if values else None


def best_eval(run: RunData) -> tuple[str, float] | None:
    """The highest evaluation and its metric; the first evaluation metric of the run where there are several."""
    names = matching(run.names(), EVALS)
    values = [y for _, y in run.points(names[0]) if math.isfinite(y)] if names else []
    return (names[0], max(values)) if values else None


def key_results(run: RunData) -> dict[str, float]:
    """What a summary table shows of a run: reward, eval, mismatch, step_time, seconds. Missing ones are left out."""
    results: dict[str, float] = {}
    for key, metric in (
        ("reward", "rollout/raw_reward"),
        ("mismatch", "train/train_rollout_logprob_abs_diff"),
        ("step_time", "perf/step_time"),
    ):
        value = tail_mean(run, metric)
        if value is not None:
            results[key] = value
    best = best_eval(run)
    if best is not None:
        results["eval"] = best[1]
    if "active_seconds" in run.status:
        results["seconds"] = run.status["active_seconds"]
    return results


def tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(title, number, note) of the boxes on top of the page."""

    def number(value: float) -> str:
        return page.format_number(value, digits=3)

    boxes = []
    rewards = [y for _, y in run.points("rollout/raw_reward") if math.isfinite(y)]
    if rewards:
        first = sum(rewards[:KEY_STEPS]) / len(rewards[:KEY_STEPS])
        boxes.append(("Reward", number(sum(rewards[-KEY_STEPS:]) / len(rewards[-KEY_STEPS:])), f"from {number(first)}"))
    best = best_eval(run)
    if best is not None:
        boxes.append(("Best evaluation", number(best[1]), best[0].removeprefix("eval/")))
    for title, metric, note in (
        ("Mismatch", "train/train_rollout_logprob_abs_diff", "|Δ logprob| per token"),
        ("Response length", "rollout/response_len/mean", "tokens"),
        ("Accepted length", "rollout/spec_accept_length", "tokens per engine step"),
        ("Integers changed", "sync/changed_integers", "share per sync"),
        ("Step time", "perf/step_time", "seconds"),
    ):
        value = tail_mean(run, metric)
        if value is not None:
            boxes.append((title, number(value), note))
    return boxes


# ---- one run


def matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The metrics that any of the shell patterns names, in the patterns' order; `!pattern` takes metrics out again."""
    found = [name for pattern in patterns for name in names if fnmatchcase(name, pattern)]
    dropped = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return [name for name in dict.fromkeys(found) if not any(fnmatchcase(name, pattern) for pattern in dropped)]


def short_label(name: str) -> str:
    """What the legend says: the name without what the card's title says already."""
    text = name.split("/", 1)[-1].removeprefix("train_rollout_").removeprefix("response_len/").removesuffix("_abs")
    return text.replace("/", " ").replace("_", " ")


def draw_chart(run: RunData, chart: Chart, metrics: list[str]) -> str:
    labels = [short_label(name) for name in metrics]
    labels = [label if labels.count(label) == 1 else name for label, name in zip(labels, metrics, strict=True)]
    series = [
        Series(label, run.points(name), i % NUM_COLORS) for i, (label, name) in enumerate(zip(labels, metrics, strict=True))
    ]
    if chart.stacked:
        rows = [row for row in run.metrics if any(name in row for name in metrics)]
        series = [  # every part at every step, or thinning would tear the bars apart
            Series(s.label, [(row["step"] + 1, row.get(name, 0.0)) for row in rows], s.color)
            for s, name in zip(series, metrics, strict=True)
        ]
        if chart.title == "Time per step" and run.points("perf/step_time"):
            series.append(Series("rest", unaccounted_time(run, metrics), NUM_COLORS - 1))
        return stacked_bars(chart.title, series, hint=chart.hint)
    return line_chart(chart.title, series, hint=chart.hint, smoothed=chart.smoothed)


def unaccounted_time(run: RunData, parts: list[str]) -> list[tuple[float, float]]:
    """What of perf/step_time none of `parts` accounts for."""
    rows = [row for row in run.metrics if "perf/step_time" in row]
    return [(row["step"] + 1, max(0.0, row["perf/step_time"] - sum(row.get(part, 0.0) for part in parts))) for row in rows]


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from what the folder holds now; returns its path."""
    run = read_run(run_dir)
    path = run_dir / "report.html"
    atomic_write(path, page.document(run.name, body_of(run)))
    return path


def body_of(run: RunData, *, live: str = "") -> str:
    """What a page shows of a run. `live`: HTML that stands below the key results of a page that is drawn while the run goes on,
    where alarms come first, newest on top."""
    names = run.names()
    cards, used = [], {"perf/step_time"}
    for chart in CHARTS:
        metrics = matching(names, chart.metrics)
        used.update(metrics)
        happened = any(y != 0 for name in metrics for _, y in run.points(name))
        if len(metrics) >= chart.min_series and (happened or not chart.unless_zero):
            cards.append(draw_chart(run, chart, metrics))
    rest = [line_chart(name, [Series(short_label(name), run.points(name), 0)]) for name in names if name not in used]
    alarms = [row for row in run.events if row["kind"].startswith(ALARMS)] if live else []
    body = [
        page.header(run.name, run.state, config_line(run.config), page.facts(run.status, run.config, len(run.metrics))),
        page.tiles(tiles(run)),
        page.alarms(alarms[::-1]),
        live,
        page.events([row for row in run.events if row not in alarms]),
        timeline.draw(run.timeline),
        page.grid(cards),
        page.samples(run.samples),
        page.details(f"{len(rest)} more metrics", page.grid(rest)) if rest else "",
        page.details("Configuration", page.preformatted(yaml.safe_dump(run.config, sort_keys=False))) if run.config else "",
        page.details("Environment", page.preformatted(yaml.safe_dump(run.environment, sort_keys=False)))
        if run.environment
        else "",
    ]
    return "".join(body)


def config_line(config: dict[str, Any]) -> list[str]:
    """The names of the groups that say what the run is about."""
    groups = ("model", "precision", "algorithm", "task", "trainer", "rollout", "router_replay", "speculative", "cluster")
    named = ((group, config.get(group)) for group in groups)
    return [f"{group}={part['name']}" for group, part in named if isinstance(part, dict) and "name" in part]


# ---- several runs


def _values(run: RunData) -> dict[str, Any]:
    """Config key -> value; groups of keys that are empty have none."""
    return {key: value for key, value in leaves(run.config) if value != {}}


def differing_keys(runs: list[RunData]) -> list[str]:
    """Config keys whose values are not the same in all runs; those that always differ, and seeds that are the run's seed
    everywhere (task.seed), are left out."""
    tables = [_values(run) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    ignored = {"run_name", "resume", "outputs_dir"}
    ignored |= {key for key in keys if key.endswith(".seed") and all(table.get(key) == table.get("seed") for table in tables)}
    return [key for key in keys if key not in ignored and len({json.dumps(table.get(key)) for table in tables}) > 1]


def run_labels(runs: list[RunData]) -> list[str]:
    """Folder names, made unique by the parent's name where needed."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}" for run in runs]


def write_comparison(folders: list[Path], path: Path, title: str) -> Path:
    """One page over several runs: a table of what differs and what came out, and curves laid over each other. Where settings have
    several seeds: which one won, whether that is significant, and curves of their means with 95% intervals."""
    runs = [read_run(folder) for folder in folders]
    labels = run_labels(runs)
    keys = differing_keys(runs)
    columns = ["run", "state", *keys, "reward", "best eval", "mismatch", "step s", "total s"]
    rows = []
    for label, run in zip(labels, runs, strict=True):
        results, table = key_results(run), _values(run)
        numbers = [results.get(key) for key in ("reward", "eval", "mismatch", "step_time", "seconds")]
        cells = [page.format_number(number) if number is not None else "" for number in numbers]
        rows.append([label, run.state, *(str(table.get(key, "")) for key in keys), *cells])
    evals = dict.fromkeys(name for run in runs for name in matching(run.names(), EVALS))
    settings = by_setting(runs, labels, keys)
    cards = []
    for caption, metric in (*COMPARED[:1], *((name, name) for name in evals), *COMPARED[1:]):
        series = []
        for i, (label, group) in enumerate(settings.items()):
            points, band = seeds.mean_curve([run.points(metric) for run in group])
            points = group[0].points(metric) if len(group) == 1 else points
            series.append(Series(label, points, i % NUM_COLORS, band))
        if any(s.points for s in series):
            said = [metric] if caption != metric else []
            said += ["mean over seeds, 95% interval"] if any(s.band for s in series) else []
            cards.append(line_chart(caption, series, hint="; ".join(said), smoothed=True))
    won = which_won(settings) if any(key != "seed" for key in keys) else ""
    body = page.header(title, "", [f"{len(runs)} runs"], []) + won + page.table(columns, rows) + page.grid(cards)
    atomic_write(path, page.document(title, body))
    return path


def by_setting(runs: list[RunData], labels: list[str], keys: list[str]) -> dict[str, list[RunData]]:
    """Runs that differ in `seed` alone, by what the settings differ in; every run by itself where that is nothing."""
    told = [key for key in keys if key != "seed"]
    if not told:
        return {label: [run] for label, run in zip(labels, runs, strict=True)}
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        table = _values(run)
        groups.setdefault("  ".join(f"{key}={table.get(key)}" for key in told), []).append(run)
    if len(groups) == len(runs):  # a seed each: they keep their names
        return {label: [run] for label, run in zip(labels, runs, strict=True)}
    return groups


def which_won(settings: dict[str, list[RunData]]) -> str:
    """The answer of a sweep: a sentence, and a row per setting. Only completed runs count."""
    done = {label: [run for run in group if run.state == "completed"] for label, group in settings.items()}
    names = [matching(run.names(), EVALS) for group in done.values() for run in group]
    shared = [name for name in names[0] if all(name in other for other in names)] if names else []
    metric = shared[0] if shared else "rollout/raw_reward"
    found = {label: tuple(v for run in group if (v := tail_mean(run, metric)) is not None) for label, group in done.items()}
    results = {label: values for label, values in found.items() if values}
    if not results:
        return page.text("Which setting won", "No setting has a completed run.")
    order = seeds.compared(results)
    said = seeds.verdict(order, f"{metric} (last {KEY_STEPS} values of a run)")
    if left_out := sum(map(len, settings.values())) - sum(map(len, results.values())):
        said += f" {left_out} run(s) that did not complete or have no such metric do not count."
    rows = []
    for setting in order:
        bounds = seeds.interval(setting.values)
        told = " to ".join(page.format_number(bound) for bound in bounds) if bounds else "one seed"
        p = "" if setting is order[0] else "not tested" if setting.p is None else page.format_number(setting.p, 2)
        rows.append([setting.label, str(len(setting.values)), page.format_number(setting.mean), told, p])
    return page.text("Which setting won", said) + page.table(
        ["setting", "seeds", "mean", "95% interval", "p against the first"], rows
    )


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts group_size=32 before group_size=128."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def find_runs(target: str) -> list[Path]:
    """The run folder that `target` names (a path, or a name under outputs/), or every job of a sweep's folder."""
    for folder in (Path(target), Path("outputs") / target):
        if (folder / "metrics.jsonl").exists() or (folder / "status.json").exists():
            return [folder]
        jobs = sorted((path.parent for path in folder.glob("*/metrics.jsonl")), key=natural_order) if folder.is_dir() else []
        if jobs:
            return jobs
    raise UserError(f"no run named {target!r}", fix="give a run's folder, for example outputs/<run>")
