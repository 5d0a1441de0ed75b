"""Eight ways in which reinforcement learning on a flow policy measures nothing, each beside a run that learns.

    python benchmarks/nulls.py --output-dir runs/nulls [--csv notes/results/nulls.csv] [--only ARM ...] [--seeds 0 1 2]
    python benchmarks/nulls.py --output-dir runs/nulls --quick

Every run is `train_reinflow.py --preset flow_mlp` with the flags of its arm and, where no flag has it, a fault built in
by benchmarks/_null_faults.py: the settings of the project have no switch for what nobody should want. All start from
the embedded policy. The figure is the noise-free success of the *last* weights on reporting seeds, the same for all, so
that an arm is compared with its control episode by episode (exact McNemar test, all training seeds together). Beside
it stands the first rule of the doctor that fired, and when. Runs that exist are not repeated: the command can be
stopped and started again, and two may share a folder if they have different seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scipy.stats import binomtest  # noqa: E402, the checkout is not installed

from reinflow.doctor import diagnose  # noqa: E402
from reinflow.evaluate import wilson_interval  # noqa: E402
from reinflow.metrics import read_metrics  # noqa: E402
from reinflow_so101.doctor_rules import RULES  # noqa: E402

FIRST_SEED = 10_000
COMMON = [
    "--preset", "flow_mlp", "--no-wandb", "--report-episodes", "0", "--eval-interval", "0", "--target-kl", ".03",
    "--save-interval", "1000000", "--num-threads", "1",
]  # fmt: skip
ADAM = [
    "--policy-optimizer", "adam", "--policy-lr", "1e-4", "--undo-overshoot", "--num-ppo-epochs", "5",
    "--minibatch-size", "128", "--gradient-accumulation-steps", "1",
]  # fmt: skip
WHITE = [*ADAM, "--noise-basis", "white", "--sigma-min", ".05", "--sigma-max", ".05", "--target-kl", ".3"]
ONE_STEP = ["--num-ppo-epochs", "1", "--minibatch-size", "96", "--gradient-accumulation-steps", "6"]
SMALL = [
    "--num-envs", "16", "--episodes-per-iteration", "16", "--minibatch-size", "24",
    "--gradient-accumulation-steps", "2",
]  # fmt: skip

QUICK = [*SMALL, "--num-critic-epochs", "2"]


@dataclass(frozen=True)
class Arm:
    """A training: flags over COMMON, a fault of benchmarks/_null_faults.py, the arm to compare with."""

    flags: list[str] = field(default_factory=list)
    fault: str = ""
    control: str = ""
    rules: tuple[str, ...] = ()  # those of the doctor that name the cause


ARMS: dict[str, Arm] = {
    "natural": Arm(),
    "adam": Arm(ADAM),
    "one ratio": Arm([*WHITE, "--log-prob-reduction", "chunk"]),
    "1 batch shape": Arm([*WHITE, "--log-prob-reduction", "chunk"], "batch_shape", "one ratio", ("ratio_off_one",)),
    "mean ratio": Arm([*WHITE, "--log-prob-reduction", "mean"]),
    "2 mean ratio, unscaled": Arm(
        [*WHITE, *ONE_STEP, "--log-prob-reduction", "mean", "--policy-lr", "3e-6"], "", "mean ratio", ("nothing_moves",)
    ),
    "3 drop penalty": Arm([], "drop_penalty", "natural", ("failing_pays", "return_against_success")),
    "4 training scenes": Arm(["--eval-seed", "8"], "few_scenes", "natural", ("evaluated_on_training",)),
    "5 mixed groups": Arm([], "mixed_groups", "natural", ("blind_critic",)),
    "5b groups of one scene": Arm([], "groups_of_one_scene", "natural"),
    "6 bf16 weights": Arm(ADAM, "bf16_weights", "adam", ("weights_stay",)),
    "7 few episodes": Arm(SMALL, "", "natural", ("too_few_episodes",)),
    "8 steps that undo": Arm(
        [*ADAM, "--policy-lr", "3e-4", "--target-kl", "0", "--no-undo-overshoot"], "", "adam", ("later_steps_undo",)
    ),
}


def run(name: str, seed: int, out: Path, episodes: int, quick: bool) -> Path:
    """Train and evaluate once, in a process of its own; returns the run directory."""
    directory = run_path(name, seed, out)
    if not (directory / "done").exists():
        arm, log = ARMS[name], directory.with_suffix(".log")
        flags = [*COMMON, *arm.flags, *(QUICK if quick else []), "--seed", str(seed), "--episodes", str(episodes)]
        command = [sys.executable, str(ROOT / "benchmarks/_null_training.py"), arm.fault, "16" if quick else "500"]
        command += [*flags, "--output-dir", str(directory)]
        with log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}, failed: see {log}")
        (directory / "done").touch()
    return directory


def outcomes(path: Path) -> dict[int, bool]:
    """Seed -> success of an eval_info.json."""
    return {row["seed"]: row["success"] for row in json.loads(path.read_text())["per_episode"]}


def first_named(directory: Path, rules: Iterable[str]) -> tuple[str, int]:
    """The first of ``rules`` that fired in a run, and after how many iterations; ("", 0) if none did."""
    rows, config = read_metrics(directory / "metrics.jsonl"), json.loads((directory / "config.json").read_text())
    for end in range(1, len(rows) + 1):
        fired = {finding.rule for finding in diagnose(rows[:end], config, RULES)}
        if named := [rule for rule in rules if rule in fired]:
            return named[0], end
    return "", 0


def read(directory: Path, name: str, seed: int) -> dict[str, float | str]:
    """One row of the CSV."""
    rows = read_metrics(directory / "metrics.jsonl")
    found = outcomes(directory / "eval_info.json")
    wanted = ARMS[name].rules
    rule, iteration = first_named(directory, wanted)
    everything = [r.name for r in RULES]
    other, other_at = first_named(directory, [r for r in everything if r not in wanted])
    trained = directory / "eval_trained.json"
    last = rows[-1]
    figures: dict[str, float | str] = {short: mean_of(rows, long) for short, long in FIGURES.items()}
    row: dict[str, float | str] = {
        "arm": name,
        "seed": seed,
        "episodes": last["progress/episodes"] or 0.0,
        "successes": sum(found.values()),
        "eval_episodes": len(found),
        "successes_on_training_scenes": sum(outcomes(trained).values()) if trained.exists() else "",
        "sampled_success": last["rollout/success_rate"] or 0.0,
        "rule": rule,
        "fired_at": iteration,
        "first_other_rule": other,
        "other_at": other_at,
        "seconds": sum(row.get("time/iteration") or 0.0 for row in rows),
    }
    return row | figures


FIGURES = {
    "kl_before": "ppo/kl_before_update",
    "decision_kl": "ppo/decision_kl",
    "weights_moved": "ppo/weights_moved",
    "signal_share": "gradients/signal_share",
    "explained_variance": "ppo/explained_variance",
    "steps_undone": "ppo/steps_undone",
}


def mean_of(rows: list[dict[str, float | None]], name: str) -> float | str:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return round(sum(values) / len(values), 6) if values else ""


def paired(name: str, seeds: Iterable[int], out: Path) -> str:
    """Difference to the control in points, and the exact McNemar p, over the runs that both have."""
    control = ARMS[name].control
    lost = won = trials = 0
    for seed in seeds if control else ():
        paths = [run_path(arm, seed, out) / "eval_info.json" for arm in (control, name)]
        if all(path.exists() for path in paths):
            before, after = (outcomes(path) for path in paths)
            lost += sum(before[s] and not after[s] for s in before)
            won += sum(after[s] and not before[s] for s in before)
            trials += len(before)
    if not trials:
        return " | "
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return f"{100 * (won - lost) / trials:+.1f} | {p:.1g}"


def run_path(name: str, seed: int, out: Path) -> Path:
    """Where a run lies."""
    return out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"


def table(rows: list[dict[str, float | str]], out: Path) -> str:
    """Markdown: a line per arm, success pooled over its seeds with a 95 % Wilson interval."""
    lines = [
        "| arm | success % | 95 % interval | by seed | against its control, points | p | rule, iterations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(str(row["arm"]) for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        wins, trials = (sum(int(row[key]) for row in mine) for key in ("successes", "eval_episodes"))
        low, high = (100 * end for end in wilson_interval(wins, trials))
        seeds = " ".join(f"{100 * int(row['successes']) / int(row['eval_episodes']):.1f}" for row in mine)
        fired = " ".join(f"{row['rule'] or '-'} {row['fired_at'] or ''}".strip() for row in mine)
        compared = paired(name, [int(row["seed"]) for row in mine], out)
        lines.append(f"| {name} | {100 * wins / trials:.1f} | {low:.1f}-{high:.1f} | {seeds} | {compared} | {fired} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=1_536)
    parser.add_argument("--read-only", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--quick", action="store_true", help="one seed, two arms, two iterations: does it run")
    args = parser.parse_args()
    if args.quick:
        args.only, args.seeds, args.episodes = ["natural", "3 drop penalty"], [0], 32
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for name in args.only:
            if args.read_only and not (run_path(name, seed, args.output_dir) / "done").exists():
                continue
            directory = run(name, seed, args.output_dir, args.episodes, args.quick)
            rows.append(read(directory, name, seed))
            success = int(rows[-1]["successes"]) / int(rows[-1]["eval_episodes"])
            print(f"{name}, seed {seed}: {success:.3f} in {rows[-1]['seconds']:.0f} s", flush=True)
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
    print(table(rows, args.output_dir))


if __name__ == "__main__":
    main()
