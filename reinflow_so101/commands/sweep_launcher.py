"""A sweep's trainings as processes: what each one's directory says, a worker for each slot, stops and failures.

A training's directory holds, besides what train_reinflow.py leaves, log.txt with its output and attempts.jsonl with a
line for each process: its command, seconds and exit code.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from reinflow import UserError
from reinflow.metrics import METRICS_FILE, read_rows
from reinflow.settings import CONFIG_FILE, holds_run
from reinflow_so101.commands.monitor import (
    ATTEMPTS_FILE,
    PROCESS_FILE,
    budget,
    duration,
    failed,
    last,
    owner,
)
from reinflow_so101.commands.sweep_plan import PlannedRun, Sweep

LOG_FILE, SET_ASIDE = "log.txt", "set_aside"
EVAL_AFTER = "eval_after.json"
State = Literal["not run", "new", "running", "interrupted", "failed", "finished"]


class SweepError(UserError, RuntimeError):
    """A sweep ended before all its trainings were finished; the message says which, and what goes on."""


def attempts_of(directory: Path) -> list[dict[str, Any]]:
    """The processes that a training had so far, by the launcher of a sweep."""
    return read_rows(directory / ATTEMPTS_FILE)


def last_line(directory: Path) -> str:
    """The last words of a training's log."""
    try:
        with (directory / LOG_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8_192))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1] if lines else ""


def is_finished(directory: Path) -> bool:
    """Whether a training came to its end, and to its evaluation after them if it makes one."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        counted, total = budget(config)
        done = last(read_rows(directory / METRICS_FILE), counted) or 0
        return done >= total and (not config["report_episodes"] or (directory / EVAL_AFTER).exists())
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False


def state_of(sweep: Sweep, run: PlannedRun) -> State:
    """What a training's directory says.

    A process that a signal ended was interrupted, also by a machine that ran out of memory; one that ended by itself
    with an error failed.
    """
    directory = sweep.directory(run)
    if run.note:
        return "not run"
    if owner(directory):
        return "running"
    if is_finished(directory):
        return "finished"
    if failed(directory):
        return "failed"
    return "interrupted" if holds_run(directory) else "new"


@dataclass
class Children:
    """The processes at work, and whether they were told to stop."""

    stopping: bool = False
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def stop(self, *_signal: object) -> None:
        """Ask all to save and end; a second time they end at once. A signal's handler, so it prints nothing."""
        word = b"stopping at once\n" if self.stopping else b"stopping: trainings save after their iteration\n"
        os.write(2, word)
        self.stopping = True
        for process in list(self.processes.values()):
            process.terminate()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals of this process stop the children."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.signal(number, self.stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def play(sweep: Sweep, run: PlannedRun, gpu: str, threads: int, children: Children) -> State:
    """One training's process from its start to its end; what it was before is kept."""
    directory, before = sweep.directory(run), state_of(sweep, run)
    if before not in ("new", "interrupted", "failed") or children.stopping:
        return before
    if before == "failed":
        aside = sweep.root / SET_ASIDE / f"{run.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        aside.parent.mkdir(exist_ok=True)
        directory.rename(aside)
    command = sweep.command(run, before == "interrupted", threads)
    directory.mkdir(exist_ok=True)
    start = time.monotonic()
    code = _process(directory, run.name, command, {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}, children)
    record = {"command": command, "seconds": time.monotonic() - start, "exit_code": code}
    with (directory / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return state_of(sweep, run)


def _process(directory: Path, name: str, command: list[str], extra: dict[str, str], children: Children) -> int:
    """Run ``command`` with its output in log.txt; its exit code, below 0 if a signal ended it."""
    mark = directory / PROCESS_FILE
    with (directory / LOG_FILE).open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then asks the trainings once to save.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | extra,
        )  # fmt: skip
    children.processes[name] = process
    try:
        if children.stopping:  # while it started
            process.terminate()
        since = datetime.now().isoformat(timespec="seconds")
        mark.write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid, "since": since}) + "\n")
        return process.wait()
    finally:
        process.wait()
        del children.processes[name]
        mark.unlink(missing_ok=True)


def launch(sweep: Sweep, slots: Sequence[str], threads: int) -> tuple[dict[str, State], bool]:
    """Run what is not finished, a worker per slot.

    Args:
        sweep: its trainings.
        slots: the GPU of each worker, or "".
        threads: of torch in each training.

    Returns:
        What each training's directory says now, and whether a signal stopped the sweep.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    children, states = Children(), {run.name: state_of(sweep, run) for run in sweep.runs}
    due = [run for run in sweep.runs if states[run.name] in ("new", "interrupted", "failed")]
    elsewhere = sum(state == "running" for state in states.values())
    print(
        f"{len(sweep.runs)} runs in {sweep.root}: {sum(s == 'finished' for s in states.values())} finished, {len(due)} "
        f"to run on {len(slots)} workers" + (f", {elsewhere} run elsewhere and are left alone" if elsewhere else ""),
        flush=True,
    )

    def work(run: PlannedRun) -> State:
        slot = free.get()
        try:
            return play(sweep, run, slot, threads, children)
        finally:
            free.put(slot)

    start = time.monotonic()
    with children.listening(), ThreadPoolExecutor(len(slots)) as pool:
        futures = {pool.submit(work, run): run for run in due}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                states[run.name] = future.result()
            except (OSError, UserError) as error:  # such as a full disk: the others may be past it
                states[run.name] = "failed"
                print(f"{run.name}: {error}", flush=True)
            if not children.stopping:
                _say(sweep, run, states[run.name], f"{number}/{len(due)}", (len(due) / number - 1), start)
    states |= {run.name: state_of(sweep, run) for run in sweep.runs if states[run.name] != "failed"}
    return states, children.stopping


def _say(sweep: Sweep, run: PlannedRun, state: State, count: str, left: float, start: float) -> None:
    """A line about a training that ended; the time left is at the pace so far."""
    eta = f"ETA {duration((time.monotonic() - start) * left)}"
    if state == "finished":
        print(f"{count}  {run.name} finished  {eta}", flush=True)
    else:
        log = sweep.directory(run) / LOG_FILE
        print(f"{count}  {run.name} {state}: {last_line(sweep.directory(run))}  (all of it: {log})  {eta}", flush=True)


def complain(sweep: Sweep, states: Mapping[str, State], stopped: bool) -> None:
    """Raise a SweepError if trainings are not finished, which says what goes on with them."""
    open_ = [name for name, state in states.items() if state not in ("finished", "not run")]
    broken = [name for name, state in states.items() if state == "failed"]
    if stopped:
        raise SweepError(f"stopped; {len(open_)} runs are not finished, the same command goes on with them")
    if broken:
        raise SweepError(
            f"{len(broken)} of {len(states)} runs failed, see log.txt in {', '.join(broken)} below {sweep.root}; the "
            "same command starts them again"
        )
    if open_:
        raise SweepError(f"not finished: {', '.join(open_)}; the same command goes on with them")
