"""reinflow-report: one HTML file about trainings, read by a browser."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from reinflow import ConfigError, UserError
from reinflow.checkpoint import stored_value
from reinflow.doctor import Doctor
from reinflow.env import Extra
from reinflow.evaluate import EpisodeRow, EvalResult, read_eval_info, write_eval_info
from reinflow.metrics import read_metrics
from reinflow_so101.commands.report import make_report, parse_args
from reinflow_so101.doctor_rules import RULES
from reinflow_so101.report.charts import algorithm_charts, phase_totals, reward_charts, time_charts
from reinflow_so101.report.curves import grouped, learning_curve
from reinflow_so101.report.episodes import choose, kinds_of, map_charts, outcome_rows, worst_drawn
from reinflow_so101.report.files import MOST_POINTS, read_run, read_runs
from reinflow_so101.report.films import ShownFilm, Take, make_films, within
from reinflow_so101.report.page import MOST_BYTES, make_page, write_report
from reinflow_so101.report.tables import beyond_preset, differing
from so101_sim.renderer import RenderError
from tests.browser import LAPTOP, PHONE, open_page

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/data/doctor"
SECTIONS = (
    "result", "learning", "paired", "failures", "films", "rewards", "update", "time", "doctor", "trains", "settings",
    "metrics",
)  # fmt: skip
OUTCOMES = {"lifted": "it is up", "dropped": "it fell", "no_contact": "never touched"}
FACTS = {"place_x": Extra("", "", "m"), "place_y": Extra("", "", "m"), "turn": Extra("", "", "deg")}
FAST = (
    "--preset", "flow_mlp", "--no-wandb", "--num-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "2",
    "--gradient-accumulation-steps", "1", "--num-critic-epochs", "1", "--critic-warmup-iters", "0", "--eval-interval",
    "1", "--eval-episodes", "4", "--report-episodes", "4", "--save-interval", "2", "--num-threads", "1", "--episodes",
    "6", "--device", "cpu",
)  # fmt: skip


def evaluation(path: Path, fails: set[int], episodes: int = 40, first: int = 10_000) -> EvalResult:
    """An evaluation on disk, with outcomes and facts, in which these seeds fail."""
    rows = [
        EpisodeRow(
            seed, seed not in fails, 1.0 + (seed not in fails), 100, 1.0,
            outcome="no_contact" if seed in fails else "lifted",
            facts={"place_x": (seed % 7) / 10, "place_y": (seed % 5) / 10, "turn": float(seed % 11)},
        )
        for seed in range(first, first + episodes)
    ]  # fmt: skip
    result = EvalResult(tuple(rows), 2.0, outcomes=OUTCOMES, facts=FACTS, start_facts=("place_x", "place_y", "turn"))
    write_eval_info(path, result.to_lerobot_info("task"))
    return result


TIMES = {"time/rollout_env": 2.0, "time/rollout_policy": 1.0, "time/update": 3.0, "time/iteration": 6.5}


def recorded(directory: Path, name: str = "cascade", **settings: object) -> Path:
    """A recorded training of 30 iterations or so, with what the doctor says of it and both evaluations."""
    shutil.copytree(RECORDED / name, directory)
    (directory / "checkpoints").mkdir()
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    rows = [row | TIMES for row in read_metrics(directory / "metrics.jsonl")]  # recorded without their seconds
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    doctor = Doctor(directory, config, None, RULES)
    for row in rows:
        doctor.examine(int(row["progress/iteration"] or 0), {k: math.nan if v is None else v for k, v in row.items()})
    evaluation(directory / "eval_before.json", set(range(10_000, 10_020)))
    evaluation(directory / "eval_after.json", {10_001, 10_002, 10_030})
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small training by its own command, which writes its report."""
    run = tmp_path_factory.mktemp("report") / "run"
    command = [sys.executable, "train_reinflow.py", *FAST, "--output-dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (run / "console.txt").write_text(done.stdout)
    return run


# --- What the files say -----------------------------------------------------------------------------------------------


def test_a_run_is_read_with_evaluations_and_findings(tmp_path):
    run = read_run(recorded(tmp_path / "run"), "run")
    assert run.before and run.before.num_successes == 20 and run.after and run.after.num_successes == 37
    assert run.findings and run.state in ("stopped", "finished")
    assert run.x_at(run.rows[2]["progress/iteration"]) == run.rows[2]["progress/episodes"]


def best(run: Path, iteration: int, weights: bytes) -> str:
    """Make a checkpoint the best one; the sha256 of its weights."""
    policy = run / f"checkpoints/{iteration:06d}/pretrained_model"
    policy.mkdir(parents=True, exist_ok=True)
    (policy / "model.safetensors").write_bytes(weights)
    (run / "checkpoints/best").unlink(missing_ok=True)
    (run / "checkpoints/best").symlink_to(policy.parent.name)
    return hashlib.sha256(weights).hexdigest()


def played(path: Path, sha: str, iteration: int, written: float) -> None:
    """Say in an evaluation's file which weights it played, and when it was written."""
    info = json.loads(path.read_text()) | {
        "policy": {"sha256": sha, "directory": f"/runs/{iteration:06d}/pretrained_model"}
    }
    path.write_text(json.dumps(info))
    os.utime(path, (written, written))


def test_the_newest_evaluation_of_the_policy_that_is_there_counts(tmp_path):
    run = recorded(tmp_path / "run")
    by_hand = run / "eval_after/eval_info.json"
    evaluation(by_hand, set())
    first, second = best(run, 2, b"first"), hashlib.sha256(b"second").hexdigest()
    now = time.time()
    for own, other, successes, doubts in (
        ((first, now), (second, now + 9), 37, 0),  # the newer one is of another policy
        ((second, now + 9), (first, now), 40, 0),
        ((first, now + 9), (first, now), 37, 0),
        ((first, now), (first, now + 9), 40, 0),
        ((second, now), (second, now + 9), 40, 1),
    ):
        played(run / "eval_after.json", own[0], 2, own[1])
        played(by_hand, other[0], 7, other[1])
        read = read_run(run, "run")
        assert read.after and read.after.num_successes == successes and len(read.doubts) == doubts
    assert read.doubts["after"].startswith(
        "The evaluation after (eval_after/eval_info.json) is of the policy of iteration 7"
    )
    assert read.after_iteration == 7
    text = write_report([run], films=0).read_text()
    assert "before training went on" in text and f"--output-dir {run}/eval_after-2" in text


def test_an_evaluation_that_does_not_say_what_it_played_is_doubted_where_the_policy_is_newer(tmp_path):
    run = recorded(tmp_path / "run")
    best(run, 2, b"weights")
    weights, result = run / "checkpoints/best/pretrained_model/model.safetensors", run / "eval_after.json"
    os.utime(weights, (result.stat().st_mtime - 5,) * 2)
    assert read_run(run, "run").doubts == {}
    os.utime(weights, (result.stat().st_mtime + 5,) * 2)
    assert "older than the policy in best" in read_run(run, "run").doubts["after"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"progress/iteration": 1}\nnonsense\n'), "line 2"),
        (lambda run: (run / "doctor.jsonl").write_text("{}\n"), "doctor.jsonl, line 1"),
        (
            lambda run: (run / "doctor.jsonl").write_text('{"progress/iteration": 1, "rule": "kl"}\n'),
            "line 1.*evidence",
        ),
        (lambda run: (run / "eval_after.json").write_text("{"), "eval_after.json"),
        (lambda run: (run / "start.json").write_text("{"), "start.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
        (lambda run: (run / "stage.json").write_text("{}"), "supervised stage"),
        (lambda run: (run / "config.json").unlink(), "no training"),
    ],
)
def test_what_is_damaged_is_one_error_that_names_it(tmp_path, damage, message):
    run = recorded(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=message) as error:
        write_report([run], films=0)
    assert "\n" not in str(error.value) and not (run / "report.html").exists()


