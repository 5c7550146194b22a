"""A conversion as a config describes it, with its progress and summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from runner.config.choices import ConvertMethod
from runner.config.rules.numbers import choices, ranges
from runner.config.schema import Config, ModelConfig, PrecisionConfig, Role
from runner.convert.engine import Report, convert
from runner.convert.grid import target_format, with_groups_of
from runner.convert.source import model_of, open_source
from runner.errors import UserError, UserErrors
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat


def run(cfg: Config, overrides: list[str]) -> int:
    """Run the conversion that `cfg.convert` and `cfg.precision` describe; prints progress and a summary. Returns 0.

    Family and sizes come from the source's own config.json, and so does a group size that `overrides` (what the user
    typed) do not name; see grid.py.
    """
    source = _required(cfg.convert.source, "source")
    target = _required(cfg.convert.target, "target")
    problems = [p for p in (*ranges(cfg), *choices(cfg)) if p.key and p.key.startswith("convert.")]
    if problems:
        raise UserErrors(problems)
    console = Console()
    model = model_of(open_source(source))
    tensor_format, chosen = with_groups_of(target_format(cfg), model, cfg.precision, overrides)
    if chosen:
        console.print(chosen, highlight=False)
    if cfg.convert.method == ConvertMethod.gptq:
        return _gptq(cfg, source, target, tensor_format, console)
    with ThroughputBar(console, source) as bar:
        report = convert(
            source,
            target,
            tensor_format,
            roles_of(cfg.precision),
            workers=cfg.convert.workers,
            progress=bar.advance,
        )
    print_summary(report, console)
    return 0


def _gptq(cfg: Config, source: Path, target: Path, tensor_format: TensorFormat, console: Console) -> int:
    from runner.convert.gptq import convert_gptq

    report, calibration = convert_gptq(
        source,
        target,
        tensor_format,
        roles_of(cfg.precision),
        cfg.convert,
        console=console,
    )
    print_summary(report, console)
    console.print(calibration.summary())
    return 0


def _required(path: str | None, name: str) -> Path:
    if not path:
        raise UserError(f"convert needs a {name} folder", key=f"convert.{name}", fix=f"{name}=<folder>")
    return Path(path).expanduser()


def roles_of(precision: PrecisionConfig) -> Callable[[ModelConfig], frozenset[Role]]:
    return lambda model: quantized_roles(model, precision)


class _GigabytesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed / 1e9:.2f} GB/s" if task.speed else "- GB/s")


class ThroughputBar:
    """A bar with GB/s of source bytes on a terminal, one line per shard elsewhere."""

    def __init__(self, console: Console, source: Path) -> None:
        self.console = console
        opened = open_source(source)
        self._left = dict.fromkeys(opened.shards, 0)
        for tensor in opened.tensors.values():
            self._left[tensor.shard] += tensor.num_bytes
        self._shards = len(self._left)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _GigabytesPerSecond(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("converting", total=opened.num_bytes)
        self._current = ""

    def __enter__(self) -> ThroughputBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, shard: str, num_bytes: int) -> None:
        """Called from worker threads."""
        self._bar.update(self._task, advance=num_bytes, description=shard)
        if shard != self._current:
            self._current = shard
            if not self.console.is_terminal:
                self.console.print(f"converting {shard}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def print_summary(report: Report, console: Console) -> None:
    """Weights by role and format, the size before and after, and the speed."""
    table = Table("weights", "count", "before", "after", title=f"{report.target}")
    for key, (count, before, after) in sorted(report.layers.items()):
        table.add_row(key, str(count), _size(before), _size(after))
    counts = [sum(column) for column in zip(*report.layers.values(), strict=True)]
    table.add_row("total", str(counts[0]), _size(counts[1]), _size(counts[2]), style="bold")
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
    if report.resumed:
        console.print(f"{report.resumed} shards were converted before and kept")
    console.print(f"{_size(report.read_bytes)} in {report.seconds:.1f} s: {report.gigabytes_per_second:.2f} GB/s")
