"""A bar with the time left for whatever takes longer than a few seconds; in a log a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float], None]
"""Takes how much more is done."""
LINE_EVERY_S = 30.0  # where there is no terminal


@contextmanager
def progress_bar(label: str, total: float, console: Console | None = None) -> Iterator[Advance]:
    """Show how far something is while the ``with`` lasts.

    On a terminal a bar that is gone afterwards, below another one that may be shown already; elsewhere a line every
    LINE_EVERY_S seconds, so that what is short says nothing.

    Args:
        label: what is counted, e.g. "evaluation, episodes".
        total: of them in all, above 0.
        console: the one that other bars are on; None is rich's own, which every command uses.

    Yields:
        What takes how many more are done.
    """
    console = console or rich.get_console()
    if not console.is_terminal:
        yield _lines(label, total, console)
        return
    columns = (
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=None),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)


def _lines(label: str, total: float, console: Console) -> Advance:
    start = said = time.monotonic()
    done = 0.0

    def advance(more: float) -> None:
        nonlocal said, done
        done, now = done + more, time.monotonic()
        if now - said >= LINE_EVERY_S and done < total:
            said = now
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            text = f"{label}: {done:,.0f} of {total:,.0f}, {timedelta(seconds=round(now - start))} so far, ETA {left}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    return advance
