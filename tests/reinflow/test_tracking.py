"""Tracking: every sink alone, the table of names, and resuming without doubled lines."""

from __future__ import annotations

import http.server
import io
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich
import torch
from rich.console import Console

from reinflow import tracking
from reinflow.env import Extra
from reinflow.metrics import METRICS, TrackingError, metrics_markdown, read_metrics
from reinflow.tracking import Tracker, resolve_wandb_mode

ROOT = Path(__file__).parents[2]


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def open_tracker(run_dir, **changes):
    arguments = {
        "config": {"policy_lr": 1e-5},
        "num_episodes": 100,
        "episodes_done": 0,
        "wandb_mode": "off",
        "wandb_project": "tests",
        "wandb_run_id": None,
        "resumed_iteration": None,
        "console": console(),
    }
    return tracking.open_tracker(run_dir, **(arguments | changes))


def test_jsonl_lines_are_on_disk_at_once(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, {"ppo/approx_kl": torch.tensor(0.5), "ppo/explained_variance": math.nan, "reward/lift": 2})
        (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {
        "ppo/approx_kl": 0.5, "ppo/explained_variance": None, "reward/lift": 2.0, "progress/iteration": 1.0,
    }  # fmt: skip


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    with open_tracker(tmp_path) as tracker:
        for iteration in (1, 2, 3):
            tracker.log(iteration, {"loss/policy": 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"progress/iteration": 4.0, "los')  # the process died here
    with open_tracker(tmp_path, resumed_iteration=2) as tracker:
        tracker.log(3, {"loss/policy": 1.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["progress/iteration"], line["loss/policy"]) for line in lines] == [(1, 0), (2, 0), (3, 1)]


def test_unknown_names_are_refused(tmp_path):
    with open_tracker(tmp_path) as tracker, pytest.raises(TrackingError, match="ppo/aprox_kl"):
        tracker.log(1, {"ppo/aprox_kl": 0.1})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_an_environments_extras_are_metrics_too(tmp_path):
    with open_tracker(tmp_path, extras={"jumps": Extra("Jumps.", "jumps {:.0f}")}) as tracker:
        tracker.log(1, {"rollout/jumps": 2.0, "eval/jumps": 3.0})
        with pytest.raises(TrackingError, match="rollout/hops"):
            tracker.log(2, {"rollout/hops": 2.0})


def test_every_logged_name_is_explained_and_every_explanation_is_of_a_logged_name():
    sources = [*(ROOT / "reinflow").glob("*.py"), *ROOT.glob("*.py")]
    readers = ("metrics.py", "sinks.py", "tracking.py", "symptoms.py", "doctor.py")
    text = "\n".join(path.read_text() for path in sources if path.name not in readers)
    families = "|".join({name.split("/")[0] for name in METRICS})
    logged = set(re.findall(rf'"((?:{families})/[a-z_]+)"', text))
    logged.discard("progress/iteration")  # by the tracker
    explained = {name for name in METRICS if "<" not in name} - {"progress/iteration"}
    assert {name for name in logged - explained if not name.startswith("reward/")} == set()
    assert explained - logged == set()


def test_the_table_renders():
    table = metrics_markdown({"jumps": Extra("Jumps.", "jumps {:.0f}")}).splitlines()
    assert len(table) == len(METRICS) + 2 + 2  # an extra is a metric of rollouts and of evaluations
    assert all(line.count("|") == 3 for line in table)


LOGGED = {
    "progress/episodes": 50, "rollout/success_rate": 0.531, "ppo/approx_kl": 0.0123, "ppo/explained_variance": 0.5,
    "eval/success_rate": 0.8, "eval/ci_low": 0.7, "eval/ci_high": 0.9,
}  # fmt: skip


def test_plain_console_prints_one_readable_line(tmp_path):
    out = console()
    with open_tracker(tmp_path, console=out) as tracker:
        tracker.log(3, LOGGED)
        tracker.progress(60)
        tracker.message("saved [000003]")
    line, message = out.file.getvalue().splitlines()
    assert line.startswith("iteration 3  episodes 50/100  success 53.1%  KL 0.0123  EV 0.50  ETA 0:00:0")
    assert line.endswith("eval 80.0% [70.0%, 90.0%]")
    assert message == "saved [000003]"


def test_eta_counts_from_the_start_of_the_first_iteration(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("reinflow.sinks.time.monotonic", lambda: clock[0])
    out = console()
    with open_tracker(tmp_path, console=out) as tracker:
        clock[0] = 1000.0  # a report on the starting policy
        tracker.log(1, {"progress/episodes": 25, "time/iteration": 10.0})
        clock[0] = 1020.0
        tracker.log(2, {"progress/episodes": 50, "time/iteration": 20.0})
    first, second = out.file.getvalue().splitlines()
    assert first.endswith("ETA 0:00:30") and second.endswith("ETA 0:00:30")


def test_the_live_bars_time_left_counts_down_from_the_last_iterations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("reinflow.sinks.time.monotonic", lambda: clock[0])
    with open_tracker(tmp_path, console=console(terminal=True)) as tracker:
        live = tracker.sinks[-1]

        def left():
            return live.left.render(live.bar.tasks[0]).plain

        assert left() == "ETA ?"
        clock[0] = 100.0
        tracker.log(1, {"progress/episodes": 25, "time/iteration": 100.0})
        assert left() == "ETA 0:05:00"
        clock[0] = 110.0
        tracker.progress(45)  # rollouts are faster than iterations, whose update is still to come
        assert left() == "ETA 0:04:50"


def test_bars_are_on_one_console(tmp_path):
    with tracking.open_tracker(
        tmp_path, config={}, num_episodes=1, episodes_done=0, wandb_mode="off", wandb_project="", wandb_run_id=None,
        resumed_iteration=None,
    ) as tracker:  # fmt: skip
        assert tracker.sinks[-1].console is rich.get_console()


def test_eta_is_unknown_before_the_first_episode_of_a_session(tmp_path):
    out = console()
    with open_tracker(tmp_path, episodes_done=50, console=out) as tracker:
        tracker.log(1, {"progress/episodes": 50})
    assert "ETA ?" in out.file.getvalue()


def test_terminal_gets_a_live_bar(tmp_path):
    out = console(terminal=True)
    with open_tracker(tmp_path, console=out) as tracker:
        assert isinstance(tracker.sinks[-1], tracking.LiveConsole)
        tracker.log(3, LOGGED)
        tracker.progress(60)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())
    assert re.search(r" 60/100 .*success 53.1%  KL 0.0123  eval 80.0%", shown)
    assert "iteration 3" in shown


class FakeWandb:
    """Records what wandb is told."""

    Error = type("Error", (Exception,), {})
    Settings = SimpleNamespace

    def __init__(self, fails=False):
        self.fails, self.init_args, self.logged, self.alerts, self.exit_code = fails, {}, [], [], None

    def init(self, **kwargs):
        if self.fails:
            raise self.Error("no API key configured")
        self.init_args = kwargs
        return SimpleNamespace(
            id=kwargs["id"] or "new-id",
            define_metric=lambda *args, **kwargs: None,
            log=self.logged.append,
            alert=lambda **kwargs: self.alerts.append(kwargs),
            finish=lambda exit_code: setattr(self, "exit_code", exit_code),
        )


def test_wandb_run_is_started_and_resumed_by_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_tracker(tmp_path, wandb_mode="offline") as tracker:
        tracker.log(1, {"loss/value": 2})
        assert tracker.wandb_run_id == "new-id"
    assert fake.init_args["mode"] == "offline"
    assert fake.init_args["resume"] is None
    assert fake.init_args["config"] == {"policy_lr": 1e-5}
    assert fake.logged == [{"loss/value": 2.0, "progress/iteration": 1.0}]
    assert fake.exit_code == 0

    monkeypatch.setattr(tracking, "_why_not_online", lambda: "")
    with pytest.raises(KeyError), open_tracker(tmp_path, wandb_mode="online", wandb_run_id="new-id"):
        raise KeyError
    assert (fake.init_args["id"], fake.init_args["resume"], fake.exit_code) == ("new-id", "allow", 1)


def test_an_alert_reaches_the_console_and_wandb(tmp_path, monkeypatch):
    fake, out = FakeWandb(), console()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_tracker(tmp_path, wandb_mode="offline", console=out) as tracker:
        tracker.alert("clip_fraction", "warning: [86 %] clipped")
        tracker.alert("weak_start", "too weak", error=True)
    assert [(a["title"], a["level"]) for a in fake.alerts] == [("clip_fraction", "WARN"), ("weak_start", "ERROR")]
    assert "warning: [86 %] clipped" in out.file.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=True))
    monkeypatch.setattr(tracking, "_why_not_online", lambda: "")
    with pytest.raises(TrackingError, match=r"API key.*wandb login.*--no-wandb"):
        open_tracker(tmp_path, wandb_mode="online")


@pytest.fixture
def no_wandb_key(monkeypatch, tmp_path):
    """No key in the environment nor in a netrc file; a server that is not there."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of discard
    return monkeypatch


def test_auto_is_offline_without_a_key_or_an_answer_and_what_wandb_mode_says(no_wandb_key):
    mode, why = resolve_wandb_mode("auto")
    assert mode == "offline" and "no key" in why and "wandb login" in why
    with pytest.raises(TrackingError, match=r"no key.*--no-wandb"):
        resolve_wandb_mode("online")
    no_wandb_key.setenv("WANDB_API_KEY", "0" * 40)
    mode, why = resolve_wandb_mode("auto")
    assert mode == "offline" and "http://127.0.0.1:9 does not answer" in why
    for named, meant in (("disabled", "off"), ("offline", "offline"), ("dryrun", "offline")):
        no_wandb_key.setenv("WANDB_MODE", named)
        assert resolve_wandb_mode("auto") == (meant, "")
    no_wandb_key.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(TrackingError, match="WANDB_MODE=sometimes"):
        resolve_wandb_mode("auto")


def test_auto_is_online_with_a_key_and_a_server_that_answers(no_wandb_key):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    no_wandb_key.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    no_wandb_key.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_wandb_mode("auto") == ("online", "")
    thread.join(10)
    server.server_close()


def test_wandb_that_breaks_does_not_end_the_training(tmp_path, monkeypatch):
    fake, out = FakeWandb(), console()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_tracker(tmp_path, wandb_mode="offline", console=out) as tracker:
        tracker.sinks[0].run.log = lambda metrics: 1 / 0
        tracker.log(1, {"loss/value": 2})
        tracker.log(2, {"loss/value": 3})
    assert out.file.getvalue().count("Weights & Biases stopped (division by zero)") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_wandb_is_not_imported_when_off(tmp_path):
    code = (
        "import sys; from tests.reinflow.test_tracking import *; from pathlib import Path\n"
        f"with open_tracker(Path({str(tmp_path)!r})) as t: t.log(1, {{}})\n"
        "assert t.wandb_run_id is None and 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_one_failing_sink_does_not_keep_the_others_open(tmp_path):
    class Broken(tracking.Sink):
        def close(self, failed):
            raise OSError("network is down")

    jsonl = tracking.JsonlSink(tmp_path, None)
    with pytest.raises(OSError, match="network"):
        Tracker([Broken(), jsonl]).close()
    assert jsonl.file.closed


def test_metrics_file_is_plain_json(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, {"ppo/ratio_max": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["ppo/ratio_max"] is None
