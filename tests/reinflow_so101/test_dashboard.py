"""What Weights & Biases shows of a training, read back from what a real one wrote offline; and the page about it."""

import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import av
import pytest

from reinflow.doctor import RULES as GENERAL
from reinflow.env import Extra
from reinflow.evaluate import EpisodeRow, EvalResult, write_eval_info
from reinflow.metrics import known_metrics
from reinflow.tracking import COPIED_MB, REPORT, SENT_MB
from reinflow_so101 import dashboard
from reinflow_so101.doctor_rules import RULES
from so101_sim.episode import EXTRAS
from tests.offline_wandb import history, of_kind, sessions, summary
from train_reinflow import start

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "notes/dashboard.md").read_text()
FAST = (
    "--preset flow_mlp --num-envs 2 --episodes-per-iteration 2 --minibatch-size 2 --gradient-accumulation-steps 1 "
    "--num-critic-epochs 1 --critic-warmup-iters 0 --eval-interval 1 --eval-episodes 4 --report-episodes 10 "
    "--save-interval 2 --episodes 4 --wandb-mode offline"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A small training on a log, with Weights & Biases offline and folders of its own."""
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch, (folder / "said").open("w") as said, redirect_stdout(said):
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name))
        start([*FAST.split(), "--output-dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def log(run_dir):
    (found,) = sessions(run_dir)
    return found


def test_a_run_is_found_by_preset_task_and_policy_and_says_how_it_goes_on(log):
    (run,) = of_kind(log, "run")
    assert set(run.tags) == {"flow_mlp", "lift"}
    assert re.fullmatch(r"go on with: .*--resume --output-dir .*run", run.notes)
    config = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert config["preset"] == "flow_mlp" and config["num_episodes"] == 4


def test_the_result_stands_in_the_table_of_runs(run_dir, log):
    totals = summary(log)
    for when in ("before", "after"):
        info = json.loads((run_dir / f"eval_{when}.json").read_text())
        assert totals[f"report/success_{when}"] == pytest.approx(info["overall"]["pc_success"] / 100)
    evaluated = [row["eval/success_rate"] for row in history(log) if "eval/success_rate" in row]
    assert totals["eval/success_rate"] == {"max": max(evaluated), "last": evaluated[-1]}


def test_films_show_the_same_seeds_before_and_after_failures_first(run_dir, log):
    captions = {name.split("/")[1]: row[name] for row in history(log) for name in row if name.endswith("/caption")}
    before = json.loads((run_dir / "eval_before.json").read_text())["per_episode"]
    failed = [row["seed"] for row in before if not row["success"]]
    seeds = {name: [int(seed) for seed in re.findall(r"seed (\d+): \w", text)] for name, text in captions.items()}
    assert seeds["before"] == seeds["after"] and seeds["before"] == failed[:1]  # one of ten episodes
    after = json.loads((run_dir / "eval_after.json").read_text())["per_episode"]
    assert seeds["failures"] == [row["seed"] for row in after if not row["success"]][:1]
    for name in captions:
        with av.open(run_dir / "films" / f"{name}.mp4") as film:
            frames = sum(1 for _ in film.decode(video=0))
        assert frames > 25


def test_what_each_outcome_is_can_be_read(log):
    paths = {name: row[name] for row in history(log) for name in row if name.endswith("/path") and "report/" in name}
    table = json.loads((log.parent / "files" / paths["report/outcomes_before/path"]).read_text())
    assert table["columns"] == ["outcome", "episodes", "share", "what it is"]
    assert sum(row[1] for row in table["data"]) == 10 and all(row[3] for row in table["data"])


def test_the_best_policy_and_the_page_are_kept(run_dir, log):
    kept = {artifact.type: artifact for artifact in of_kind(log, "artifact") if artifact.type != "run_table"}
    files = {entry.path: entry.size for entry in kept["model"].manifest.contents}
    policy = (run_dir / "checkpoints/best/pretrained_model").resolve()
    assert files == {path.name: path.stat().st_size for path in policy.iterdir()}
    (page,) = kept["report"].manifest.contents
    assert page.path == "report.html" and page.size == (run_dir / "report.html").stat().st_size
    said = (run_dir.parent / "said").read_text()
    assert "artifact policy, " in said and "artifact report, " in said


def test_what_is_kept_is_of_a_finished_run_stopped_or_not(tmp_path):
    kept = []
    tracker = SimpleNamespace(artifact=lambda path, name, kind: kept.append((path, name)))
    run = SimpleNamespace(run_dir=tmp_path, tracker=tracker, kept=tmp_path / "best", stop_requested=True, progress=0.9)
    dashboard.keep_results(run)
    assert kept == []
    run.progress = 1.0
    dashboard.keep_results(run)
    assert kept == [(tmp_path / "best/pretrained_model", "policy")]


def made_up(places: list[float]) -> EvalResult:
    """An episode at each place, which succeeds from .25 m on."""
    rows = tuple(
        EpisodeRow(seed, at > 0.25, 1.0, 10, 1.0, facts={"at": at}, outcome="lifted" if at > 0.25 else "missed")
        for seed, at in enumerate(places)
    )
    facts = {"at": Extra("Where it started.", "at {:.2f} m", "m")}
    words = {"lifted": "It rose.", "missed": "It did not.", "dropped": "It fell."}
    return EvalResult(rows, 1.0, outcomes=words, facts=facts, start_facts=("at",))


def test_tables_count_by_region_and_by_outcome():
    result = made_up([0.2 + 0.001 * number for number in range(100)])
    columns, rows = dashboard.regions(result)
    assert columns == ["at_m from", "at_m to", "success", "ci_low", "ci_high", "episodes"]
    assert (rows[0][2], rows[-1][2]) == (0.0, 1.0) and sum(row[-1] for row in rows) == 100
    assert all(low <= success <= high for _, _, success, low, high, _ in rows)
    assert dashboard.outcomes(result)[1] == [["lifted", 49, 0.49, "It rose."], ["missed", 51, 0.51, "It did not."]]


def test_two_of_three_films_are_of_failures_as_far_as_there_are_any(tmp_path):
    write_eval_info(tmp_path / "eval_before.json", made_up([0.2, 0.3, 0.3, 0.2, 0.2]).to_lerobot_info("group"))
    assert dashboard.seeds_to_film(tmp_path, 3) == [0, 3, 1]
    assert dashboard.seeds_to_film(tmp_path, 1) == [0]
    write_eval_info(tmp_path / "eval_before.json", made_up([0.3, 0.3]).to_lerobot_info("group"))
    assert dashboard.seeds_to_film(tmp_path, 3) == [0, 1]
    assert dashboard.seeds_to_film(tmp_path / "none", 3) == []


def test_the_page_names_what_there_is():
    named = set(re.findall(r"`([a-z]+/[a-z_]+)`", PAGE))
    shown = {f"films/{name}" for name in ("before", "after", "failures")}
    shown |= {f"report/{name}_{when}" for name in ("regions", "outcomes") for when in ("before", "after")}
    assert named - known_metrics(EXTRAS).keys() - REPORT.keys() == shown
    assert REPORT.keys() <= named
    rules = {rule.name for rule in (*GENERAL, *RULES)}
    columns = [line.split("|")[4] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 5]
    told = set(re.findall(r"`([a-z_]+)`", " ".join(columns)))
    assert told <= rules and len(told) > 8
    assert f"Up to {COPIED_MB} MB" in PAGE and f"up to {SENT_MB} MB" in PAGE
