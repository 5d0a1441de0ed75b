"""A front door of several processes; in one it is none, and torch is loaded when the command wants it."""

from __future__ import annotations

from collections.abc import Callable

from reinflow.launch import launched


def in_ranks(command: Callable[[], object]) -> None:
    """Run ``command`` as one of a launch's processes: they begin and end together, one of them speaks.

    Raises:
        RankError: another of them died or hangs.
        SystemExit: another of them has said why the command ends.
    """
    if not launched():
        command()
        return
    from reinflow.distributed import joined
    from reinflow.watch import watched

    with joined(), watched():
        command()
