"""kill -9 at any moment: what was saved is there, and the run goes on bit for bit.

FAULTS_KILLS sets the number of random moments in the slow form (50).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import batched, count
from pathlib import Path
from typing import Any

import pytest

from reinflow.checkpoint import PRETRAINED, list_checkpoints, load_training_state
from reinflow.flow_mlp import FlowMLP
from reinflow.settings import holds_run
from tests.faults.trainer import FAST, Ended, Trainer

KILLS = int(os.environ.get("FAULTS_KILLS", "50"))
BEST = ("--eval-interval", "1", "--eval-episodes", "2")  # a second link, and saves in the middle of an iteration
STEPS_OF_A_START, LAST_STEP = 80, 200  # on the disk: until checkpoint 0 is there; a run opened and two saves, and some
BEFORE_A_SAVE = "open /doctor.jsonl"  # the first iteration is logged


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Lines without times."""
    path = directory / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in whole]


@dataclass
class Chain:
    """One run that is killed again and again and started or resumed after each; ``problems`` is what it lost."""

    trainer: Trainer
    directory: Path
    flags: tuple[str, ...]
    newest: int = -1  # iteration of the newest complete checkpoint so far
    kills: list[str] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)  # iterations without a line in metrics.jsonl
    problems: list[str] = field(default_factory=list)

    def command(self) -> list[str]:
        """Resumes if there is a run, else starts with the same flags."""
        flags = ["--resume"] if holds_run(self.directory) else [*FAST, *self.flags]
        return [*flags, "--output-dir", str(self.directory)]

    def go_on(self, **how: Any) -> Ended:
        """One process."""
        flags = self.command()
        ended = self.trainer.run(flags, self.directory, **how)
        name = f"{'resumed' if '--resume' in flags else 'started'} {how}"
        if ended.killed:
            name = f"{name}, killed before step {ended.steps}: {ended.at.strip()}"
            self.kills.append(name)
        elif ended.code:
            self.lost(f"{name}: exit code {ended.code}: {ended.err[-600:]}")
        said = re.search(r"resumed after iteration (\d+)", ended.out)
        if said and int(said[1]) < self.newest:
            self.lost(f"{name}: went on after iteration {said[1]}, though checkpoint {self.newest} was complete")
            self.newest = int(said[1])  # told once
        self.look(name)
        return ended

    def lost(self, what: str) -> None:
        """Note a problem, with what was done before it."""
        self.problems.append(f"{what}\n    kills so far: {self.kills[-3:]}")

    def look(self, name: str) -> None:
        """Every checkpoint that is listed is whole, none came to be lost, and the lines up to the newest are there."""
        found = -1
        for path in list_checkpoints(self.directory):
            try:
                _, state = load_training_state(path)
                FlowMLP.from_pretrained(path / PRETRAINED)
            except Exception as error:  # whatever it is, the checkpoint is not whole
                self.lost(f"{name}: {path.name} is listed and does not load: {type(error).__name__}: {error}")
                continue
            if state["iteration"] != int(path.name):
                self.lost(f"{name}: {path.name} holds iteration {state['iteration']}")
            found = max(found, int(path.name))
        if found < self.newest:
            self.lost(f"{name}: the newest checkpoint is {found}, it was {self.newest}")
        self.newest = found
        logged = [int(row["progress/iteration"]) for row in rows(self.directory)]
        missing = set(range(1, self.newest + 1)) - set(logged)
        if missing - self.missing or len(set(logged)) < len(logged):
            self.lost(f"{name}: checkpoint {self.newest} is there, but metrics.jsonl has iterations {logged}")
        self.missing |= missing  # told once

    def compare(self, straight: Path) -> None:
        """The run, now finished, equals one that nobody disturbed."""
        for name in ("metrics.jsonl", "doctor.jsonl"):
            if rows(self.directory, name) != rows(straight, name):
                ours, theirs = (
                    [row["progress/iteration"] for row in rows(d, name)] for d in (self.directory, straight)
                )
                self.lost(f"{name} is another: iterations {ours}, undisturbed {theirs}")
        for file in sorted((straight / "checkpoints/last/").rglob("*.safetensors")):
            if file.read_bytes() != (self.directory / file.relative_to(straight)).read_bytes():
                self.lost(f"{file.relative_to(straight)} is another than that of an undisturbed run")


