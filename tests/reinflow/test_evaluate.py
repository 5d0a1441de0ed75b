"""Evaluation on fake environments: batching, early ends, the interval, LeRobot's format, videos."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from reinflow import video
from reinflow.env import Extra
from reinflow.evaluate import (
    EpisodeRow,
    EvalInfoError,
    EvalResult,
    EvaluationError,
    evaluate,
    even_batch,
    read_eval_info,
    wilson_interval,
    write_eval_info,
    write_rows,
)
from reinflow.metrics import check_names, known_metrics

HEIGHT = {"max_height": Extra("Greatest height, metres.", "max height {:.3f} m", "m")}


@given(episodes=st.integers(1, 2000), num_envs=st.integers(1, 128))
def test_even_batches_are_as_few_and_as_full_as_can_be(episodes, num_envs):
    size = even_batch(episodes, num_envs)
    batches = -(-episodes // num_envs)
    assert 1 <= size <= num_envs
    assert -(-episodes // size) == batches
    assert batches * size - episodes < batches


class FakeVectorEnv:
    """Episode of seed s lasts s % 7 + 1 control steps; each step's reward is the action; odd seeds succeed."""

    extras = HEIGHT

    def __init__(self, num_envs, autoreset=False):
        self.num_envs, self.autoreset = num_envs, autoreset
        self.resets, self.pieces = [], []

    def reset(self, seeds):
        assert len(seeds) == self.num_envs
        self.resets.append(list(seeds))
        self.seeds, self.steps = list(seeds), np.zeros(self.num_envs, dtype=int)
        self.returns = np.zeros(self.num_envs)
        return self._observation()

    def _observation(self):
        level = np.minimum(self.steps * 20, 255).astype(np.uint8)
        images = np.broadcast_to(level[:, None, None, None], (self.num_envs, 9, 7, 3))
        return {"pixels": {"up": images, "wrist": images // 2}, "seeds": np.array(self.seeds)}

    def step_chunk(self, actions, next_seeds=None):
        num_steps = actions.shape[1]
        self.pieces.append(num_steps)
        rewards, active = np.zeros((self.num_envs, num_steps)), np.zeros((self.num_envs, num_steps), dtype=bool)
        episodes = []
        for env, seed in enumerate(self.seeds):
            for i in range(num_steps):
                if self.steps[env] > seed % 7:
                    continue
                self.steps[env] += 1
                rewards[env, i], active[env, i] = actions[env, i, 0], True
                self.returns[env] += rewards[env, i]
                if self.steps[env] > seed % 7:
                    episodes.append(
                        SimpleNamespace(
                            env=env, seed=seed, return_=self.returns[env], length=int(self.steps[env]),
                            success=np.bool_(seed % 2), extras={"max_height": 0.01 * seed},
                        )
                    )  # fmt: skip
        if self.autoreset:
            for stats in episodes:
                self.seeds[stats.env], self.steps[stats.env] = 1000 + stats.env, 0
        return SimpleNamespace(observation=self._observation(), rewards=rewards, active=active, episodes=episodes)


def act(observation, _seeds, _decision):
    """Three actions: the seed, then smaller."""
    seeds = observation["seeds"].astype(float)
    return np.stack([seeds, seeds - 1, seeds - 2], axis=1)[:, :, None]


@pytest.mark.parametrize("num_envs", [1, 3, 4, 10])
def test_results_do_not_depend_on_the_number_of_environments(num_envs):
    seeds = [5, 0, 6, 1, 13, 2, 8]
    env = FakeVectorEnv(num_envs)
    result = evaluate(act, env, seeds)
    alone = evaluate(act, FakeVectorEnv(1), seeds)
    assert result.episodes == alone.episodes
    assert [row.seed for row in result.episodes] == seeds
    assert [row.length for row in result.episodes] == [seed % 7 + 1 for seed in seeds]
    assert result.num_successes == 3
    assert result.success_rate == pytest.approx(3 / 7)
    assert all(len(batch) == num_envs for batch in env.resets)


def test_row_of_one_episode():
    (row,) = evaluate(act, FakeVectorEnv(1), [3]).episodes
    assert row == EpisodeRow(
        seed=3, success=True, return_=3 + 2 + 1 + 3, length=4, max_reward=3.0, extras={"max_height": 0.03}
    )
    assert type(row.success) is bool


def test_frames_come_after_every_piece_and_change_no_trajectory():
    calls = []
    env = FakeVectorEnv(3)
    pieces = evaluate(act, env, [6, 3, 9, 4], lambda seeds, obs: calls.append((tuple(seeds), obs)), frame_interval=1)
    assert set(env.pieces) == {1}
    assert pieces.episodes == evaluate(act, FakeVectorEnv(3), [6, 3, 9, 4]).episodes
    assert [seeds for seeds, _ in calls] == [(6, 3, 9)] * 8 + [(4,)] * 6  # reset, then one per control step


def test_environments_that_reset_by_themselves_are_refused():
    with pytest.raises(EvaluationError, match="given no seed"):
        evaluate(act, FakeVectorEnv(2, autoreset=True), [0, 6])


def test_environments_that_play_other_seeds_are_refused():
    env = FakeVectorEnv(2)
    deaf = SimpleNamespace(num_envs=2, extras={}, reset=lambda seeds: env.reset([8, 9]), step_chunk=env.step_chunk)
    with pytest.raises(EvaluationError, match="seed 8 instead of 1"):
        evaluate(act, deaf, [1, 2])


def test_environments_that_never_end_are_refused():
    env = FakeVectorEnv(2)
    silent = SimpleNamespace(num_envs=2, extras={}, reset=env.reset)
    silent.step_chunk = lambda actions: SimpleNamespace(**(vars(env.step_chunk(actions)) | {"episodes": []}))
    with pytest.raises(EvaluationError, match=r"\[0, 1\] neither run"):
        evaluate(act, silent, [1, 2])
    with pytest.raises(ValueError, match="at least one seed"):
        evaluate(act, env, [])


def test_wilson_interval_by_hand():
    low, high = wilson_interval(63, 100)
    assert (low, high) == (pytest.approx(0.5322, abs=1e-4), pytest.approx(0.7182, abs=1e-4))
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    for bad in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="no interval"):
            wilson_interval(*bad)
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(1, 2, confidence=95)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_rate_and_narrows(counts):
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    narrow = wilson_interval(4 * successes, 4 * n)
    assert narrow[1] - narrow[0] < high - low
    wide = wilson_interval(successes, n, confidence=0.99)
    assert wide[0] <= low
    assert high <= wide[1]


def result_of_four():
    rows = [EpisodeRow(i, i == 0, -1.5 * i, 100 + i, 0.1 * i, {"max_height": 0.02}) for i in range(4)]
    return EvalResult(tuple(rows), elapsed_s=2.0, extras=HEIGHT, video_paths=["a.mp4"])


def test_eval_info_has_the_keys_of_lerobot(tmp_path):
    path = write_eval_info(tmp_path / "out" / "eval_info.json", result_of_four().to_lerobot_info("so101"))
    info = json.loads(path.read_text())
    assert list(info) == ["per_task", "per_group", "overall", "per_episode"]
    lerobot_overall = {
        "avg_sum_reward", "avg_max_reward", "pc_success", "n_episodes", "eval_s", "eval_ep_s", "video_paths",
        "predicted_video_paths",
    }  # fmt: skip
    overall = info["overall"]
    assert set(overall) == lerobot_overall | {"pc_success_ci95", "avg_episode_length", "avg_max_height_m"}
    assert overall["pc_success"] == 25.0
    assert overall["n_episodes"] == 4
    assert overall["eval_ep_s"] == 0.5
    assert overall["avg_sum_reward"] == pytest.approx(-2.25)
    assert overall["avg_max_reward"] == pytest.approx(0.15)
    assert overall["pc_success_ci95"] == pytest.approx([4.56, 69.94], abs=0.01)
    assert set(info["per_group"]["so101"]) == lerobot_overall - {"eval_s", "eval_ep_s"}
    assert info["per_task"][0]["task_group"] == "so101"
    assert info["per_task"][0]["metrics"]["successes"] == [True, False, False, False]
    first = info["per_episode"][0]
    assert {"episode_ix", "sum_reward", "max_reward", "success", "seed", "length", "max_height_m"} == set(first)


OUTCOMES = {"done": "It was done.", "near_miss": "It was nearly done.", "nothing": "Nothing happened."}
WHERE = {"east": Extra("Where it began.", "east {:.1f} m", "m"), "late": Extra("Only of some.", "late {:.1f}")}


def result_of_many(n=30):
    """Every third succeeds, in 40 to 69 control steps; two failures of three are near misses."""
    rows = []
    for i in range(n):
        outcome = "done" if i % 3 == 0 else "near_miss" if i % 9 else "nothing"
        outcome = "nothing" if i % 9 == 1 else outcome
        facts = {"east": 0.1 * i} | ({"late": 1.0} if i % 2 else {})
        rows.append(EpisodeRow(100 + i, i % 3 == 0, 0.5 * i, 40 + i, 1.5, {"max_height": 0.01 * i}, outcome, facts))
    return EvalResult(
        tuple(rows), 3.0, HEIGHT, ["v.mp4"], (101, 102), outcomes=OUTCOMES, facts=WHERE, start_facts=("east",)
    )


@pytest.mark.parametrize("objective", ["success", "return"])
def test_an_evaluation_is_read_back_as_it_was(tmp_path, objective):
    result = replace(result_of_many(), objective=objective)
    assert read_eval_info(write_eval_info(tmp_path / "e.json", result.to_lerobot_info("x"))) == result
    plain = read_eval_info(write_eval_info(tmp_path / "p.json", result_of_four().to_lerobot_info("x")))
    assert plain.extra_mean("max_height_m") == 0.02  # nobody explained it, so the unit is part of its name
    assert [replace(row, extras={}) for row in plain.episodes] == [
        replace(r, extras={}) for r in result_of_four().episodes
    ]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text, info: text[:-40], "holds no evaluation"),
        (lambda text, info: "[]", "holds no evaluation"),
        (lambda text, info: json.dumps(info | {"per_episode": []}), "per_episode is empty"),
        (lambda text, info: json.dumps({k: v for k, v in info.items() if k != "overall"}), "overall is missing"),
        (lambda text, info: text.replace('"seed": 105', '"sead": 105'), "seed is missing"),
        (lambda text, info: text.replace('"success": true', '"success": 1', 1), "success 1"),
        (lambda text, info: text.replace('"max_height_m": 0.05', '"height": 0.05'), "max_height_m is missing"),
        (lambda text, info: json.dumps(info | {"objective": "speed"}), "objective is 'speed'"),
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path, damage, said):
    path = write_eval_info(tmp_path / "eval_info.json", result_of_many().to_lerobot_info("x"))
    text = path.read_text()
    path.write_text(damage(text, json.loads(text)))
    assert path.read_text() != text
    with pytest.raises(EvalInfoError, match=said) as caught:
        read_eval_info(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(EvalInfoError, match="No such file"):
        read_eval_info(tmp_path / "gone.json")


def test_many_episodes_are_told_by_how_they_failed():
    result, console = result_of_many(), Console(file=io.StringIO(), width=100)
    assert result.failures() == {"near_miss": 16, "nothing": 4}
    result.print(console)
    shown = console.file.getvalue()
    assert (
        "20 of 30 failed" in shown
        and "It was nearly done." in shown
        and "53.3 %" in shown
        and "It was done" not in shown
    )
    assert "103" not in shown  # no seed's row
    assert result_of_four().failures() == {}


def test_returns_that_are_not_finite_are_left_out_of_the_mean_and_counted(tmp_path):
    """A simulation that broke down may leave NaN as its return and its greatest reward."""
    rows = [EpisodeRow(i, False, r, 5, m) for i, (r, m) in enumerate([(1.0, 1.0), (math.nan, math.nan), (3.0, 2.0)])]
    result = EvalResult(tuple(rows), 1.0, broken_seeds=(1,), objective="return")
    assert result.return_mean == 2 and result.return_error == pytest.approx(1.0) and result.left_out == 1
    assert result.score == 2 and result.summary().startswith("return 2.0 +- 2.0")
    assert result.summary().endswith("1 without a finite return, left out of its mean")
    info = result.to_lerobot_info("x")
    assert (info["overall"]["avg_sum_reward"], info["overall"]["avg_max_reward"]) == (2, 1.5)
    assert read_eval_info(write_eval_info(tmp_path / "e.json", info)).return_mean == 2
    lost = EvalResult(tuple(rows[1:2]), 1.0, broken_seeds=(1,), objective="return")
    assert math.isnan(lost.return_mean) and lost.return_error == 0 and "return nan" in lost.summary()


def test_markup_in_an_environments_words_is_shown_as_it_is():
    named = {"x[/a]": "[bold]/p", "[red]": "y[/]"}
    rows = tuple(EpisodeRow(i, False, 0.0, 1, 0.0, {"[/b]": 1.0}, outcome) for i, outcome in enumerate(named))
    result, console = (
        EvalResult(rows, 1.0, {"[/b]": Extra("", "[/b] {:.1f}")}, outcomes=named),
        Console(file=io.StringIO(), width=200),
    )
    result.print(console)
    for word in ("x[/a]", "[bold]/p", "[red]", "y[/]", "[/b] 1.0"):
        assert word in console.file.getvalue()


def test_pace_by_hand():
    """Successes take 40, 43, ..., 67 control steps; all 30 episodes 1,635."""
    said = result_of_many().pace(control_hz=10)
    assert said.startswith("time to success: 5.35 s on average, 9 of 10 within 6.40 s; 3.7 successes a minute")
    assert replace(result_of_many(), objective="return").pace(10) == ""


def test_rows_as_csv(tmp_path):
    path = write_rows(tmp_path / "episodes.csv", result_of_many())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and [int(row["seed"]) for row in rows] == list(range(100, 130))
    assert rows[4]["outcome"] == "near_miss" and float(rows[4]["east"]) == pytest.approx(0.4) and rows[4]["late"] == ""
    assert float(rows[5]["late"]) == 1.0 and float(rows[5]["max_height_m"]) == 0.05


def test_a_bar_counts_the_episodes_without_the_padding(monkeypatch):
    """Below another bar that is shown already, as a training's is."""
    from rich.progress import Progress

    from reinflow import progress

    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    monkeypatch.setattr(progress, "SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(progress.rich, "get_console", lambda: console)
    done = []
    advance = Progress.update
    monkeypatch.setattr(Progress, "update", lambda bar, *a, **k: (done.append(k["advance"]), advance(bar, *a, **k)))
    with Progress(console=console) as training:
        training.add_task("training", total=3)
        evaluate(act, FakeVectorEnv(3), [6, 3, 9, 4], label="these, episodes")
    assert sum(done) == 4
    shown = console.file.getvalue()
    assert "training" in shown and "these, episodes" in shown


def test_metrics_are_explained_and_the_report_prints():
    result = result_of_four()
    check_names(result.metrics(), known_metrics(HEIGHT))
    assert result.metrics()["eval/ci_low"] == result.interval[0]
    console = Console(file=io.StringIO(), width=100)
    result.print(console)
    shown = console.file.getvalue()
    assert "success 25.0 % (1/4), 95 % interval 4.6-69.9 %" in shown
    assert "max height 0.020 m" in shown
    assert "103" in shown


def test_recorder_keeps_the_first_batch_as_a_grid():
    recorder = video.EpisodeRecorder(num_episodes=2)
    evaluate(act, FakeVectorEnv(3), [6, 3, 9, 4], recorder, frame_interval=1)
    assert len(recorder.frames) == 8
    assert recorder.frames[0].shape == (2 * 9, 2 * 7, 3)
    last = recorder.frames[-1]
    assert last[0, 0, 0] == 140
    assert last[0, 7, 0] == 70
    assert last[9, 0, 0] == 80  # that of seed 3 ended after 4 steps and stands still


def test_tiling_refuses_what_does_not_fit():
    small, large = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="different image sizes"):
        video.tile_frames({"a": small, "b": large}, [0])
    with pytest.raises(ValueError, match="at least one"):
        video.tile_frames({}, [0])


def moving_square():
    for i in range(6):
        frame = np.full((33, 47, 3), 30, np.uint8)
        frame[5:25, 4 * i : 4 * i + 12] = (220, 40, 40)
        yield frame


def test_mp4_holds_the_frames(tmp_path):
    path = video.write_mp4(tmp_path / "v" / "grid.mp4", moving_square(), fps=25)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 25
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 6
    assert frames[0].shape == (34, 48, 3)
    for frame, expected in zip(frames, moving_square(), strict=True):
        assert np.abs(frame[:33, :47].astype(int) - expected).mean() < 12
    with pytest.raises(ValueError, match="no frames"):
        video.write_mp4(tmp_path / "empty.mp4", [], fps=25)


def test_gif_holds_the_frames(tmp_path):
    with Image.open(video.write_gif(tmp_path / "grid.gif", moving_square(), fps=10)) as image:
        assert image.n_frames == 6
        assert image.size == (47, 33)
        assert image.info["duration"] == 100
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - next(moving_square())).mean() < 5
    with pytest.raises(ValueError, match="no frames"):
        video.write_gif(tmp_path / "empty.gif", [], fps=10)
