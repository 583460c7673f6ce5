"""What a person sees: a live progress line on a terminal, plain lines elsewhere, tables, errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from advtrain.runs.folder import RunFolder
from tuning.text import duration

if TYPE_CHECKING:
    from advtrain.evaluation import Progress

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

#: Seconds between plain progress lines within an epoch, where there is no terminal.
PLAIN_S = 30.0


class ProgressView:
    """Shows a run's progress from its folder, wherever the training itself runs."""

    def __init__(self, run: RunFolder, live: Live | None) -> None:
        self.run, self.live = run, live
        self.epochs_shown = len(run.metrics())
        self.remarks_shown: set[str] = set()
        self.last_plain = time.monotonic()

    def tick(self) -> None:
        """Show what is new."""
        progress = self.run.progress()
        for remark in (progress or {}).get("remarks", []):
            if remark not in self.remarks_shown:
                self.remarks_shown.add(remark)
                console.print(Text(f"note: {remark}", style="yellow"))
        lines = self.run.metrics()
        for line in lines[self.epochs_shown :]:
            console.print(Text(_epoch_line(line, progress)))
            self.last_plain = time.monotonic()
        self.epochs_shown = max(self.epochs_shown, len(lines))
        if progress is None or progress["epoch"] <= self.epochs_shown:
            return
        if self.live is not None:
            self.live.update(Text(_progress_line(progress), style="cyan"))
        elif time.monotonic() - self.last_plain >= PLAIN_S:
            self.last_plain = time.monotonic()
            console.print(Text(_progress_line(progress)))


@contextmanager
def progress_view(run: RunFolder) -> Iterator[ProgressView]:
    """Show the run's progress while inside."""
    if not console.is_terminal:
        yield ProgressView(run, None)
        return
    with Live(
        Text("starting ...", style="cyan"), console=console, transient=True, refresh_per_second=4
    ) as live:
        yield ProgressView(run, live)


@contextmanager
def evaluation_view() -> Iterator[Progress]:
    """Yield what shows how far an evaluation is: one live line on a terminal, now and then a line elsewhere."""
    live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None
    last = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal last
        text = Text(f"{name}: {done} of {total} blocks", style="cyan")
        if live is not None:
            live.update(text)
        elif time.monotonic() - last >= PLAIN_S:
            last = time.monotonic()
            console.print(text)

    with live if live is not None else nullcontext():
        yield show


def _progress_line(p: dict[str, Any]) -> str:
    return (
        f"epoch {p['epoch']}/{p['epochs']}  step {p['step']}/{p['steps']}  {p['samples_per_s']:,.0f} samples/s"
        f"  loss {p['loss']:.4f}{_validation(p['validation'])}  {duration(p['seconds_left'])} left"
    )


def _epoch_line(line: dict[str, Any], progress: dict[str, Any] | None) -> str:
    total = f"/{progress['epochs']}" if progress else ""
    return (
        f"epoch {line['epoch']}{total}  {line['samples_per_s']:,.0f} samples/s  loss {line['train_loss']:.4f}"
        f"{_validation(line)}  {line['epoch_seconds']:.1f} s"
    )


def _validation(line: dict[str, Any]) -> str:
    """Return the validation figures of an epoch, where it has any."""
    if "val_robust_mae" in line:
        text = f"  val MAE clean {line['val_clean_mae']:.4g} worst {line['val_robust_mae']:.4g}"
        if "val_average_robust_mae" in line:
            text += f"  average {line['val_average_robust_mae']:.4g}"
        return text
    if "val_robust_accuracy" not in line:
        return ""
    clean, robust = (100 * line[f"val_{kind}_accuracy"] for kind in ("clean", "robust"))
    text = f"  val clean {clean:.1f} % robust {robust:.1f} %"
    if "val_average_robust_accuracy" in line:
        text += f"  average {100 * line['val_average_robust_accuracy']:.1f} %"
    return text


def warn(remark: str) -> None:
    """Print a remark on what is allowed but probably not meant."""
    console.print("[yellow]warning:[/]", Text(remark))


def table(title: str, columns: list[str], rows: list[list[str]], *, fold: bool = False) -> None:
    """Print a table; the first column is left-aligned, the others right, or with `fold` left and broken into lines."""
    view = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        left = number == 0 or fold
        view.add_column(column, justify="left" if left else "right", no_wrap=not fold, overflow="fold")
    for row in rows:
        view.add_row(*(Text(cell) for cell in row))  # and no markup, whatever a path or a reason holds
    console.print(view)