def test_a_last_line_cut_short_is_left_out(tmp_path):
    run = recorded(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"progress/iter')
    assert len(read_run(run, "run").rows) == len((run / "metrics.jsonl").read_text().splitlines()) - 1


def test_runs_of_one_name_are_told_apart_and_named_once(tmp_path):
    a, b = recorded(tmp_path / "a/run"), recorded(tmp_path / "b/run")
    assert [run.name for run in read_runs([a, b])] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="named twice"):
        read_runs([a, a])
    assert [run.name for run in read_runs([a, recorded(a / "run")])] == ["run", "run/run"]


def test_a_long_run_is_thinned_but_keeps_its_evaluations(tmp_path):
    run = recorded(tmp_path / "run")
    rows = [{"progress/iteration": i, "progress/episodes": 2 * i, "ppo/approx_kl": 0.01} for i in range(1, 5_001)]
    rows[1_234] |= {"eval/success_rate": 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_run(run, "run")
    assert len(read.shown_rows) <= MOST_POINTS + 1 and rows[1_234] in read.shown_rows
    assert "metrics.jsonl has all" in make_page([read]).thinned


# --- Charts -----------------------------------------------------------------------------------------------------------


def test_every_chart_is_one_that_plotly_knows(tmp_path):
    import plotly.graph_objects as go

    page = make_page(read_runs([recorded(tmp_path / "a"), recorded(tmp_path / "b", "healthy", seed=3)]))
    charts = page.charts()
    assert {"curve", "kl", "ratio", "reward0", "map0before", "outcomes1", "time1"} <= {chart.key for chart in charts}
    for chart in charts:
        figure = json.loads(re.sub(r'"(c[0-7]|ink|muted)(/[\d.]+)?"', '"#123456"', json.dumps(chart.figure())))
        go.Figure(figure["data"], figure["layout"])  # raises for a name or value that plotly has not
        assert chart.title and chart.unit and chart.note.endswith(".")


def test_the_doctors_findings_are_marked_where_they_fired(tmp_path):
    run = read_run(recorded(tmp_path / "run"), "run")
    (kl,) = (chart for chart in algorithm_charts([run])[0] if chart.key == "kl")
    (marks,) = (trace for trace in kl.data if trace["name"] == "the doctor's findings")
    assert marks["text"] == [finding["rule"] for finding in run.findings]
    assert marks["x"] == [run.x_at(finding["progress/iteration"]) for finding in run.findings]


def test_reward_terms_add_up_and_phases_fill_the_time(tmp_path):
    run = read_run(recorded(tmp_path / "run"), "run")
    (chart,) = reward_charts([run])
    *terms, whole = (trace for trace in chart.data if trace["name"] != "the doctor's findings")
    assert [sum(values) for values in zip(*(t["y"] for t in terms), strict=True)] == pytest.approx(whole["y"], abs=1e-3)
    totals = phase_totals(run)
    assert sum(totals.values()) == pytest.approx(run.seconds) and totals["other: saving, logging"] == len(run.rows) / 2
    assert time_charts([run])[0].layout["barmode"] == "stack"


def test_seeds_of_one_training_share_a_band(tmp_path):
    runs = read_runs([recorded(tmp_path / str(seed), "healthy_20_iterations", seed=seed) for seed in range(3)])
    other = read_run(recorded(tmp_path / "other", "healthy_20_iterations", gamma=0.5), "other")
    assert [len(group) for group in grouped([*runs, other])] == [3, 1]
    evaluated = [row["eval/success_rate"] for row in runs[0].rows if row.get("eval/success_rate") is not None]
    curve = learning_curve(runs)
    assert curve
    means = [trace for trace in curve.data if trace["name"] == "mean of 3 seeds" and trace.get("fill") is None]
    assert [trace["y"] for trace in means] == ([pytest.approx([100 * rate for rate in evaluated])] if evaluated else [])
    assert [row.name for row in differing([*runs, other])] == ["seed", "gamma"]


def test_maps_count_every_episode_once(tmp_path):
    run = read_run(recorded(tmp_path / "run"), "run")
    assert run.before and run.after
    charts, missing = map_charts(0, {"before": run.before, "after": run.after})
    assert not missing and [chart.key for chart in charts] == ["map0before", "map0after", "by_turn0"]
    for chart, successes in zip(charts, (20, 37), strict=False):
        cells = [cell.split("/") for row in chart.data[0]["text"] for cell in row if cell]
        assert sum(int(wins) for wins, _ in cells) == successes and sum(int(tries) for _, tries in cells) == 40
    bars = [[cell.split("/") for cell in trace["text"]] for trace in charts[2].data]
    assert [sum(int(wins) for wins, _ in bar) for bar in bars] == [20, 37]
    rows = outcome_rows([run.before, run.after])
    assert [(row.name, row.counts) for row in rows] == [("lifted", (20, 37)), ("no_contact", (20, 3))]


def test_the_worst_region_is_a_cell_that_is_drawn(tmp_path):
    fails = {seed for seed in range(10_000, 10_040) if (seed % 7) / 10 > 0.3 and (seed % 5) / 10 < 0.2}
    result = evaluation(tmp_path / "e.json", fails)
    results = {"after": result}
    worst = worst_drawn(results, "after")
    assert worst and worst.bounds == {"place_x": (pytest.approx(0.3), 0.6), "place_y": (0.0, pytest.approx(0.2))}
    cells = [cell for row in map_charts(0, results)[0][0].data[0]["text"] for cell in row]
    assert f"{worst.successes}/{worst.episodes}" in cells
    assert worst_drawn({"after": evaluation(tmp_path / "all.json", set())}, "after") is None


def test_facts_that_never_differ_make_no_map(tmp_path):
    result = evaluation(tmp_path / "e.json", set())
    same = EvalResult(
        tuple(EpisodeRow(r.seed, r.success, 1.0, 9, 1.0, facts={"place_x": 0.2}) for r in result.episodes), 1.0,
        facts=FACTS, start_facts=("place_x",),
    )  # fmt: skip
    assert map_charts(0, {"after": same}) == ([], "the same in every episode: place x")


def test_films_show_failures_first_and_one_of_every_kind(tmp_path):
    before = evaluation(tmp_path / "b.json", set(range(10_000, 10_020)))
    after = evaluation(tmp_path / "a.json", {*range(10_000, 10_010), 10_030})
    kinds = kinds_of(before, after)
    chosen = choose(kinds, 6)
    assert list(chosen.values()) == ["still failing", "still failing", "still failing", "lost", "won", "kept"]
    assert list(chosen) == [10_000, 10_001, 10_002, 10_030, 10_010, 10_020]
    assert choose(kinds, 1) == {10_000: "still failing"} and choose(kinds, 0) == {}
    assert kinds_of(before)[10_000] == "fails" and choose(kinds_of(after), 12)[10_010] == "succeeds"
    assert kinds_of(before, evaluation(tmp_path / "c.json", set(), 39)) == {}


def test_films_that_do_not_fit_are_named():
    films = [
        ShownFilm(seed, "won", [Take("before", "", "x" * 3, "x"), Take("after", "", "x" * 4, "xx")], "run")
        for seed in (1, 2, 3)
    ]
    kept, remark = within(films, 25)
    assert kept == films[:2] and "seeds 3" in remark and within(films, 30) == (films, "")


# --- The page ---------------------------------------------------------------------------------------------------------


def test_names_and_settings_are_text_never_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    run = recorded(tmp_path / 'a<b>&"run', instruction=evil, output_dir="</script><img src=x onerror=alert(1)>")
    text = write_report([run], films=0).read_text()
    assert evil not in text and "<img src=x" not in text and "a<b>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_settings_beyond_the_preset_are_listed(tmp_path):
    run = recorded(tmp_path / "run", target_kl=0.5)
    names = [row.name for row in beyond_preset(read_run(run, "run"))[0]]
    assert "target_kl" in names
    stored = json.loads((run / "config.json").read_text())
    (run / "start.json").write_text(
        json.dumps({"manifest": "  trains: a\n  frozen: b", "preset": stored | {"gamma": 0.1}})
    )
    read = read_run(run, "run")
    assert [row.name for row in beyond_preset(read)[0]] == ["gamma"] and beyond_preset(read)[1] == ""
    assert make_page([read]).runs[0].manifest == ["trains: a", "frozen: b"]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_that_just_began_has_a_page(tmp_path, rows):
    run = recorded(tmp_path / "run")
    for name in ("eval_before.json", "eval_after.json", "doctor.jsonl"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:rows]))
    text = write_report([run], films=2).read_text()
    assert "Not evaluated before and after training" in text and "reinflow-eval --policy-path" in text
    assert "the run has no checkpoint yet" in text


