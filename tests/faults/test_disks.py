"""Disks that are full, read-only or gone, for real: a line and exit code 1; the run goes on once they are back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reinflow.settings import holds_run
from tests.faults.test_kills import BEFORE_A_SAVE, LAST_STEP, Chain
from tests.faults.trainer import Ended, Trainer

EPISODES = ("--episodes", "16")
LONG = ("--episodes", "16", "--save-interval", "1000")  # checkpoints at the beginning and the end only


def mount(*words: str) -> None:
    """A mount, or a change of one."""
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)


def unmount(folder: Path) -> None:
    """Now, whoever uses it."""
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True, text=True)


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"

    def resize(self, megabytes: float) -> None:
        mount("-o", f"remount,rw,size={int(megabytes * 1024)}k", str(self.folder))

    def read_only(self) -> None:
        mount("-o", "remount,ro", str(self.folder))

    def fill(self) -> None:
        """With a file, to the last byte."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """64 MB, empty."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a file system of its own needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    yield Disk(folder)
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if (place := Path(line.split()[1])).is_relative_to(tmp_path):
            unmount(place)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_one_line(ended: Ended, what: str) -> None:
    """Exit code 1 and a line of text, no traceback."""
    lines = ended.err.strip().splitlines()
    assert ended.code == 1 and len(lines) == 1 and "Traceback" not in ended.out, (
        f"{what}: exit code {ended.code}, {len(lines)} lines: {ended.err[-1500:]} {ended.out[-300:]}"
    )


def go_on_to_the_end(run: Chain, straight: Path, what: str) -> None:
    """It resumes (or starts, if there is no run) and equals the undisturbed one."""
    run.problems.clear()
    if run.go_on().code == 0:
        run.compare(straight)
    assert not run.problems, f"{what}:\n" + "\n".join(run.problems)


Undisturbed = Callable[..., Path]


def full_at(megabytes: float, trainer: Trainer, disk: Disk, straight: Path) -> None:
    """A disk of that size; then it grows."""
    disk.resize(megabytes)
    run = Chain(trainer, disk.run, EPISODES)
    assert_one_line(run.go_on(), f"a disk of {megabytes} MB")
    disk.resize(200)
    go_on_to_the_end(run, straight, f"a disk of {megabytes} MB that grew")


def test_a_full_disk(trainer: Trainer, undisturbed: Undisturbed, disk: Disk) -> None:
    full_at(20, trainer, disk, undisturbed(*EPISODES))


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [0.004, 0.01, 0.02, 1, 1.25, 3, 6, 8, 8.3, 9, 9.5, 11, 14, 16.3, 17, 24, 30])
def test_a_full_disk_at_any_time(trainer: Trainer, undisturbed: Undisturbed, disk: Disk, megabytes: float) -> None:
    full_at(megabytes, trainer, disk, undisturbed(*EPISODES))


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_line_of_metrics_is_written(
    trainer: Trainer, undisturbed: Undisturbed, disk: Disk
) -> None:
    run, metrics = Chain(trainer, disk.run, LONG), disk.run / "metrics.jsonl"

    def fill(_pid: int) -> None:
        until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        disk.fill()

    assert_one_line(run.go_on(during=fill), "full while metrics.jsonl is written")
    disk.free()
    go_on_to_the_end(run, undisturbed(*LONG), "full while metrics.jsonl was written")


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["start", "resume"])
def test_a_disk_that_is_read_only(trainer: Trainer, undisturbed: Undisturbed, disk: Disk, begun: bool) -> None:
    run = Chain(trainer, disk.run, EPISODES)
    if begun:
        assert run.go_on(die_at=BEFORE_A_SAVE).killed and holds_run(disk.run)
    disk.read_only()
    assert_one_line(run.go_on(), f"read-only before it {'resumes' if begun else 'starts'}")
    disk.resize(64)
    go_on_to_the_end(run, undisturbed(*EPISODES), "no longer read-only")


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(trainer: Trainer, undisturbed: Undisturbed, disk: Disk) -> None:
    run, checkpoints = Chain(trainer, disk.run, EPISODES), disk.run / "checkpoints"

    def lock(_pid: int) -> None:
        until((checkpoints / "000001").exists)
        mount("--bind", str(checkpoints), str(checkpoints))  # a disk of their own: metrics.jsonl is open for writing
        until(lambda: subprocess.run(["mount", "-o", "remount,ro,bind", str(checkpoints)], check=False).returncode == 0)

    assert_one_line(run.go_on(during=lock), "checkpoints/ read-only after iteration 1")
    unmount(checkpoints)
    go_on_to_the_end(run, undisturbed(*EPISODES), "no longer read-only")


def moved_away_at(step: int | str, trainer: Trainer, tmp_path: Path, straight: Path) -> list[str]:
    """Problems of a run whose directory is moved away at that step (or after the named one), then back."""
    run, elsewhere = Chain(trainer, tmp_path / "run", EPISODES), tmp_path / "elsewhere"
    ended = trainer.run(run.command(), run.directory, die_at=step, vanish_to=elsewhere)
    what = f"moved away at step {step} ({ended.at.strip()})"
    if run.directory.exists():
        made = sorted(str(path.relative_to(run.directory)) for path in run.directory.rglob("*"))
        return [f"{what}: exit code {ended.code}, and a directory that was made again: {made[:4]}"]
    assert_one_line(ended, what)
    elsewhere.rename(run.directory)
    go_on_to_the_end(run, straight, f"{what}, then back")
    return []


def test_a_directory_that_is_moved_away(trainer: Trainer, undisturbed: Undisturbed, tmp_path: Path) -> None:
    problems = moved_away_at(BEFORE_A_SAVE, trainer, tmp_path, undisturbed(*EPISODES))
    assert not problems, problems[0]


@pytest.mark.slow
def test_a_directory_that_is_moved_away_at_any_step(trainer: Trainer, undisturbed: Undisturbed, tmp_path: Path) -> None:
    problems = []
    for step in range(6, LAST_STEP, 4):  # from when the run has made its directory
        (tmp_path / str(step)).mkdir()
        try:
            problems += moved_away_at(step, trainer, tmp_path / str(step), undisturbed(*EPISODES))
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_disk_that_is_unplugged(trainer: Trainer, undisturbed: Undisturbed, disk: Disk, tmp_path: Path) -> None:
    plugged = tmp_path / "plugged"
    plugged.mkdir()
    mount("--bind", str(disk.folder), str(plugged))
    run = Chain(trainer, plugged / "run", EPISODES)

    def unplug(_pid: int) -> None:
        until((plugged / "run/checkpoints/000001").exists)
        unmount(plugged)

    ended = trainer.run(run.command(), run.directory, during=unplug)
    left = sorted(str(path.relative_to(plugged)) for path in plugged.rglob("*"))[:4]
    assert not left, f"exit code {ended.code}: it went on where the disk had been: {left}"
    assert_one_line(ended, "unplugged after iteration 1")
    mount("--bind", str(disk.folder), str(plugged))
    go_on_to_the_end(run, undisturbed(*EPISODES), "plugged in again")
