"""How far a batch is, on standard error while that is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokenloop.runner.generation import BatchGeneration

INTERVAL_S = 0.1


class Progress:
    """One line: requests that are finished, of how many, and the speed."""

    def __init__(self, total: int):
        # rich takes longer to import than a small artifact takes to load.
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        done = TextColumn("{task.completed}/{task.total} requests")
        columns = done, BarColumn(), TextColumn("{task.fields[speed]}")
        # Standard output may be a file, and is never rich's to write.
        self._bar = RichProgress(
            *columns, console=Console(stderr=True), transient=True, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, speed="")
        self._shown_at = 0.0

    def show(self, batch: BatchGeneration) -> None:
        """Show the state of `batch`, if that was not done just now."""
        now = time.perf_counter()
        if now - self._shown_at < INTERVAL_S:
            return
        self._shown_at, stats = now, batch.stats
        done = sum(result.finish_reason is not None for result in batch.results)
        speed = f"{stats.decode_tok_s:.1f} tok/s" if stats.decode_tok_s else ""
        self._bar.update(self._task, completed=done, speed=speed)
        self._bar.start()
        self._bar.refresh()

    def hide(self) -> None:
        """Make way for other output."""
        self._bar.stop()


@contextmanager
def progress(total: int, is_shown: bool = True) -> Iterator[tuple[Callable, Callable]]:
    """The functions `show` and `hide` of a Progress, or ones that do nothing where nobody sees, or
    nothing `is_shown`."""
    if not is_shown or not sys.stderr.isatty():
        yield (lambda batch: None), (lambda: None)
        return
    bar = Progress(total)
    try:
        yield bar.show, bar.hide
    finally:
        bar.hide()
