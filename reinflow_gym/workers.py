"""Worker processes that each serve an object's methods over a pipe: one message a worker and call.

They are plain Python processes that import what the object needs and no more: `multiprocessing` would import the main
script, and with it torch and the policy's libraries, into each of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reinflow import ConfigError, UserError

CLOSE_TIMEOUT_S = 5.0
POLL_S, ANSWER_TIMEOUT_S = 10.0, 600.0  # how often a silent worker is looked at, and when it is given up

_WORKER = """import sys
sys.path.insert(0, sys.argv[1])
from reinflow_gym.workers import serve
serve(sys.argv[2])"""


class WorkerError(UserError, RuntimeError):
    """A worker process was killed or stopped from outside; the message names it and what it held."""


class WorkerPool:
    """Processes that hold one object each.

    Args:
        factory: "module:function" that makes the object, in the worker.
        arguments: of the function, one tuple a worker.
        names: what each holds, for messages.

    Raises:
        ConfigError: the factory refused its arguments; the message is its own.
        RuntimeError: an object failed, now or in a later call; its traceback is in the message.
        WorkerError: a worker was killed or stopped, or gave no answer for ANSWER_TIMEOUT_S.
    """

    def __init__(self, factory: str, arguments: Sequence[tuple[Any, ...]], names: Sequence[str]) -> None:
        if os.name != "posix":
            raise ConfigError("worker processes need a POSIX system: use num_workers=0, which steps in this process")
        self._names = list(names)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for argument in arguments:
                self._start(factory, argument)
            self._collect()  # wait until all have made theirs, so that errors appear here
        except BaseException:
            self.close()
            raise

    def _start(self, factory: str, arguments: tuple[Any, ...]) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", _WORKER, str(Path(__file__).resolve().parents[1]), str(theirs.fileno())]
        self._workers.append(subprocess.Popen(command, pass_fds=(theirs.fileno(),)))
        theirs.close()
        self._pipes.append(ours)
        with contextlib.suppress(OSError):
            ours.send((sys.path, factory, arguments))

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.pid for worker in self._workers]

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the method returns in every worker; ``arguments`` are one tuple each."""
        if not self._pipes:
            raise RuntimeError("this vector environment is closed")
        for pipe, argument in zip(self._pipes, arguments, strict=True):
            with contextlib.suppress(OSError):  # the worker is gone: _collect says which one and why
                pipe.send((method, argument))
        return self._collect()

    def _collect(self) -> list[Any]:
        """One reply per worker; all are read before an error is raised, so that none answers a later call."""
        replies, failures, lost = [], [], False
        for index, (pipe, worker) in enumerate(zip(self._pipes, self._workers, strict=True)):
            try:
                kind, value = pipe.recv() if _answers(pipe, worker) else ("lost", "it was stopped, or hangs")
            except (EOFError, OSError):
                kind, value = "lost", f"it died (exit code {worker.wait()}): out of memory, or killed?"
            if kind == "refused":  # a setting that no worker can use: the user's own mistake, in one line
                raise ConfigError(value)
            replies.append(value)
            lost |= kind == "lost"
            if kind in ("error", "lost"):
                failures.append(f"environment worker {index} ({self._names[index]}): {value}")
        if failures:
            raise (WorkerError if lost else RuntimeError)("\n".join(failures))
        return replies

    def close(self) -> None:
        """End the processes; nothing happens the second time."""
        for pipe in self._pipes:
            pipe.close()  # workers leave when their pipe closes
        for worker in self._workers:
            try:
                worker.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._pipes, self._workers = [], []


def _answers(pipe: Connection, worker: subprocess.Popen[bytes]) -> bool:
    """Wait for a worker's reply, or its end; False if it is stopped or silent for too long."""
    give_up = time.monotonic() + ANSWER_TIMEOUT_S
    while not pipe.poll(POLL_S):
        if _is_stopped(worker.pid) or time.monotonic() > give_up:
            return False
    return True


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "tT"
    except (OSError, IndexError):  # no Linux, or it has just ended: the time limit or its pipe tells
        return False


# --- In the worker ----------------------------------------------------------------------------------------------------


def serve(pipe_fd: str) -> None:
    """Answer calls until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to a whole group: they are the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(int(pipe_fd))
    try:
        served = _make(*pipe.recv())
        pipe.send(("ok", None))
    except ConfigError as error:
        pipe.send(("refused", str(error)))
        return
    except Exception:  # whatever it is, the parent has to know
        pipe.send(("error", traceback.format_exc()))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            reply = ("ok", getattr(served, method)(*arguments))
        except Exception:  # raised again in the parent, by _collect
            reply = ("error", traceback.format_exc())
        with contextlib.suppress(OSError):  # the parent is gone: the next recv ends this
            pipe.send(reply)
    served.close()


def _make(search_path: list[str], factory: str, arguments: tuple[Any, ...]) -> Any:
    sys.path[:] = search_path  # so that it finds what the main process finds
    module, _, function = factory.partition(":")
    return getattr(importlib.import_module(module), function)(*arguments)
