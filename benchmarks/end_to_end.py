"""End to end: where an iteration of `train_reinflow.py --preset tiny` spends its time, and how long it takes to start.

    python benchmarks/end_to_end.py [--quick] [--csv FILE] [--iterations 17]

* Phases: one short real run, read from its metrics.jsonl. The first iteration trains the critic alone and is left out.
  The preset evaluates every eighth iteration: 17 iterations hold two evaluations, so that shares are those of a run.
* Startup: `--help`, and a run up to the end of its first iteration, each in fresh processes. Ready is when the policy,
  the environments and the learner stand (config.json is written); the report of the starting policy on 200 seeds comes
  next, then the first iteration.

Bars: --help <= 1.5 s; ready and first iteration, without the report, <= 20 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from _common import ROOT, Row, interleaved, make_parser, median, print_bar, report, timed

from reinflow.metrics import METRICS_FILE, read_metrics
from train_reinflow import PRESETS

TRAIN = [sys.executable, str(ROOT / "train_reinflow.py")]
TINY = ["--preset", "tiny", "--no-wandb"]
SMALL = [
    "--parallel-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "6", "--gradient-accumulation-steps",
    "1", "--num-critic-epochs", "1", "--critic-warmup-iters", "0", "--eval-interval", "2", "--eval-episodes", "2",
    "--report-episodes", "2", "--episodes", "4",
]  # fmt: skip
HELP_BAR_S, FIRST_BAR_S = 1.5, 20.0
POLL_S = 0.02


class RunFailed(RuntimeError):
    """The training that was measured ended with an error; its output is in the message."""


def has_line(path: Path) -> bool:
    """Whether the file has a whole line."""
    return path.exists() and "\n" in path.read_text()


def watch_run(flags: Sequence[str], directory: Path, to_the_end: bool = False) -> dict[str, float]:
    """Train in a fresh process, into `directory`/run. Seconds since its start: "ready", "report before" and "first
    iteration". It is killed after that unless it shall run `to_the_end`.

    Raises:
        RunFailed: it ended before, or with an error.
    """
    run, log = directory / "run", directory / "output.txt"
    marks = {
        "ready": run / "config.json",
        "report before": run / "eval_before.json",
        "first iteration": run / METRICS_FILE,
    }
    seen: dict[str, float] = {}
    start = time.perf_counter()
    with log.open("w") as output:
        command = [*TRAIN, *TINY, *flags, "--output-dir", str(run)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        while len(seen) < len(marks) and process.poll() is None:
            now = time.perf_counter() - start
            seen |= {name: now for name, path in marks.items() if name not in seen and has_line(path)}
            time.sleep(POLL_S)
        if not to_the_end:
            process.kill()
        code = process.wait()
    if len(seen) < len(marks) or (to_the_end and code):
        raise RunFailed(log.read_text()[-2000:])
    return seen


def phases(metrics: Sequence[Mapping[str, float | None]]) -> list[Row]:
    """Lines of the first table from the lines of a metrics.jsonl."""
    names = {
        "physics, rendering (env)": "time/rollout_env",
        "policy in rollouts": "time/rollout_policy",
        "update": "time/update",
        "evaluation": "time/eval",
    }
    total = sum(line["time/iteration"] or 0.0 for line in metrics)
    rows: list[Row] = []
    for phase, name in names.items():
        values = [value for line in metrics if (value := line.get(name)) is not None]
        rows.append({
            "phase": phase,
            "median, s": statistics.median(values) if values else None,
            "times": len(values),
            "s an iteration": sum(values) / len(metrics),
            "share": sum(values) / total,
        })  # fmt: skip
    rest = total - sum(row["s an iteration"] for row in rows) * len(metrics)
    rows.append({"phase": "rest (log, checkpoint)", "s an iteration": rest / len(metrics), "share": rest / total})
    rows.append({"phase": "iteration", "s an iteration": total / len(metrics), "share": 1.0, "times": len(metrics)})
    return rows


def measure_phases(iterations: int) -> list[Row]:
    """A short real run of the preset to its end."""
    with tempfile.TemporaryDirectory() as directory:
        episodes = str(iterations * PRESETS["tiny"].episodes_per_iteration)
        watch_run(["--episodes", episodes], Path(directory), to_the_end=True)
        return phases(read_metrics(Path(directory) / "run" / METRICS_FILE)[1:])


def show_help() -> float:
    """Seconds of --help."""
    return timed(lambda: subprocess.run([*TRAIN, "--help"], capture_output=True, cwd=ROOT, check=True))


def startup(help_seconds: float, runs: Sequence[Mapping[str, float]]) -> list[Row]:
    """Lines of the second table from the marks of `watch_run`."""
    differences = {
        "--preset tiny: ready": lambda run: run["ready"],
        "report before": lambda run: run["report before"] - run["ready"],
        "first iteration": lambda run: run["first iteration"] - run["report before"],
        "start to the end of the first iteration, without the report": lambda run: (
            run["first iteration"] - run["report before"] + run["ready"]
        ),
        "the same with the report": lambda run: run["first iteration"],
    }
    rows: list[Row] = [{"what": "--help", "seconds": help_seconds}]
    return rows + [{"what": what, "seconds": statistics.median(map(of, runs))} for what, of in differences.items()]


def measure_startup(repeats: int) -> list[Row]:
    """Help and first iteration take turns."""
    runs: list[dict[str, float]] = []

    def first_iteration() -> float:
        with tempfile.TemporaryDirectory() as directory:
            runs.append(watch_run([], Path(directory)))
        return runs[-1]["first iteration"]

    times = interleaved({"--help": show_help, "run": first_iteration}, repeats, warmups=0)
    return startup(median(times, "--help"), runs)


def measure_quickly() -> tuple[list[Row], list[Row]]:
    """Both tables from one run of two very small iterations."""
    with tempfile.TemporaryDirectory() as directory:
        marks = watch_run(SMALL, Path(directory), to_the_end=True)
        return startup(show_help(), [marks]), phases(read_metrics(Path(directory) / "run" / METRICS_FILE)[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=17)
    args = parser.parse_args(argv)
    threads = f"{PRESETS['tiny'].num_threads} torch threads, MuJoCo on all cores"
    if args.quick:
        args.iterations = 2
        start, rows = measure_quickly()
    else:
        start, rows = measure_startup(args.repeats), measure_phases(args.iterations)
        print_bar("--help, s", start[0]["seconds"], HELP_BAR_S, at_least=False)
        print_bar("start to the end of the first iteration, s", start[-2]["seconds"], FIRST_BAR_S, at_least=False)
    report(start, args, threads, "startup")
    report(rows, args, f"{args.iterations} iterations, {threads}", "phases")


if __name__ == "__main__":
    main()
