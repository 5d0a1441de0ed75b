"""Weights & Biases itself, offline: what it is told is read back from the log that `wandb sync` sends."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reinflow import tracking
from reinflow.metrics import TrackingError, read_metrics
from reinflow.tracking import REPORT, TAG_LENGTH, open_tracker
from reinflow.video import write_mp4
from tests.offline_wandb import history, of_kind, sessions, summary


@pytest.fixture(autouse=True)
def its_own_folders(tmp_path, monkeypatch):
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandbs" / name.lower()))


def tracker(run_dir: Path, **changes) -> tracking.Tracker:
    arguments = {
        "config": {"policy_lr": 1e-5, "cameras": ["up"]}, "num_episodes": 100, "episodes_done": 0,
        "wandb_mode": "offline", "wandb_project": "tests", "wandb_run_id": None, "resumed_iteration": None,
        "console": Console(file=(run_dir.parent / "said").open("a"), width=200),
    }  # fmt: skip
    return open_tracker(run_dir, **(arguments | changes))


def said(run_dir: Path, open_one: tracking.Tracker) -> str:
    open_one.sinks[-1].console.file.flush()
    return (run_dir.parent / "said").read_text()


def test_what_did_not_start_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR")
    with pytest.raises(TrackingError, match="did not start"):
        tracker(tmp_path / "run", wandb_project="a/b:c")
    assert "WANDB_DATA_DIR" not in os.environ


def test_a_run_can_be_found_read_and_gone_on_with(tmp_path):
    run_dir = tmp_path / "17-30_tiny"
    tags, notes = ["tiny", "lift", "x" * 80, ""], "go on with: train --resume --output-dir here"
    with tracker(run_dir, tags=tags, notes=notes) as one:
        for iteration, success in enumerate((0.3, 0.6, 0.5), 1):
            one.log(iteration, {"progress/episodes": 10 * iteration, "eval/success_rate": success, "loss/policy": 0.25})
        one.summary({"report/success_before": 0.56})
    (log,) = sessions(run_dir)
    (run,) = of_kind(log, "run")
    assert (run.display_name, run.project, run.notes) == ("17-30_tiny", "tests", notes)
    assert list(run.tags) == ["tiny", "lift", "x" * TAG_LENGTH]
    config = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert config["policy_lr"] == 1e-5 and config["cameras"] == ["up"]
    assert history(log)[1] == {
        "progress/iteration": 2, "progress/episodes": 20, "eval/success_rate": 0.6, "loss/policy": 0.25,
    }  # fmt: skip
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(log, "metric")}
    assert axes["*"] == axes["loss/policy"] == axes["eval/success_rate"] == "progress/episodes"
    totals = summary(log)
    assert totals["eval/success_rate"] == {"max": 0.6, "last": 0.5}
    assert (totals["loss/policy"], totals["progress/iteration"], totals["report/success_before"]) == (0.25, 3, 0.56)


def test_a_run_by_returns_is_over_control_steps_and_its_best_is_a_return(tmp_path):
    with tracker(tmp_path / "run", counted="timesteps", objective="return") as one:
        one.log(1, {"progress/timesteps": 1000, "eval/return_mean": 70.0})
        one.log(2, {"progress/timesteps": 2000, "eval/return_mean": 50.0})
    (log,) = sessions(tmp_path / "run")
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(log, "metric")}
    assert axes["*"] == "progress/timesteps"
    assert summary(log)["eval/return_mean"] == {"max": 70.0, "last": 50.0}


def test_a_resumed_run_goes_on_in_the_same_run_and_draws_over_what_it_repeats(tmp_path):
    run_dir = tmp_path / "run"
    with tracker(run_dir) as one:
        for iteration in (1, 2, 3):
            one.log(iteration, {"progress/episodes": 10 * iteration, "loss/policy": 0.0})
    with tracker(run_dir, wandb_run_id=one.wandb_run_id, episodes_done=20, resumed_iteration=2) as two:
        two.log(3, {"progress/episodes": 30, "loss/policy": 1.0})
    first, second = sessions(run_dir)
    assert of_kind(first, "run")[0].run_id == of_kind(second, "run")[0].run_id == two.wandb_run_id
    assert [row["progress/episodes"] for row in history(first) + history(second)] == [10, 20, 30, 30]
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 3


def test_an_alert_has_the_rule_and_its_remedy(tmp_path):
    from reinflow.doctor import diagnose

    rows = [{"progress/iteration": n, "ppo/ratio_error_before_update": 0.5} for n in (1.0, 2.0, 3.0)]
    finding = diagnose(rows, {})[0]
    with tracker(tmp_path / "run") as one:
        one.alert(finding.rule, str(finding), error=finding.severity == "error")
    (alert,) = of_kind(sessions(tmp_path / "run")[0], "alert")
    assert (alert.title, alert.level) == ("ratio_off_one", finding.severity.upper().replace("WARNING", "WARN"))
    assert finding.remedy in alert.text and finding.evidence in alert.text


def test_films_and_tables_are_shown_and_a_film_of_nothing_ends_nothing(tmp_path):
    run_dir, film = tmp_path / "run", tmp_path / "film.mp4"
    write_mp4(film, [np.full((64, 96, 3), shade, np.uint8) for shade in range(0, 200, 20)], 25)
    with tracker(run_dir) as one:
        assert one.takes_media
        one.film("films/before", tmp_path / "not there.mp4", "seed 3")
        one.film("films/after", film, "seeds 10000, 10001")
        one.table("report/regions", ["from (m)", "to (m)", "success"], [[0.2, 0.24, 0.5], [0.24, 0.28, 0.9]])
        one.log(1, {"progress/episodes": 10})
        assert "did not take the film films/before" in said(run_dir, one)
    (log,) = sessions(run_dir)
    shown, table, metrics = history(log)
    assert shown["films/after/_type"] == "video-file" and shown["films/after/caption"] == "seeds 10000, 10001"
    assert (log.parent / "files" / shown["films/after/path"]).read_bytes() == film.read_bytes()
    content = json.loads((log.parent / "files" / table["report/regions/path"]).read_text())
    assert content["columns"][2] == "success" and content["data"][1] == [0.24, 0.28, 0.9]
    assert metrics["progress/episodes"] == 10


def policy_of(folder: Path, megabytes: float) -> Path:
    """A policy's directory of that size; sparse, so that no disk is filled."""
    (folder / "processors").mkdir(parents=True)
    (folder / "processors" / "stats.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(int(1e6 * megabytes))
    return folder


@pytest.mark.parametrize(("megabytes", "copied", "sent"), [(1.0, True, True), (3.0, False, True), (6.0, False, False)])
def test_an_artefact_is_copied_sent_or_only_named_by_its_size(tmp_path, monkeypatch, megabytes, copied, sent):
    monkeypatch.setattr(tracking, "COPIED_MB", 2)
    monkeypatch.setattr(tracking, "SENT_MB", 5)
    run_dir, policy = tmp_path / "run", policy_of(tmp_path / "best", megabytes)
    (tmp_path / "link").symlink_to(policy)
    with tracker(run_dir) as one:
        one.artifact(tmp_path / "link", "policy", "model")
        text = said(run_dir, one)
    (artifact,) = of_kind(sessions(run_dir)[0], "artifact")
    assert (artifact.name, artifact.type) == (f"policy-{one.wandb_run_id}", "model")
    files = {entry.path: entry for entry in artifact.manifest.contents}
    assert files.keys() == {"model.safetensors", "processors/stats.json"}
    weights = files["model.safetensors"]
    assert weights.size == int(1e6 * megabytes) and weights.digest
    assert bool(weights.local_path) == sent and bool(weights.ref) != sent
    if sent:  # from a copy, or from where it is
        assert (Path(weights.local_path) != policy / "model.safetensors") == copied
    else:
        assert weights.ref == (policy / "model.safetensors").as_uri()
    copies = [path for path in (tmp_path / "wandbs").rglob("*") if path.is_file() and path.stat().st_size > 1e5]
    assert bool(copies) == copied
    assert f"artifact policy, {megabytes:.1f} MB" in text and ("it stays in" in text) == (not sent)


def test_copies_lie_in_the_run_directory_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = tmp_path / "run"
    with tracker(run_dir) as one:
        one.artifact(policy_of(tmp_path / "best", 1.0), "policy", "model")
    (artifact,) = of_kind(sessions(run_dir)[0], "artifact")
    assert all((run_dir / "wandb") in Path(entry.local_path).parents for entry in artifact.manifest.contents)
    assert "WANDB_DATA_DIR" not in os.environ


def test_an_artefact_that_is_not_there_ends_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with tracker(run_dir) as one:
        one.artifact(tmp_path / "gone.html", "report", "report")
        one.log(1, {"progress/episodes": 10})
        assert "did not take report" in said(run_dir, one)
    (log,) = sessions(run_dir)
    assert [row["progress/episodes"] for row in history(log)] == [10] and of_kind(log, "artifact") == []


def test_a_figure_of_the_whole_run_is_explained(tmp_path):
    with tracker(tmp_path / "run", wandb_mode="off") as one:
        assert not one.takes_media
        one.summary(dict.fromkeys(REPORT, 0.5))
        with pytest.raises(TrackingError, match="report/sucess"):
            one.summary({"report/sucess": 1.0})