@pytest.mark.parametrize(("wanted", "said"), [(0, "with --report-episodes above 0"), (40, "before its last episode")])
def test_why_a_stopped_run_was_not_evaluated(tmp_path, wanted, said):
    run = recorded(tmp_path / "run", report_episodes=wanted, num_episodes=10**6)
    (run / "eval_after.json").unlink()
    missing = make_page([read_run(run, "run")]).runs[0].missing
    assert missing and said in missing.text and missing.commands[0].endswith(f"--output-dir {run}/eval_after")


def test_a_gymnasium_run_is_judged_by_its_return(tmp_path):
    run = recorded(tmp_path / "run", env_id="Hopper-v5", model_type="flow_mlp")
    page = make_page([read_run(run, "run")])
    assert page.unit == "mean return" and page.curve and page.curve.title == "Return over training"
    assert "a Gymnasium run has no films" in write_report([run]).read_text().replace("A Gym", "a Gym")


def test_what_cannot_be_filmed_is_said_and_the_page_is_written(tmp_path):
    run = recorded(tmp_path / "run", model_type="flow_mlp", flow_mlp_pretrained_path=str(tmp_path / "gone"))
    (run / "checkpoints/000002/pretrained_model").mkdir(parents=True)
    (run / "checkpoints/best").symlink_to("000002")
    text = write_report([run], films=1).read_text()
    assert "No films: " in text and 'id="metrics"' in text


