"""A bar with the time left for whatever takes longer than a few seconds; in a log a line now and then.

Bars nest: one that is begun while another is shown stands below it, as long as both are on the same console.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import rich
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 30.0  # where there is no terminal
SHOW_AFTER_S = 1.0  # a bar that comes and goes within a second only flickers
SPEED_OVER_S = 600.0  # what the time left is judged by: a minibatch of a large policy takes half a minute


class Advance(Protocol):
    """Takes how much more is done."""

    def __call__(self, more: float, status: str = "") -> None:
        """``status``: what to say of it from now on, such as "12 of 14 lifted"; empty leaves what was said."""


@contextmanager
def progress_bar(label: str, total: float, console: Console | None = None, done: float = 0.0) -> Iterator[Advance]:
    """Show how far something is while the ``with`` lasts.

    On a terminal that can redraw a bar that is gone afterwards, below another one that may be shown already; elsewhere
    a line every LINE_EVERY_S seconds, so that what is short says nothing.

    Args:
        label: what is counted, e.g. "evaluation, episodes".
        total: of them in all.
        console: the one that other bars are on; None is rich's own, which every command uses.
        done: of them, before now.

    Yields:
        What takes how many more are done.
    """
    console = console or rich.get_console()
    if not console.is_interactive:
        yield _lines(label, total, console, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with _LateBar(*columns, console=console, transient=True, speed_estimate_period=SPEED_OVER_S) as bar:
        task = bar.add_task(label, total=total, completed=int(done), status="")
        bar.advance(task, 0)  # so that the first part's time counts

        def advance(more: float, status: str = "") -> None:
            bar.update(task, advance=more)
            if status:
                bar.update(task, status=status)

        yield advance


def tracked[Thing](things: Iterable[Thing], label: str, total: float | None = None) -> Iterator[Thing]:
    """``things``, with a bar that moves when each is done with.

    Args:
        things: to go through.
        label: as of ``progress_bar``.
        total: how many there are; None asks ``things``.
    """
    if total is None:
        assert isinstance(things, Sized)
        total = len(things)
    with progress_bar(label, total) as advance:
        for thing in things:
            yield thing
            advance(1)


@contextmanager
def spinner(label: str, console: Console | None = None) -> Iterator[None]:
    """Say on a terminal that something of unknown length goes on, and for how long it has; nothing elsewhere."""
    console = console or rich.get_console()
    if not console.is_interactive:
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with _LateBar(*columns, console=console, transient=True) as bar:
        bar.add_task(label, total=None)
        yield


class _LateBar(Progress):
    """A bar that is not shown before SHOW_AFTER_S."""

    def get_renderables(self) -> Iterable[RenderableType]:
        if any((task.elapsed or 0.0) >= SHOW_AFTER_S for task in self.tasks):
            yield from super().get_renderables()


def _lines(label: str, total: float, console: Console, done: float) -> Advance:
    start = said = time.monotonic()
    before, last = done, ""

    def advance(more: float, status: str = "") -> None:
        nonlocal said, done, last
        done, now, last = done + more, time.monotonic(), status or last
        if now - said >= LINE_EVERY_S and before < done < total:
            said = now
            left = timedelta(seconds=round((now - start) / (done - before) * (total - done)))
            spent = timedelta(seconds=round(now - start))
            text = f"{label}: {done:,.0f} of {total:,.0f}{last and f', {last}'}, {spent} so far, ETA {left}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    return advance
