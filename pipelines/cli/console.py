"""Terminal output: a live progress line or plain lines, tables, and JSON."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from advtrain.documents import dump_json
from advtrain.errors import UserError
from advtrain.events import Event, Message, Output, TrainingTick
from advtrain.runs.folder import RunFolder, write_atomically
from advtrain.text import printable
from tuning.text import duration


class SafeConsole(Console):
    """Console that drops control characters from text: names and reasons come from other people."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on: the work goes on, as in `advtrain train | head -n 1`."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """Return the printable text with its styles."""
        return super().render_str(printable(text), **kwargs)


#: Paths and names are printed as they are: no markup such as [b], no emoji such as :b:.
console = SafeConsole(
    highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120
)

#: Style of a message by its level.
STYLES = {"info": "", "note": "yellow", "warning": "yellow", "success": "green", "error": "red"}
#: Seconds between plain progress lines within an epoch, used without a terminal.
PLAIN_S = 30.0


class RunView:
    """Display of a run's progress, read from its folder; training may run anywhere."""

    def __init__(self, run: RunFolder, live: Live | None) -> None:
        self.run, self.live = run, live
        self.stale = run.progress()  # of an earlier attempt, until the workers of a resumed run write theirs
        self.epochs_shown = len(run.metrics())
        self.remarks_shown: set[str] = set()
        self.last_plain = time.monotonic()

    def tick(self) -> None:
        """Print new remarks and epochs, and update the progress line."""
        progress = self.run.progress()
        if progress == self.stale:
            progress = None
        for remark in (progress or {}).get("remarks", []):
            if remark not in self.remarks_shown:
                self.remarks_shown.add(remark)
                console.print(Text(printable(f"note: {remark}"), style="yellow"))
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


class ConsoleProgress:
    """Printer of a job's events: a live line on a terminal, else plain lines.

    With `quiet` it prints warnings, errors and the output of jobs only.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, live = quiet, console.is_terminal and not quiet
        self._live = Live(console=console, transient=True, refresh_per_second=4) if live else None
        self._views: dict[Path, RunView] = {}
        self._last_tick = time.monotonic()
        self._long = False  # whether the time left of a long evaluation was printed
        self._unfinished = ""  # last line of a job's output

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._unfinished:
            console.print(self._unfinished)
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Print one event."""
        important = isinstance(event, Output) or (
            isinstance(event, Message) and event.level in ("warning", "error")
        )
        if self._quiet and not important:
            return
        if isinstance(event, Message):
            prefix = "warning: " if event.level == "warning" else ""
            start, text = ("\n", event.text[1:]) if event.text.startswith("\n") else ("", event.text)
            if self._live is not None:
                self._live.update("")  # clear the last progress line
            console.print(Text(printable(f"{start}{prefix}{text}"), style=STYLES[event.level]))
            self._last_tick = time.monotonic()
        elif isinstance(event, TrainingTick):
            if event.run.path not in self._views:
                self._views[event.run.path] = RunView(event.run, self._live)
            self._views[event.run.path].tick()
        elif isinstance(event, Output):
            # Print whole lines only: the live line would overwrite an unfinished one.
            *lines, self._unfinished = (self._unfinished + event.text).split("\n")
            for line in lines:
                console.print(line)
        else:
            left = event.seconds_left
            text = f"{event.name}: {event.done} of {event.total} blocks"
            text += "" if not left else f", attacks: about {duration(left)} left"
            is_long = not self._long and left is not None and left > PLAIN_S
            if self._live is not None and not is_long:
                self._live.update(Text(text, style="cyan"))
            elif is_long or time.monotonic() - self._last_tick >= PLAIN_S:
                self._long, self._last_tick = self._long or is_long, time.monotonic()
                console.print(Text(text))


def _progress_line(p: dict[str, Any]) -> str:
    return (
        f"epoch {p['epoch']}/{p['epochs']}  step {p['step']}/{p['steps']}  {p['samples_per_s']:,.0f} samples/s"
        f"{_loss(p['loss'])}{_validation(p['validation'])}  {duration(p['seconds_left'])} left"
    )


def _epoch_line(line: dict[str, Any], progress: dict[str, Any] | None) -> str:
    total = f"/{progress['epochs']}" if progress else ""
    return (
        f"epoch {line['epoch']}{total}  {line['samples_per_s']:,.0f} samples/s{_loss(line['train_loss'])}"
        f"{_validation(line)}  {line['epoch_seconds']:.1f} s"
    )


def _loss(loss: float | None) -> str:
    return "  loss not finite" if loss is None else f"  loss {loss:.4f}"


def _validation(line: dict[str, Any]) -> str:
    """Return the validation metrics of an epoch as text; empty if it has none."""
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


def table(title: str, columns: list[str], rows: list[list[str]], *, fold: bool = False) -> None:
    """Print a table with a left-aligned first column and right-aligned other columns.

    With `fold`, all columns are left-aligned and long cells are wrapped.
    """
    view = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    for number, column in enumerate(columns):
        left = number == 0 or fold
        view.add_column(column, justify="left" if left else "right", no_wrap=not fold, overflow="fold")
    for row in rows:
        view.add_row(*(Text(printable(cell)) for cell in row))  # Text: paths and reasons are not markup
    console.print(view)


def write_json(file: Path | None, value: Any) -> None:
    """Write a value as JSON to a file.

    The file "-" is standard output. If `file` is None, nothing is written.

    Raises:
        UserError: the file cannot be written.
    """
    if file is None:
        return
    text = dump_json(value, indent=1) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()  # a closed pipe raises here, where it is handled
        return
    try:
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror}") from error
