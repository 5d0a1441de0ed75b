"""The levers of the algorithm against each other, on the state-based policy: same start, same episodes, 3 seeds.

    python benchmarks/ablation.py --output-dir runs/ablation [--csv notes/results/ablation.csv] [--only LEVER ...]
    python benchmarks/ablation.py --output-dir runs/ablation --quick

Every run is `train_reinflow.py --preset flow_mlp` with the flags of its lever, on larger rollouts and with twice the KL
a step (BASELINE): the preset of the day when the table of notes/results was made. The figure is the noise-free success
of the *last* weights on tuning seeds (nothing is picked), so a lever that ruins a policy late shows it. Levers that
change the chunk start from a policy of their own, made here by reinflow-sft-mlp from the same demonstrations: compare
with the "start" column. Runs that exist are not repeated: the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reinflow.evaluate import wilson_interval  # noqa: E402, the checkout is not installed

EPISODES_PER_ITERATION, EVAL_SEED = 256, 7_000
BASELINE = [
    "--episodes-per-iteration", str(EPISODES_PER_ITERATION), "--target-kl", ".03", "--natural-momentum", ".5",
    "--minibatch-size", "128", "--gradient-accumulation-steps", "6",  # 256 x 3 decisions
]  # fmt: skip
ADAM = ["--policy-optimizer", "adam", "--policy-lr", "1e-4", "--undo-overshoot"]
WHITE = ["--noise-basis", "white", "--log-prob-reduction", "action", "--sigma-min", ".05", "--sigma-max", ".05"]
# Lambda decays as fast in time as the preset's .7 for 50 control steps, here and below.
PER_STEP = ["--credit", "control_step", "--gae-lambda", ".993", "--num-critic-epochs", "2"]
# About the noise per action of the preset (5 cosines over 50 actions), at about its bandwidth.
CHUNK_25 = [
    "--chunk-size", "25", "--n-action-steps", "25", "--chunks-per-episode", "6", "--num-noise-coefficients", "3",
    "--gae-lambda", ".84", "--gradient-accumulation-steps", "12",
]  # fmt: skip
CHUNK_10 = [
    "--chunk-size", "10", "--n-action-steps", "10", "--chunks-per-episode", "15", "--num-noise-coefficients", "1",
    "--gae-lambda", ".93", "--gradient-accumulation-steps", "30",
]  # fmt: skip
HALF = ["--episodes-per-iteration", "128", "--gradient-accumulation-steps", "3"]
LEVERS: dict[str, list[str]] = {
    "baseline": [],
    "optimiser: adam, one step": ADAM,
    "optimiser: adam, 5 epochs of 128": [*ADAM, "--num-ppo-epochs", "5", "--gradient-accumulation-steps", "1"],
    "noise: white .05, ratio per action": WHITE,
    "credit by control step": PER_STEP,
    "credit by control step, white .05, ratio per action": [*PER_STEP, *WHITE],
    "25 actions a chunk": CHUNK_25,
    "10 actions a chunk": CHUNK_10,
    "reduction: action": ["--log-prob-reduction", "action", "--target-kl", ".18"],
    "reduction: chunk": ["--log-prob-reduction", "chunk", "--target-kl", ".9"],
    "reduction: mean": ["--log-prob-reduction", "mean", "--clip-epsilon", ".01", "--target-kl", ".00025"],
    "K = 2": ["--num-denoising-steps", "2"],
    "K = 4": ["--num-denoising-steps", "4"],
    "K = 4, last step noised": ["--num-denoising-steps", "4", "--noise-last-step-only"],
    "sigma .08": ["--sigma-min", ".08", "--sigma-max", ".08"],
    "sigma .25": ["--sigma-min", ".25", "--sigma-max", ".25"],
    "sigma learned .08-.25": ["--sigma-min", ".08", "--sigma-max", ".25"],
    "8 cosines": ["--num-noise-coefficients", "8"],
    "target KL .01": ["--target-kl", ".01"],
    "target KL .1": ["--target-kl", ".1"],
    "time limit bootstraps": ["--no-time-limit-is-terminal"],
    "lambda .95": ["--gae-lambda", ".95"],
    "lambda 0": ["--gae-lambda", "0"],
    "no critic": ["--no-train-critic"],
    "reward: seed formula": ["--reward-mode", "seed"],
    "reward: sparse success": ["--reward-mode", "sparse"],
    "128 episodes an iteration": HALF,
    "128 episodes an iteration, half the KL": [*HALF, "--target-kl", ".015", "--natural-momentum", ".7"],
    "damping 1": ["--natural-damping", "1"],
    "momentum 0": ["--natural-momentum", "0"],
    "anchor 0.1": ["--anchor-coeff", "0.1"],
}  # fmt: skip


def run(lever: str, seed: int, out: Path, episodes: int, eval_episodes: int) -> Path:
    """Train once; returns the run directory."""
    name = "".join(c if c.isalnum() else "_" for c in lever)
    directory = out / f"{name}_{seed}"
    flags = LEVERS[lever]
    per_iteration = EPISODES_PER_ITERATION
    if "--episodes-per-iteration" in flags:
        per_iteration = int(flags[flags.index("--episodes-per-iteration") + 1])
    if not (directory / "done").exists():
        run_command(
            "train_reinflow", out / f"{directory.name}.log", "--preset", "flow_mlp", "--no-wandb",
            "--seed", str(seed), "--episodes", str(episodes), "--report-episodes", "0",
            "--eval-interval", str(episodes // per_iteration), "--eval-seed", str(EVAL_SEED),
            "--eval-episodes", str(eval_episodes), "--flow-mlp-pretrained-path", starting_policy(lever, out),
            "--output-dir", str(directory), *BASELINE, *flags,
        )  # fmt: skip
        (directory / "done").touch()
    return directory


def run_command(module: str, log: Path, *flags: str) -> None:
    """Run one of the project's commands, its output to ``log``."""
    with log.open("w") as file:
        command = [sys.executable, "-c", f"from {module} import main; main()", *flags]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(f"{module} failed: see {log}")


