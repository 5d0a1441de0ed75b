"""The processes of a launch watch each other: when one fails, dies or hangs, all end, and one says why.

Every rank counts up a number in the launcher's store once a second and looks at its neighbour's: the same few messages
for 2 ranks and for 2,000. The collectives alone would not do: a rank that dies while the others are in a long rollout
is noticed by nobody, an error of gloo names an address, and one of NCCL waits for half an hour.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from reinflow import UserError
from reinflow.distributed import is_writer, rank, size, wait_for_all

BEAT_S = 1.0
SILENT_S = 15.0  # a rank that has not counted for so long is dead, or holds Python's lock as long
GRACE_S = 10.0  # for a rank that has been told of the end: to close what it has open
STORE_S = 10.0  # for an answer of the store
LEAVES_LAST_S = 2.0  # a launcher ends all when one leaves: first the one that has something to say
AT_ITS_END_S = 2.0  # the store may go away while the last rank leaves

_OVER = "over"  # the key of the rank that says why the run ends


class RankError(UserError, RuntimeError):
    """Another process of the launch died, or hangs; the message names it."""


class _Told(BaseException):
    """Raised in the main thread at any place, when another rank is at its end."""


@contextmanager
def watched() -> Iterator[None]:
    """Within it the ranks of ``joined`` end together, and the lines of all but one go nowhere; errors are heard.

    Raises:
        RankError: another rank died or hangs; raised on one.
        SystemExit: 1, without a line, on those that need not say why the run ends.
    """
    watch = Watch()
    handler = signal.signal(signal.SIGUSR2, watch.tell)
    try:
        with _quiet():
            yield
            wait_for_all()
    except BaseException as error:
        if watch.is_cause(error):
            raise
        watch.explain()
        time.sleep(LEAVES_LAST_S)
        raise SystemExit(1) from None
    watch.leave()
    signal.signal(signal.SIGUSR2, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    if is_writer():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Watch:
    """Of one rank over its neighbour, and over what the others say of the end."""

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the group's is blocked while somebody waits on it.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_S))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"reinflow/{attempt}", store)
        self.neighbour = (rank() + 1) % size()
        self.died = self.lost = ""  # who; the store, where that is gone
        self.over, self.left = threading.Event(), threading.Event()
        self.ending = False  # the main thread knows
        self.thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self.thread.start()

    def tell(self, _number: int, _frame: object) -> None:
        """The main thread's handler: the run is over."""
        if not self.ending:
            raise _Told

    def leave(self) -> None:
        """Stop watching: all are done."""
        self.ending = True
        self.left.set()
        self.thread.join()

    def is_cause(self, error: BaseException) -> bool:
        """Whether ``error`` is what the run ends of, for this rank to raise; the others are told to end."""
        self.ending = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, for what is being told here
        if isinstance(error, SystemExit) and not error.code:
            return True
        if isinstance(error, _Told) or self.over.is_set():
            return False
        if _of_a_peer(error) and self.over.wait(SILENT_S + 3 * BEAT_S + STORE_S):
            return False
        self.left.set()
        return self._is_first()

    def explain(self) -> None:
        """Raise what the end came of, if it is this rank's to say."""
        if self.lost and rank() == (0 if _store_is_the_launchers() else 1):
            raise RankError(f"{self.lost} died: start again with --resume, the last checkpoint is whole")
        if self.died:
            raise RankError(
                f"{self.died} died, or has hung for {SILENT_S:.0f} s: look at its own last lines and at its machine's "
                "memory, then start again with --resume; the last checkpoint is whole"
            )

    def _is_first(self) -> bool:
        """Claim the word; the others see it and end."""
        try:
            return self.store.compare_set(_OVER, "", str(rank())) == str(rank()).encode()
        except RuntimeError:  # no store, nobody else to ask
            return True

    def _watch(self) -> None:
        beats, seen, since = 0, b"", time.monotonic()
        while not self.left.wait(BEAT_S):
            beats += 1
            try:
                self.store.set(f"beat/{rank()}", f"{beats} {socket.gethostname()} {os.getpid()}")
                if self.store.check([_OVER]):
                    break
                key = f"beat/{self.neighbour}"
                beat = self.store.get(key) if self.store.check([key]) else b""
            except RuntimeError:
                self._note_the_stores_end()
                break
            now = time.monotonic()
            if beat != seen:
                seen, since = beat, now
            elif now - since > SILENT_S:
                if self._is_first():
                    _, host, pid = seen.decode().split() if seen else ("", "not heard of", "none")
                    self.died = f"rank {self.neighbour} ({host}, process {pid})"
                break
        if not self.left.is_set():
            self._end()

    def _note_the_stores_end(self) -> None:
        if not self.left.wait(AT_ITS_END_S):
            where = os.environ["MASTER_ADDR"]
            self.lost = f"the launcher on {where}" if _store_is_the_launchers() else f"rank 0 ({where})"

    def _end(self) -> None:
        """Tell the main thread; where it does not come back, as from a collective without the others, end for it."""
        self.over.set()
        main = threading.main_thread().ident
        assert main is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pthread_kill(main, signal.SIGUSR2)
        time.sleep(GRACE_S)
        try:
            self.explain()
        except RankError as error:
            print(error, file=sys.stderr, flush=True)
        os._exit(1)


def _store_is_the_launchers() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
