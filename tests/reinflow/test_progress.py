"""Bars: what a terminal shows, what a log gets, one below another, and no control character where there is no terminal.
The clock is ours; a real pseudo-terminal is at the end."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from reinflow import progress
from reinflow.progress import progress_bar, spinner, tracked
from reinflow.tracking import LiveConsole

ROOT = Path(__file__).parents[2]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    """Seconds that pass when we say so, for rich and for the lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def console(self, terminal: bool) -> Console:
        return Console(file=io.StringIO(), force_terminal=terminal, width=100, get_time=lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def shown(console: Console) -> str:
    """What was written, without what moves the cursor."""
    return CONTROL.sub("", console.file.getvalue())


def drawn(console: Console) -> str:
    """One more drawing of everything that is live now."""
    before = len(console.file.getvalue())
    console._live_stack[0].refresh()
    return CONTROL.sub("", console.file.getvalue()[before:])


def test_a_log_gets_a_line_every_half_minute_and_none_for_what_is_short(clock):
    out = clock.console(terminal=False)
    with progress_bar("evaluation, episodes", 200, out) as advance:
        for _ in range(4):
            clock.now += 20
            advance(50, "12 lifted")
    assert out.file.getvalue() == (
        "evaluation, episodes: 100 of 200, 12 lifted, 0:00:40 so far, ETA 0:00:40\n"  # at 80 s all is done
    )
    with progress_bar("short", 2, out) as advance:
        clock.now += 1
        advance(1)
    assert "short" not in out.file.getvalue()


def test_the_time_left_of_what_goes_on_counts_what_is_done_now(clock):
    out = clock.console(terminal=False)
    with progress_bar("steps", 100, out, done=80) as advance:
        clock.now += 40
        advance(10)
    assert out.file.getvalue() == "steps: 90 of 100, 0:00:40 so far, ETA 0:00:40\n"


def test_a_terminal_sees_a_bar_with_the_time_left_which_is_gone_afterwards(clock):
    out = clock.console(terminal=True)
    with progress_bar("rollout, decisions", 40, out) as advance:
        assert "rollout" not in drawn(out)  # what is over within a second is not shown
        clock.now += 30
        advance(10, "success 50 %")
        assert re.search(r"rollout, decisions 10/40 .* success 50 % 0:00:30 ETA 0:01:30", drawn(out))
        clock.now += 30
        advance(10)
        assert "20/40" in (picture := drawn(out)) and "success 50 %" in picture
    assert out.file.getvalue().endswith("\x1b[1A\x1b[2K")  # cleared


def test_bars_stand_below_each_other_and_below_a_trainings(clock):
    out = clock.console(terminal=True)
    live = LiveConsole(out, 100, 0)
    with progress_bar("evaluation, episodes", 10, out) as outer, progress_bar("film, frames", 5, out) as inner:
        clock.now += 2
        outer(3)
        inner(1)
        picture = [line.split("━")[0].strip() for line in drawn(out).splitlines() if line.strip()]
        assert picture == ["episodes   0/100", "evaluation, episodes  3/10", "film, frames 1/5"]
    assert "evaluation" not in drawn(out) and "0/100" in drawn(out)
    live.close(failed=False)


def test_things_are_counted_when_they_are_done_with(clock):
    out = clock.console(terminal=True)
    seen = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(progress.rich, "get_console", lambda: out)
    for thing in tracked([7, 8, 9], "reading"):
        seen.append(thing)
        clock.now += 5
        assert f"reading {len(seen) - 1}/3" in drawn(out)
    monkey.undo()
    assert seen == [7, 8, 9]


def test_what_has_no_known_length_shows_that_it_goes_on(clock):
    out = clock.console(terminal=True)
    with spinner("reading the data set", out):
        clock.now += 7
        assert re.search("reading the data set 0:00:07", drawn(out))
    plain = clock.console(terminal=False)
    with spinner("reading the data set", plain):
        clock.now += 70
    assert plain.file.getvalue() == ""


SLOW = """
import time
from reinflow import progress, run_command, UserError
progress.SHOW_AFTER_S = 0.0
def work():
    for number in progress.tracked(range(3), "steps"):
        print(f"result {number}")
        time.sleep(0.15)
        if number == 1: raise {error}
run_command("work", work)
"""


def on_a_terminal(code: str) -> str:
    """Everything that a program writes to a real pseudo-terminal."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    program = [sys.executable, "-c", code]
    process = subprocess.Popen(program, stdin=child, stdout=child, stderr=child, cwd=ROOT, env=environment)
    os.close(child)
    written, end = b"", time.monotonic() + 60
    while time.monotonic() < end and select.select([parent], [], [], 60)[0]:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the child has closed it
            break
        written += part
    process.wait(10)
    os.close(parent)
    return written.decode()


@pytest.mark.parametrize("error", ["UserError('no good')", "KeyboardInterrupt"])
def test_a_real_terminal_gets_its_cursor_back_after_an_error(error):
    written = on_a_terminal(SLOW.replace("{error}", error))
    assert "steps" in written and "result 1" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_pipe_gets_no_control_character():
    code = SLOW.replace("{error}", "UserError('no good')")
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("result 0\nresult 1\n", "work: no good\n")