def starting_policy(lever: str, out: Path) -> str:
    """The embedded policy, or one made here whose chunk is the lever's."""
    flags = LEVERS[lever]
    if "--chunk-size" not in flags:
        return "embedded"
    chunk = flags[flags.index("--chunk-size") + 1]
    policy = out / f"start_{chunk}"
    if not (policy / "sft.json").exists():
        log = out / f"{policy.name}.log"
        flags = ["--output-dir", str(policy), "--chunk-size", chunk, "--eval-episodes", "0"]
        run_command("reinflow_so101.stages.sft_flow_mlp", log, *flags)
    return str(policy)


def start_success(lever: str, out: Path, eval_episodes: int) -> float:
    """Noise-free success of the policy that the lever starts from, on the seeds of all levers."""
    policy, flags = starting_policy(lever, out), LEVERS[lever]
    steps = flags[flags.index("--num-denoising-steps") + 1] if "--num-denoising-steps" in flags else "1"
    result = out / f"eval_{Path(policy).name}_K{steps}_{eval_episodes}"
    if not (result / "eval_info.json").exists():
        run_command(
            "reinflow_so101.commands.evaluate", out / f"{result.name}.log",
            "--output-dir", str(result), "--seed", str(EVAL_SEED),
            "--policy-path", "flow_mlp" if policy == "embedded" else policy, "--episodes", str(eval_episodes),
            "--num-denoising-steps", steps, "--num-parallel-envs", "64",
        )  # fmt: skip
    return json.loads((result / "eval_info.json").read_text())["overall"]["pc_success"] / 100


def read(directory: Path, lever: str, seed: int, start: float) -> dict[str, float | str]:
    """One row of the CSV."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    return {
        "lever": lever,
        "seed": seed,
        "episodes": last["progress/episodes"],
        "start": start,
        "success": last["eval/success_rate"],
        "eval_episodes": last["eval/episodes"],
        "sampled_success": last["rollout/success_rate"],
        "approx_kl": last.get("ppo/approx_kl", 0.0),
        "explained_variance": last["ppo/explained_variance"],
        "seconds": sum(row["time/iteration"] for row in rows),
    }


def table(rows: list[dict[str, float | str]]) -> str:
    """Markdown: a line per lever, success pooled over its seeds with a 95 % Wilson interval."""
    lines = [
        "| lever | start | success | 95 % interval | by seed | sampled | s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for lever in dict.fromkeys(row["lever"] for row in rows):
        mine = [row for row in rows if row["lever"] == lever]
        trials = sum(int(row["eval_episodes"]) for row in mine)
        wins = sum(round(float(row["success"]) * int(row["eval_episodes"])) for row in mine)
        low, high = wilson_interval(wins, trials)
        seeds = " ".join(f"{100 * float(row['success']):.0f}" for row in mine)
        start, sampled, seconds = (
            sum(float(row[key]) for row in mine) / len(mine) for key in ("start", "sampled_success", "seconds")
        )
        lines.append(
            f"| {lever} | {100 * start:.1f} | {100 * wins / trials:.1f} | {100 * low:.1f}-{100 * high:.1f} | {seeds} "
            f"| {100 * sampled:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=2_048)
    parser.add_argument("--quick", action="store_true", help="one seed, two levers, two iterations: does it run")
    args = parser.parse_args()
    if args.quick:
        args.only, args.seeds, args.episodes = args.only[:2], [0], 2 * EPISODES_PER_ITERATION
    eval_episodes = 50 if args.quick else 300
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for lever in args.only:
            directory = run(lever, seed, args.output_dir, args.episodes, eval_episodes)
            rows.append(read(directory, lever, seed, start_success(lever, args.output_dir, eval_episodes)))
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
            print(f"{lever}, seed {seed}: {rows[-1]['success']:.3f} in {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
