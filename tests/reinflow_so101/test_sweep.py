"""reinflow-sweep: the 22 experiments as data, plans, verdicts, and a real sweep that fails in part, stops, resumes."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import train_reinflow
from reinflow import ConfigError
from reinflow.metrics import read_metrics
from reinflow_so101.commands import sweep_report
from reinflow_so101.commands.sweep import command
from reinflow_so101.commands.sweep_experiments import EXPECTED, EXPERIMENTS
from reinflow_so101.commands.sweep_launcher import SweepError, state_of
from reinflow_so101.commands.sweep_plan import load_sweep
from reinflow_so101.commands.sweep_report import Result, spread_of, verdict
from train_reinflow import PRESETS

ROOT = Path(__file__).parents[2]
FAST = [
    "--no-wandb", "--num-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "2",
    "--gradient-accumulation-steps", "1", "--num-critic-epochs", "1", "--critic-warmup-iters", "0",
    "--eval-interval", "0", "--report-episodes", "2", "--save-interval", "2", "--num-threads", "1",
    "--episodes", "16", "--device", "cpu",
]  # fmt: skip
BAD = "grid:flow_mlp_pretrained_path=/nowhere"
SWEEP = ["--preset", "flow_mlp", "--workers", "2", "--baseline-seeds", "1", "--grid", BAD.removeprefix("grid:")]


def dry_run(capsys, root: Path, *flags: str, extra: tuple[str, ...] = ()) -> list[list[str]]:
    """The words of every command that a sweep of flow_mlp would run."""
    command(["--output-dir", str(root), "--preset", "flow_mlp", "--dry-run", *flags, "--", *FAST, *extra], PRESETS)
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_the_documents_22_experiments():
    counts = Counter(experiment.category for experiment in EXPERIMENTS.values())
    assert counts == {"baseline": 1, "warmup": 3, "noise": 5, "ppo": 5, "lr": 3, "infer": 2, "rollout": 3}
    assert all(name in EXPERIMENTS for best, _ in EXPECTED.values() for name in best)
    base = replace(
        PRESETS["flow_mlp"], policy_optimizer="adam", episodes_per_iteration=64, num_parallel_envs=64,
        minibatch_size=64, gradient_accumulation_steps=1, num_ppo_epochs=4, num_critic_epochs=4,
    )  # fmt: skip
    changes = {name: experiment.changes(base) for name, experiment in EXPERIMENTS.items()}
    assert changes["baseline"] == changes["ppo:high_value"] == {} and EXPERIMENTS["ppo:high_value"].note
    assert changes["lr:high"] == {"policy_lr": 1e-4, "critic_lr": 3e-4}
    assert changes["rollout:long"] == {"episodes_per_iteration": 128, "minibatch_size": 128}
    short = {"episodes_per_iteration": 32, "minibatch_size": 32, "num_parallel_envs": 32}  # no more than episodes
    assert changes["rollout:short"] == short
    assert changes["rollout:more_epochs"] == {"num_ppo_epochs": 8, "num_critic_epochs": 8}


def test_a_dry_run_prints_what_the_training_reads(capsys, tmp_path):
    """Every printed command, given to the training's own parser, is the preset with that change; no file is left."""
    root = tmp_path / "sweep"
    lines = dry_run(
        capsys,
        root,
        "--configs",
        "ppo:clip_loose ppo:high_value",
        "--seeds",
        "3 4",
        "--baseline-seeds",
        "3",
        "--gpus",
        "0 1",
    )
    assert not root.exists()
    assert [line[0] for line in lines[:2]] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]
    parsed = {}
    for words in lines:
        assert words[1:4] == [sys.executable, "-m", "train_reinflow"]
        config = train_reinflow.parse_args(words[4:])
        parsed[Path(config.output_dir).name] = config
    base = parsed["baseline-seed3"]
    assert base.num_episodes == 16 and base.seed == 3 and {"baseline-seed4", "baseline-seed5"} <= parsed.keys()
    assert not [name for name in parsed if "high_value" in name]  # no such setting: not the baseline once more
    place = str(root / "ppo-clip_loose-seed4")
    assert parsed["ppo-clip_loose-seed4"] == replace(base, seed=4, output_dir=place, clip_epsilon=0.3)
    assert len(parsed) == 3 + 2


