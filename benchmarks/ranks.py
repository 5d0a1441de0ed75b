"""Several learners against one: seconds of an iteration and of its update, with a core and a thread for each rank.

    python benchmarks/ranks.py [--quick] [--csv FILE] [--preset tiny flow_mlp] [--ranks 1 2] [--iterations 3]

Every round is a whole training by each number of ranks, from the same seed and so with the same episodes, started as
a user does: `torchrun --nproc-per-node W train_reinflow.py`. One rank runs on one core, W on W. The first iteration,
which compiles and fills caches, does not count. `waiting` is the share of an iteration in which the writing rank waits
for the others or exchanges with them, all of which counts as update: the slowest rank's rollout, sums of gradients and
covariances. `differs` is the largest distance of a metric of the first iteration from that of one rank, relative where
it is above 1.

Decisions, minibatches and steps are the preset's whatever the number of ranks; critic warm-up is left out, so that
every update moves the policy.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from _common import ROOT, Row, Times, interleaved, make_parser, print_bar, report, speed_ratio

from reinflow.metrics import METRICS_FILE, read_metrics

BAR = 1.6
Metrics = list[dict[str, float | None]]


def train(preset: str, ranks: int, flags: Sequence[str]) -> Metrics:
    """Train once; what the run logged of its iterations."""
    with tempfile.TemporaryDirectory() as directory:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "train_reinflow.py"]
        settings = [
            "--preset", preset, "--no-wandb", "--eval-interval", "0", "--report-episodes", "0", "--seed", "3",
            "--critic-warmup-iters", "0", "--num-threads", "1", "--output-dir", f"{directory}/run", *flags,
        ]  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))[:ranks]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *settings], cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=partial(os.sched_setaffinity, 0, cores),
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{ranks} ranks failed:\n{done.stdout}\n{done.stderr}")
        return read_metrics(Path(directory) / "run" / METRICS_FILE)


def seconds(runs: Sequence[Metrics], name: str) -> list[float]:
    """Of every run, the mean of its iterations but the first."""
    return [statistics.fmean(row.get(name) or 0.0 for row in run[1:]) for run in runs]


def distance(row: dict[str, float | None], other: dict[str, float | None]) -> float:
    """The largest of two iterations' metrics but times."""
    names = [name for name in row if not name.startswith("time/")]
    pairs = [(row[name] or 0.0, other[name] or 0.0) for name in names]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def measure(preset: str, ranks: Sequence[int], flags: Sequence[str], repeats: int) -> tuple[list[Row], Times]:
    """The table's lines of a preset, and the seconds of its iterations."""
    runs: dict[str, list[Metrics]] = {str(number): [] for number in ranks}

    def play(number: int) -> float:
        runs[str(number)].append(train(preset, number, flags))
        return seconds(runs[str(number)][-1:], "time/iteration")[0]

    variants: dict[str, Callable[[], float]] = {str(number): partial(play, number) for number in ranks}
    times = interleaved(variants, repeats, warmups=0)
    alone, rows = str(ranks[0]), []
    for name, found in runs.items():
        parts = {part: seconds(found, f"time/{part}") for part in ("iteration", "rollout", "update", "sync")}
        waiting = [sync / whole for sync, whole in zip(parts["sync"], parts["iteration"], strict=True)]
        updates = {name: parts["update"], alone: seconds(runs[alone], "time/update")}
        rows.append({
            "preset": preset, "ranks": int(name),
            **{f"{part}, s": statistics.median(parts[part]) for part in ("iteration", "rollout", "update")},
            "waiting": f"{statistics.median(waiting):.1%}", "times one rank": speed_ratio(times, name, alone),
            "its update": speed_ratio(updates, name, alone), "differs": distance(runs[alone][0][0], found[0][0]),
        })  # fmt: skip
    return rows, times


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", nargs="*", choices=("tiny", "flow_mlp"), default=["tiny", "flow_mlp"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--iterations", type=int, default=3, help="that count")
    args = parser.parse_args(argv)
    flags = ["--episodes", str(192 * (args.iterations + 1))]
    if args.quick:
        args.preset, args.repeats = ["flow_mlp"], 1
        flags = [
            "--num-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "2", "--num-critic-epochs", "1",
            "--gradient-accumulation-steps", "1", "--episodes", "4",
        ]  # fmt: skip
    rows, bars = [], []
    for preset in args.preset:
        found, times = measure(preset, args.ranks, flags, args.repeats)
        rows += found
        most = str(max(args.ranks))
        bars.append((f"{preset}, {most} ranks against {args.ranks[0]}", speed_ratio(times, most, str(args.ranks[0]))))
    report(rows, args, "1 core and 1 thread a rank, seed 3")
    for what, ratio in bars:
        print_bar(what, ratio, BAR)


if __name__ == "__main__":
    main()
