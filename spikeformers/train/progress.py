"""What a person sees while training: a live bar on a terminal, plain lines anywhere else, nothing without a console."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A context: `step` moves the bar, `line` prints a finished epoch above it. `unit`: what the network is given."""

    def __init__(self, console: Console | None, *, steps: int, done: int = 0, unit: str = "images"):
        self.console = console
        self.unit = unit
        self.bar = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            self.bar = Progress(*columns, console=console, transient=True, expand=True)
            self.task = self.bar.add_task("train", total=steps, completed=done, epoch="", metrics="")

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()

    def step(self, *, epoch: str, loss: float, rate: float, speed: float) -> None:
        """One optimiser step is done. `loss` is the epoch's mean so far, `speed` in units per second."""
        if self.bar is not None:
            metrics = f"loss {loss:.3f}  lr {rate:.1e}  {speed:.0f} {self.unit}/s"
            self.bar.update(self.task, advance=1, epoch=epoch, metrics=metrics)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
