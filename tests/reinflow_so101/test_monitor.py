"""reinflow-monitor: the state of trainings and stages, told from their files."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from reinflow import ConfigError
from reinflow.lock import RunLock
from reinflow.stage import StageDirectory
from reinflow_so101.commands.monitor import MonitorConfig, find_runs, look_at, owner, parse_args, table, watch


def training(root: Path, name: str, episodes: list[int], total: int = 100) -> Path:
    """The files of a training; a line of metrics stands for two iterations of three seconds."""
    run = root / name
    (run / "checkpoints" / "000002" / "set_aside").mkdir(parents=True)
    (run / "checkpoints" / "metrics.jsonl").touch()  # no run of its own
    (run / "config.json").write_text(json.dumps({"num_episodes": total, "preset": "tiny"}))
    rows: list[dict[str, float | None]] = [
        {
            "progress/iteration": 2 * i + 2,
            "progress/episodes": e,
            "time/iteration": 3.0,
            "rollout/success_rate": 0.4,
            "progress/timesteps": 100 * e,
            "rollout/return_mean": 2.0,
        }
        for i, e in enumerate(episodes)
    ]
    rows[0] |= {"eval/success_rate": 0.25, "ppo/approx_kl": None}
    rows[-1] |= {"ppo/approx_kl": 0.0125}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"progress/iter')
    findings = [{"progress/iteration": i, "rule": "clip_fraction"} for i in (2, 22)]
    (run / "doctor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in findings))
    return run


def look(run: Path):
    return look_at(run, run.name, time.time())


def test_a_training_runs_stops_and_finishes(tmp_path):
    run = training(tmp_path, "run", [20, 40, 60])
    lock = RunLock(run)
    state = look(run)
    assert (state.state, state.kind, state.done, state.total, state.findings) == ("running", "tiny", 60, 100, 1)
    assert state.seconds_left == pytest.approx(12.0)  # 40 episodes at 40 in two lines of six seconds
    assert state.figures == {"rollout": 0.4, "return": 2.0, "tuning": 0.25, "kl": 0.0125}
    lock.release()
    assert look(run).state == "stopped"
    (run / "attempts.jsonl").write_text('{"exit_code": 1}\n')
    assert look(run).state == "failed"
    assert look(training(tmp_path, "done", [100])).state == "finished"
    config = {"num_episodes": 100, "total_timesteps": 20_000}  # its length is counted in control steps
    (tmp_path / "done" / "config.json").write_text(json.dumps(config))
    assert (look(tmp_path / "done").state, look(tmp_path / "done").share) == ("stopped", 0.5)


def test_a_dead_process_holds_nothing(tmp_path):
    """The words of a killed process stay in its lock file, and its number may be another's by now."""
    run = training(tmp_path, "run", [20])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    words = {"host": os.uname().nodename, "pid": child.pid, "since": time.strftime("%Y-%m-%dT%H:%M:%S")}
    (run / "run.lock").write_text(json.dumps(words))
    assert owner(run) == words
    (run / "run.lock").write_text(json.dumps(words | {"since": "2020-01-01T00:00:00"}))
    assert owner(run) is None
    (run / "run.lock").write_text(json.dumps(words))
    child.kill()
    child.wait()
    assert owner(run) is None
    (run / "run.lock").write_text(json.dumps(words | {"host": "elsewhere"}))
    assert (owner(run) or {})["host"] == "elsewhere"


def test_a_stage_runs_and_finishes(tmp_path):
    with StageDirectory.open(tmp_path / "bc", {"steps": 200, "lr": 1e-3}, False, "reinflow-shortcut") as stage:
        for step in (50, 100):
            stage.log(step, {"loss": 1 / step, "lr": 1e-3})
        stage.log(100, {"success_K1": 0.5})
        state = look(tmp_path / "bc")
        assert (state.state, state.kind, state.done, state.share) == ("running", "reinflow-shortcut", 100, 0.5)
        assert state.figures == {"loss": 0.01, "tuning": 0.5} and state.seconds_left is not None
        stage.finish({"success": 0.5})
    assert look(tmp_path / "bc").state == "finished"


def test_the_table_shows_every_run_below_and_what_is_damaged(tmp_path, capsys):
    training(tmp_path / "sweep", "a-seed0", [20, 40])
    broken = training(tmp_path / "sweep", "b-seed0", [20])
    (broken / "metrics.jsonl").write_text("nonsense\n")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "sweep" / "run.lock").touch()  # the sweep's own: no run
    assert [path.name for path in find_runs(tmp_path)] == ["a-seed0", "b-seed0"]
    watch(MonitorConfig(str(tmp_path), once=True))
    out = capsys.readouterr().out
    assert "2 stopped" in out and "sweep/a-seed0" in out and "40/100" in out and "0.0125" in out
    assert "line 1 of metrics.jsonl is damaged" in out and "loss" not in out  # no stage, no such column
    narrow = io.StringIO()
    Console(width=70, file=narrow).print(table(tmp_path, width=70))
    assert "sweep/a-seed0" in narrow.getvalue() and "stopped" in narrow.getvalue()
    (tmp_path / "empty").mkdir()
    watch(parse_args([str(tmp_path / "empty"), "--once"]))
    assert "no runs yet" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="directory=nowhere"):
        parse_args(["nowhere"])