def kill_and_go_on(
    trainer: Trainer, straight: Path, folder: Path, flags: tuple[str, ...], runs: Iterable[Sequence[dict]], **first: Any
) -> tuple[int, list[str]]:
    """Kill each of the runs ``first`` and at its moments and let it end; the number of kills, and problems."""
    hits, problems, waiting, number = 0, [], [list(moments) for moments in runs], 0
    while waiting:
        moments, number = waiting.pop(0), number + 1
        chained = Chain(trainer, folder / f"run{number}", flags)
        if first:
            chained.go_on(**first)
        for i, moment in enumerate(moments):
            if not chained.go_on(**moment).killed:  # at its end, or at a dead one: what is left is tried on another run
                waiting[:0] = [moments[i + 1 :]] if moments[i + 1 :] else []
                break
        if chained.go_on().code == 0:
            chained.compare(straight)
        hits, problems = hits + len(chained.kills), problems + [f"run {number}: {p}" for p in chained.problems]
    return hits, problems


def report(what: str, hits: int, problems: list[str]) -> None:
    """Fail with everything that was lost."""
    text = "\n".join(problems)
    assert not problems, f"{what}: {hits} kills, {len(problems)} problems\n{text}"


def random_moments(seed: int, kills: int, latest: float) -> list[dict]:
    """Seconds after the start of a process; its first save comes after half a second, an iteration takes 0.2."""
    rng = random.Random(seed)
    return [{"kill_after": rng.uniform(0.05, latest)} for _ in range(kills)]


def test_killed_at_some_moments(trainer: Trainer, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    flags = ("--episodes", "16")
    runs = [random_moments(1, 3, latest=1.2)]
    report("seed 1", *kill_and_go_on(trainer, undisturbed(*flags), tmp_path, flags, runs))


@pytest.mark.slow
def test_killed_at_random_moments(
    trainer: Trainer, undisturbed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, hits, problems = ("--episodes", "100"), 0, []
    for seed in count():
        runs = [random_moments(seed, min(10, KILLS - hits), latest=2.0)]
        now, found = kill_and_go_on(trainer, undisturbed(*flags), tmp_path / str(seed), flags, runs)
        hits, problems = hits + now, problems + [f"seed {seed}: {problem}" for problem in found]
        if hits >= KILLS:
            break
    with capsys.disabled():
        print(f"\nfaults: kill -9 trials={hits} lost={len(problems)}")
    report("random moments", hits, problems)


def at_steps(*steps: int) -> list[dict]:
    """Moments by their number of steps on the disk."""
    return [{"die_at": step} for step in steps]


def test_killed_at_some_steps(trainer: Trainer, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    flags = ("--episodes", "8", "--keep-checkpoints", "1", *BEST)
    runs = [at_steps(*random.Random(2).sample(range(1, LAST_STEP), 3))]
    report("some steps", *kill_and_go_on(trainer, undisturbed(*flags), tmp_path, flags, runs, die_at=BEFORE_A_SAVE))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), BEST], ids=["last", "best"])
def test_killed_at_every_step(
    trainer: Trainer,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    flags: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--episodes", "40", "--keep-checkpoints", "1", *flags)
    straight, starts, resumes = undisturbed(*flags), tmp_path / "starts", tmp_path / "resumes"
    steps = [at_steps(*range(1, STEPS_OF_A_START))]
    hits, problems = kill_and_go_on(trainer, straight, starts, flags, steps)
    steps = [at_steps(*block) for block in batched(range(1, LAST_STEP), 10)]
    more = kill_and_go_on(trainer, straight, resumes, flags, steps, die_at=BEFORE_A_SAVE)
    hits, problems = hits + more[0], problems + more[1]
    with capsys.disabled():
        print(f"\nfaults: kill -9 at every step on the disk trials={hits} lost={len(problems)}")
    report("every step", hits, problems)