def test_a_training_writes_its_report_and_names_it(trained):
    assert f"report: {trained / 'report.html'}; open it in a browser" in (trained / "console.txt").read_text()
    start = json.loads((trained / "start.json").read_text())
    assert "frozen: " in start["manifest"] and start["preset"]["num_episodes"] == 4_224
    text = (trained / "report.html").read_text()
    assert "frozen: " in text and "None in this report" in text  # four reporting episodes are a trial


def test_a_training_says_which_weights_its_evaluations_played(trained):
    before, after = (json.loads((trained / f"eval_{when}.json").read_text())["policy"] for when in ("before", "after"))
    policy = (trained / "checkpoints/best/pretrained_model").resolve()
    assert after["sha256"] == hashlib.sha256((policy / "model.safetensors").read_bytes()).hexdigest()
    assert after["directory"] == str(policy) and after["iteration"] == int(policy.parent.name)
    assert before["sha256"] == stored_value(policy.parent, "start_weights")
    assert read_run(trained, "run").doubts == {}


def test_films_say_where_they_differ_from_the_evaluations_and_on_which_device(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    config = json.loads((run / "config.json").read_text()) | {"device": "mps"}  # which no machine has that has CUDA
    (run / "config.json").write_text(json.dumps(config))
    (run / ".config.json.checksums.json").unlink()
    kinds = kinds_of(*(read_eval_info(trained / f"eval_{when}.json") for when in ("before", "after")))
    seed = next(iter(choose(kinds, 1)))
    info = json.loads((run / "eval_after.json").read_text())
    row = next(row for row in info["per_episode"] if row["seed"] == seed)
    row["success"], row["outcome"] = not row["success"], "made_up"
    info["per_episode"] = [row]
    (run / "eval_after.json").write_text(json.dumps(info))
    read = read_run(run, "run")
    films = make_films(read, 1)
    (film,) = films.shown
    assert film.seed == seed and film.remark == "the evaluation has it otherwise, after: made up"
    assert film.kind == kinds[seed] and re.search(r"filmed on (cpu|cuda), as the run's device \(mps\)", films.remark)
    asked = []
    assert "a signal stopped them" in make_films(read, 1, stopped=lambda: len(asked) > 3 or asked.append(1)).remark
    assert len(asked) == 4  # in the middle of an episode


def test_a_scene_that_cannot_be_drawn_is_tried_once(trained, monkeypatch):
    tried = []

    def no_display(act, config, seeds, title):
        tried.append(title)
        raise RenderError("no OpenGL here")

    monkeypatch.setattr("reinflow_so101.films.film_episodes", no_display)
    assert make_films(read_run(trained, "run"), 1).remark == "no films: no OpenGL here" and tried == ["before"]


def test_a_place_that_cannot_be_written_to_is_found_before_the_films(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("reinflow_so101.report.page.film_all", lambda *_: pytest.fail("films were made"))
    with pytest.raises(OSError, match="file"):
        write_report([trained], tmp_path / "file/report.html", films=1)


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    from reinflow_so101.report.after import write_page

    said = []
    run = SimpleNamespace(run_dir=tmp_path, tracker=SimpleNamespace(message=said.append))
    write_page(run, SimpleNamespace(report_episodes=4))
    assert len(said) == 1 and said[0].startswith("no report.html (") and said[0].endswith(f"reinflow-report {tmp_path}")


def test_flags(tmp_path):
    assert parse_args(["a", "b", "--films", "0"]).run_dirs == ("a", "b")
    for wrong, message in ((["a", "--films", "-1"], "films"), (["a", "--output", str(tmp_path)], "is a directory")):
        with pytest.raises(ConfigError, match=message):
            parse_args(wrong)


# --- In a browser -----------------------------------------------------------------------------------------------------


def hover(page, chart: str) -> str:
    """What a chart says of the point in its middle."""
    place = page.locator(f"#chart-{chart} .plot .nsewdrag").first
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    for share in (0.4, 0.45, 0.5):
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * 0.5)
    texts = f"[...document.querySelectorAll('#chart-{chart} .hoverlayer text')]"
    said = f"() => {texts}.map(text => text.textContent).join(' ')"
    page.wait_for_function(said, timeout=10_000)
    return page.evaluate(said)


def check(page, width: int) -> None:
    """What holds of every report in every window."""
    assert page.errors == [] and page.requests == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for section in SECTIONS:
        assert page.locator(f"#{section} h2").is_visible(), section
    for place in page.locator("[data-figure]").all():
        assert place.locator(".main-svg").count() and place.bounding_box()["width"] > 0.8 * min(width, 560) - 40


def test_a_report_with_films_in_a_browser(trained, tmp_path):
    path = make_report(parse_args([str(trained), "--films", "2", "--output", str(tmp_path / "r.html")]))
    assert path.stat().st_size <= MOST_BYTES
    run = read_run(trained, "run")
    with open_page(path, LAPTOP) as page:
        check(page, LAPTOP[0])
        rate = 100 * run.rows[1]["eval/success_rate"]
        assert f"noise-free, tuning seeds {rate:.4g}" in hover(page, "curve")
        assert re.search(r"KL \S*\d", hover(page, "kl"))
        page.fill("#search", "explained")
        shown = page.locator("[data-metric]:visible").all_text_contents()
        assert len(shown) == 1 and "ppo/explained_variance" in shown[0]
        page.click("[data-metric='ppo/explained_variance'] button")
        assert page.inner_text("#any-title") == "ppo/explained_variance"
        films = page.locator("video")
        assert films.count() == 4
        page.locator(".player button").first.click()
        for film in films.all()[:2]:  # one button plays both of a seed
            page.wait_for_function("film => film.currentTime > 0.1", arg=film.element_handle(), timeout=10_000)
            assert film.evaluate("film => film.error") is None and film.evaluate("film => film.videoWidth") >= 480
        page.locator(".player button").first.click()
        page.wait_for_function("film => film.paused", arg=films.first.element_handle())
        check(page, LAPTOP[0])


def colours(page) -> tuple[str, str, str]:
    """Of the page, of its text, and of the text in a chart."""
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    return paper, ink, page.locator("#chart-curve .xtitle").evaluate("text => getComputedStyle(text).fill")


def test_three_runs_in_the_dark_on_a_phone(trained, tmp_path):
    runs = [recorded(tmp_path / "a"), recorded(tmp_path / "b", "healthy_20_iterations", seed=4), trained]
    path = write_report(runs, tmp_path / "three.html", films=0)
    with open_page(path, PHONE, "dark") as page:
        check(page, PHONE[0])
        legend = page.locator("#chart-curve .legendtext").all_text_contents()
        assert {"a", "b", "run"} <= set(legend)
        assert colours(page) == ("rgb(18, 23, 30)", "rgb(230, 235, 242)", "rgb(230, 235, 242)")
        page.emulate_media(color_scheme="light")  # the charts follow
        page.wait_for_function("() => getComputedStyle(document.querySelector('.xtitle')).fill === 'rgb(27, 36, 48)'")
        assert colours(page) == ("rgb(255, 255, 255)", "rgb(27, 36, 48)", "rgb(27, 36, 48)")
        assert page.errors == []
