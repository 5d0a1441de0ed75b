"""reinflow-sweep: the 22 experiments of the three-stage pipeline, or a grid of one's own, one process a training.

    reinflow-sweep --output-dir runs/sweep --workers 2 -- --no-wandb --flow-mlp-pretrained-path runs/aw
    reinflow-sweep --output-dir runs/sweep --configs baseline warmup --seeds 0 1 2 -- --total-timesteps 200000
    reinflow-sweep --output-dir runs/grid --grid policy_lr=1e-5,3e-5 clip_epsilon=.1,.2 --gpus 0 1
    reinflow-sweep --output-dir runs/sweep --report

Flags after ``--`` go to every training. The same command again goes on: finished runs are left alone, interrupted ones
resumed, failed ones set aside and started anew. The experiments are in sweep_experiments.py, how they become trainings
in sweep_plan.py, what the figures mean in sweep_report.py.

The launcher is the standard library's: concurrent.futures runs a thread a worker, each of which waits for a process of
its own. joblib or a process pool would share an interpreter between trainings, of which a crash or a CUDA context must
take nothing else along; hydra brings a configuration of its own beside the one flat config; submitit needs Slurm. What
a cluster wants are commands, and --dry-run prints them, for GNU parallel, for line $SLURM_ARRAY_TASK_ID of a Slurm
array, for ``| xargs -d '\\n' -P 8 -I{} sh -c {}``; --report with the same flags then reads what they left.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from reinflow import ConfigError
from reinflow.lock import RunLock
from reinflow.settings import holds_run
from reinflow_so101.checks import FlatConfig
from reinflow_so101.commands.sweep_launcher import complain, launch, state_of
from reinflow_so101.commands.sweep_plan import Sweep, SweepConfig, check_config, load_sweep, plan_sweep
from reinflow_so101.commands.sweep_report import report


def print_commands(sweep: Sweep, config: SweepConfig) -> None:
    """What would run now, one command a line; a GPU's turn is as if all took the same time."""
    gpus = itertools.cycle(config.slots)
    for run in sweep.runs:
        if state_of(sweep, run) in ("new", "interrupted", "failed"):
            words = shlex.join(sweep.command(run, holds_run(sweep.directory(run)), config.threads))
            print(f"CUDA_VISIBLE_DEVICES={gpu} {words}" if (gpu := next(gpus)) else words)


def parse_args(argv: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep's flags, and those behind -- for every training."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    config = tyro.cli(SweepConfig, args=list(argv[:cut]), description=__doc__, prog="reinflow-sweep")
    check_config(config)
    return config, list(argv[cut + 1 :])


def command(argv: Sequence[str], presets: Mapping[str, FlatConfig]) -> None:
    """reinflow-sweep: plan, run what is not finished, report.

    Args:
        argv: the flags.
        presets: of train_reinflow.py, which no room below may name.

    Raises:
        ConfigError: something does not fit; nothing was started.
        SweepError: it was stopped, or trainings failed; the others are finished and reported.
    """
    config, flags = parse_args(argv)
    root = Path(config.output_dir)
    stored = load_sweep(root) if config.report else None
    sweep = stored or plan_sweep(config, flags, presets)
    if config.report:
        if not root.is_dir():
            raise ConfigError(f"output_dir={root} is not there: name the folder of a sweep")
        report(sweep)
    elif config.dry_run:
        print_commands(sweep, config)
    else:
        root.mkdir(parents=True, exist_ok=True)
        lock = RunLock(root)
        try:
            sweep.save()
            states, stopped = launch(sweep, config.slots, config.threads)
            report(sweep)
        finally:
            lock.release()
        complain(sweep, states, stopped)