@pytest.mark.parametrize(
    ("flags", "extra", "message"),
    [
        (["--configs", "ppo:clip_tigth"], [], "is ppo:clip_tight meant"),
        (["--grid", "clip_ratio=.1,.2"], [], "is clip_epsilon meant"),
        (["--grid", "clip_epsilon=.1,often"], [], "clip_epsilon=often is no float"),
        (["--grid", "policy_optimizer=sgd"], [], "choose of adam, natural"),
        (["--grid", "cameras=a,b"], [], "no single value"),
        (["--grid", "clip_epsilon=-1"], [], "clip_epsilon must be positive"),
        (["--grid", "clip_epsilon"], [], "FIELD=VALUE"),
        (["--seeds", "one"], [], "seeds=one"),
        (["--seeds", "10000", "--configs", "baseline"], [], "reporting seed"),
        (["--configs", "infer"], ["--output-dir=x"], "the sweep's own to set"),
        (["--gpus", "0", "--workers", "2"], [], "leave one of them out"),
        (["--configs", "rollout:more_epochs"], [], "num_ppo_epochs=2"),  # natural steps take one
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(capsys, tmp_path, flags, extra, message):
    with pytest.raises(ConfigError, match=message):
        dry_run(capsys, tmp_path / "sweep", *flags, extra=tuple(extra))


def test_a_grid_is_every_combination(capsys, tmp_path):
    grid = ["--grid", "clip_epsilon=.1,.2 anchor_coeff=0,1e-3", "train_critic=false", "--baseline-seeds", "0"]
    lines = dry_run(capsys, tmp_path, *grid)
    configs = [train_reinflow.parse_args(words[3:]) for words in lines]
    assert [(c.clip_epsilon, c.anchor_coeff, c.train_critic) for c in configs] == [
        (0.2, 0.0, True), (0.1, 0.0, False), (0.1, 1e-3, False), (0.2, 0.0, False), (0.2, 1e-3, False),
    ]  # fmt: skip


def result(experiment: str, seed: int, final: float, episodes: int = 200) -> Result:
    return Result(
        f"{experiment}-seed{seed}", experiment, "ppo", "-", "-", "-", seed, 0.5, final, final - 0.05, final + 0.05,
        episodes, 5.0, None, None, 1.0, 10.0, "finished",
    )  # fmt: skip


def test_a_verdict_needs_both_the_seeds_and_the_episodes():
    quiet = spread_of([result("baseline", seed, final) for seed, final in enumerate((0.70, 0.71, 0.69, 0.70, 0.70))])
    assert quiet and quiet.margin(1) == pytest.approx(2.776 * 0.0070711 * (1 + 1 / 5) ** 0.5, rel=1e-3)
    assert verdict([result("a", 0, 0.85)], quiet) == "beyond the spread: +15.0 points"
    assert verdict([result("a", 0, 0.75)], quiet).startswith("within")  # outside of the seeds, not of the episodes
    loud = spread_of([result("baseline", seed, final) for seed, final in enumerate((0.55, 0.85, 0.60, 0.80, 0.70))])
    assert verdict([result("a", 0, 0.85)], loud).startswith("within")  # outside of the episodes, not of the seeds
    assert verdict([result("a", 0, 0.30)], loud) == "beyond the spread: -40.0 points"
    assert spread_of([result("baseline", seed, 0.7) for seed in range(2)]) is None
    assert "no spread" in verdict([result("a", 0, 0.85)], None)


def test_brackets_in_names_are_shown_as_they_are(capsys):
    sweep_report.print_table([result(name, seed, 0.7) for name in ("baseline", "x[/a]", "[red]") for seed in range(3)])
    said = capsys.readouterr().out
    assert "x[/a]" in said and "[red]" in said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, str]:
    """A real sweep of a baseline and a run that must fail, stopped by Ctrl-C; what it printed."""
    root = tmp_path_factory.mktemp("sweep") / "s"
    program = "import sys; from tests.reinflow_so101.test_sweep import sweep_main; sweep_main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--output-dir", str(root), *SWEEP, "--", *FAST], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, attempts = root / "baseline-seed0/metrics.jsonl", f"{BAD.replace(':', '-').replace('/', '-')}-seed0"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size and (root / attempts / "attempts.jsonl").exists()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    return root, out


def sweep_main(argv: list[str]) -> None:
    """reinflow-sweep as a console script."""
    from reinflow import run_command

    run_command("reinflow-sweep", lambda: command(argv, PRESETS))


def test_a_sweep_stops_goes_on_and_isolates_failures(stopped, capsys, monkeypatch):
    root, out = stopped
    sweep = load_sweep(root)
    assert sweep
    baseline, bad = sweep.runs
    assert "stopped; 2 runs are not finished" in out and "holds no policy" in out
    assert [state_of(sweep, run) for run in sweep.runs] == ["interrupted", "failed"]
    done = read_metrics(root / baseline.name / "metrics.jsonl")[-1]["progress/episodes"]
    assert done and done < 16

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["reinflow-sweep"])
    with pytest.raises(SweepError, match="1 of 2 runs failed"):
        command(["--output-dir", str(root), *SWEEP, "--", *FAST], PRESETS)
    assert "resumed after iteration" in (root / baseline.name / "log.txt").read_text()
    attempts = [json.loads(line) for line in (root / baseline.name / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["exit_code"] for attempt in attempts] == [0, 0] and "--resume" in attempts[1]["command"]
    assert [path.name.startswith(bad.name) for path in (root / "set_aside").iterdir()] == [True]

    capsys.readouterr()
    command(["--output-dir", str(root), "--report"], PRESETS)  # no flags: sweep.json has them
    with (root / "results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows[baseline.name]["status"] == "finished" and rows[baseline.name]["final_episodes"] == "2"
    assert rows[baseline.name]["iterations"] == "8.0" and float(rows[baseline.name]["minutes"]) > 0
    assert "holds no policy" in rows[bad.name]["status"] and (root / "results.png").stat().st_size > 1000
    capsys.readouterr()
    left = [words[words.index("--output-dir") + 1] for words in dry_run(capsys, root, *SWEEP[2:])]
    assert left == [str(root / bad.name)]
    with pytest.raises(ConfigError, match=r"another baseline: gamma \(0.999 -> 0.5\)"):
        dry_run(capsys, root, *SWEEP[2:], extra=("--gamma", "0.5"))


def test_without_matplotlib_the_table_is_still_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sweep_report.plot([result("baseline", 0, 0.7)], tmp_path / "results.png") is None
    assert "pip install matplotlib" in capsys.readouterr().out


def test_all_22_fit_the_three_stage_preset(capsys, tmp_path):
    """The default sweep: 20 changes and 5 seeds of the baseline; one of the 22 is no setting here."""
    short = EXPERIMENTS["rollout:short"].changes(PRESETS["three-stage"])
    assert short == {"rollout_steps": 64, "minibatch_size": 32}  # the document's
    command(["--output-dir", str(tmp_path), "--dry-run"], PRESETS)
    names = [shlex.split(line)[-3].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == len(set(names)) == 20 + 5
    assert sum(name.startswith("baseline") for name in names) == 5
