"""A sweep as a plan: which trainings with which flags, checked before anything starts, kept in sweep.json."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from reinflow import ConfigError
from reinflow.env import usable_cores
from reinflow.settings import Range, check_ranges, config_to_json, type_name
from reinflow_so101.checks import FlatConfig
from reinflow_so101.command_line import CHANGEABLE_ON_RESUME, ThisStart, parse_flags, starting_point
from reinflow_so101.commands.monitor import SWEEP_FILE
from reinflow_so101.commands.sweep_experiments import BASELINE, EXPERIMENTS, OUR_NAMES, Experiment

OURS = {"preset", "seed", "output-dir", "checkpoint-path", "resume", "check"}  # flags that the sweep sets itself
FREE = CHANGEABLE_ON_RESUME - {
    "num_episodes",
    "total_timesteps",
    "report_episodes",
}  # settings that a sweep may go on with differently
NO_GRID = {"preset", "seed", "output_dir", "checkpoint_path", "resume", "task"}


@dataclass(frozen=True)
class SweepConfig:
    """Train every experiment with every seed. Flags of the trainings follow after --."""

    output_dir: str
    """Folder of the sweep: a run directory for each training, sweep.json, results.csv and results.png."""
    preset: str = "three-stage"
    """Preset of train_reinflow.py that the experiments change."""
    configs: tuple[str, ...] = ()
    """Experiments (warmup:0) or whole categories (warmup); without any all 22, or with a grid the baseline alone."""
    seeds: tuple[str, ...] = ("0",)
    """Training seeds of every experiment."""
    baseline_seeds: Annotated[int, Range(0, 1_000)] = 5
    """Seeds of the baseline in all, the next ones after --seeds: their spread is what differences are judged by."""
    grid: tuple[str, ...] = ()
    """Experiments of one's own: FIELD=VALUE,VALUE,... of a training, every combination."""
    gpus: tuple[str, ...] = ()
    """Indices of GPUs, as CUDA_VISIBLE_DEVICES has them; each takes one training at a time."""
    workers: Annotated[int, Range(0, 1_024)] = 0
    """Trainings at a time without --gpus; 0 is 1. Each gets its share of the cores as --num-threads."""
    dry_run: bool = False
    """Print the commands that would run, one a line, and nothing else; nothing is written."""
    report: bool = False
    """Only read what is there: table, results.csv, results.png."""

    @property
    def slots(self) -> list[str]:
        """A GPU index per worker; "" leaves the device to the training."""
        return _words(self.gpus) or [""] * max(self.workers, 1)

    @property
    def threads(self) -> int:
        """Torch threads of one training."""
        return max(1, usable_cores() // len(self.slots))


def check_config(config: SweepConfig) -> None:
    """Raise a ConfigError for what cannot work."""
    check_ranges(config)
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ConfigError(f"output_dir={config.output_dir} is a file: choose a directory")
    if config.gpus and config.workers:
        raise ConfigError(f"workers={config.workers} beside gpus: every GPU has one worker, leave one of them out")


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep."""

    experiment: str
    category: str
    parameter: str
    value: str
    difference: str
    hypothesis: str
    seed: int
    flags: tuple[str, ...]
    """Of train_reinflow.py, beside those of the whole sweep."""
    note: str = ""
    """Why it is not run."""

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '-', self.experiment)}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A whole one: what all trainings share, and the trainings."""

    root: Path
    preset: str
    flags: tuple[str, ...]
    base: Mapping[str, Any]
    """The baseline's settings, as config.json has them."""
    runs: tuple[PlannedRun, ...]

    def directory(self, run: PlannedRun) -> Path:
        """Where a training leaves everything."""
        return self.root / run.name

    def command(self, run: PlannedRun, resume: bool, threads: int) -> list[str]:
        """The process of a training; a resumed one keeps its own settings."""
        start = [sys.executable, "-m", "train_reinflow"]
        place = ["--output-dir", str(self.directory(run))]
        if resume:
            return [*start, "--resume", *place]
        given = {_flag_name(word) for word in self.flags}
        share = [] if "num-threads" in given else ["--num-threads", str(threads)]
        return [*start, "--preset", self.preset, *self.flags, *run.flags, "--seed", str(run.seed), *place, *share]

    def save(self) -> None:
        """Write sweep.json, from which --report and the next call go on."""
        from reinflow.checksums import write_atomically

        content = {
            "preset": self.preset, "flags": self.flags, "base": self.base,
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }  # fmt: skip
        write_atomically(self.root / SWEEP_FILE, json.dumps(content, indent=2) + "\n")


def load_sweep(root: Path) -> Sweep | None:
    """The sweep that a directory holds, if any.

    Raises:
        ConfigError: its sweep.json cannot be read.
    """
    path = root / SWEEP_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(PlannedRun(**{**run, "flags": tuple(run["flags"])}) for run in content["runs"])
        return Sweep(root, content["preset"], tuple(content["flags"]), content["base"], runs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): mend it, or name another output_dir") from error


# --- The plan ---------------------------------------------------------------------------------------------------------


def plan_sweep(config: SweepConfig, flags: Sequence[str], presets: Mapping[str, FlatConfig]) -> Sweep:
    """Every training of the sweep, checked as a whole before anything starts; those planned before stay in it.

    Args:
        config: the sweep's flags.
        flags: of every training.
        presets: of train_reinflow.py.

    Raises:
        ConfigError: an experiment, a field or a value is unknown or does not fit; the directory's sweep is another.
    """
    for word in flags:
        if _flag_name(word) in OURS:
            raise ConfigError(f"{word} after -- is the sweep's own to set: leave it out there (--seeds, --preset)")
    start = ["--preset", config.preset, *flags]
    with contextlib.redirect_stdout(sys.stderr):  # --dry-run's lines are for other programs
        base, _ = parse_flags(
            start, starting_point(start, presets), None, ThisStart(), "reinflow-sweep: flags after --"
        )
    if base.env_id:
        raise ConfigError(f"env_id={base.env_id}: a sweep judges by success, which says little there; sweep on the arm")
    experiments, seeds = chosen_experiments(config, base), _seeds(config.seeds)
    later = (seed for seed in itertools.count(max(seeds) + 1))
    extra = list(itertools.islice(later, max(0, config.baseline_seeds - len(seeds))))
    runs = tuple(
        run
        for experiment in experiments
        for run in _runs_of(experiment, base, [*seeds, *(extra if experiment.name == BASELINE else [])])
    )
    sweep = Sweep(Path(config.output_dir), config.preset, tuple(flags), config_to_json(base), runs)
    return _joined(load_sweep(sweep.root), sweep)


def _joined(before: Sweep | None, now: Sweep) -> Sweep:
    """``now`` with the runs that were planned before; raises ConfigError if their baseline was another."""
    if before is None:
        return now
    names = sorted((before.base.keys() & now.base.keys()) - FREE)
    differing = [f"{n} ({before.base[n]} -> {now.base[n]})" for n in names if before.base[n] != now.base[n]]
    if differing:
        raise ConfigError(
            f"output_dir={now.root} holds a sweep of another baseline: {', '.join(differing)}. Give its flags again, "
            "or name another output_dir"
        )
    planned = {run.name: run for run in (*before.runs, *now.runs)}
    return dataclasses.replace(now, runs=tuple(planned.values()))


def _runs_of(experiment: Experiment, base: FlatConfig, seeds: Sequence[int]) -> Iterator[PlannedRun]:
    changes, note = experiment.changes(base), experiment.note
    for name in changes:
        _check_field(name, base, experiment.name)
    try:
        changed = dataclasses.replace(base, **changes)
        for seed in seeds:
            dataclasses.replace(base, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"{experiment.name} with preset={base.preset}: {error}. Leave it out by --configs") from error
    if not note and changed == base and experiment.name != BASELINE:
        note = "sets what the baseline has: same as baseline"
    words = (experiment.parameter, experiment.value, experiment.difference, experiment.hypothesis)
    flags = tuple(word for name, value in changes.items() for word in flag_of(name, value))
    for seed in seeds[:1] if note else seeds:
        yield PlannedRun(experiment.name, experiment.category, *words, seed, flags, note)


def chosen_experiments(config: SweepConfig, base: FlatConfig) -> list[Experiment]:
    """Those that --configs names, in the document's order, and the grid's; always with the baseline."""
    wanted, grid = set(_words(config.configs)), _words(config.grid)
    categories = {experiment.category for experiment in EXPERIMENTS.values()}
    for name in sorted(wanted - EXPERIMENTS.keys() - categories):
        close = difflib.get_close_matches(name, EXPERIMENTS, 1)
        hint = f"is {close[0]} meant?" if close else f"choose of {', '.join(EXPERIMENTS)}"
        raise ConfigError(f"configs: {name} is no experiment: {hint}")
    everything = not wanted and not grid
    named = [e for e in EXPERIMENTS.values() if everything or {e.name, e.category} & {*wanted, BASELINE}]
    return named + list(grid_experiments(grid, base))


def grid_experiments(words: Sequence[str], base: FlatConfig) -> Iterator[Experiment]:
    """FIELD=VALUE,VALUE,... of a training -> an experiment for every combination.

    Raises:
        ConfigError: no such field, it is not one to sweep, or a value is of another type.
    """
    axes: dict[str, list[Any]] = {}
    hints = get_type_hints(type(base))
    for word in words:
        name, equals, values = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not equals or not values:
            raise ConfigError(f"grid: {word} is no FIELD=VALUE,VALUE,...: write policy_lr=1e-5,3e-5")
        _check_field(name, base, "grid")
        if name in NO_GRID or name in axes:
            raise ConfigError(f"grid: {name} cannot be swept {'twice' if name in axes else 'this way'}: leave it out")
        axes[name] = [_value_of(text, hints[name], name) for text in values.split(",")]
    for chosen in itertools.product(*axes.values()) if axes else ():
        fields = dict(zip(axes, chosen, strict=True))
        label = ",".join(f"{name}={_text(value)}" for name, value in fields.items())
        were = ", ".join(f"{_text(getattr(base, name))} -> {_text(value)}" for name, value in fields.items())
        given = ", ".join(_text(value) for value in chosen)
        yield Experiment(f"grid:{label}", "grid", ", ".join(fields), given, were, "-", fields)


def _check_field(name: str, base: FlatConfig, where: str) -> None:
    names = [f.name for f in dataclasses.fields(base)]
    if name not in names:
        close = [OUR_NAMES[name]] if name in OUR_NAMES else difflib.get_close_matches(name, names, 1)
        hint = f"is {close[0]} meant?" if close else "train_reinflow.py --help lists them"
        raise ConfigError(f"{where}: {name} is no setting of a training: {hint}")


def _value_of(text: str, hint: Any, name: str) -> Any:
    """A grid's value as its field has it."""
    kinds: dict[Any, Any] = {int: int, float: float, str: str, bool: {"true": True, "false": False}.__getitem__}
    options = get_args(hint) if get_origin(hint) is Literal else ()
    if options:
        if text in options:
            return text
        raise ConfigError(f"grid: {name}={text}: choose of {', '.join(map(str, options))}")
    if hint not in kinds:
        raise ConfigError(f"grid: {name} is {type_name(hint)}, which has no single value: give it after --")
    try:
        return kinds[hint](text.lower() if hint is bool else text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"grid: {name}={text} is no {type_name(hint)}") from error


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def flag_of(name: str, value: Any) -> list[str]:
    """A field of a training as its flag."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}", str(value)]


def _flag_name(word: str) -> str:
    """output-dir of ``--output_dir=D``; "" of what is no flag."""
    return word[2:].split("=", maxsplit=1)[0].replace("_", "-").removeprefix("no-") if word.startswith("--") else ""


def _words(given: Sequence[str]) -> list[str]:
    """Words of a flag, however they were quoted."""
    return [word for part in given for word in part.split()]


def _seeds(given: Sequence[str]) -> list[int]:
    words = _words(given)
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"seeds={' '.join(words) or 'nothing'}: give whole numbers, such as 0 1 2")
    return list(dict.fromkeys(int(word) for word in words))
