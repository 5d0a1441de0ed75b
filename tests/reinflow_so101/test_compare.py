"""reinflow-eval --compare: the playing and telling on fake policies whose successes are known, the command on real
ones."""

import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from reinflow import ConfigError, UserError
from reinflow.checksums import sha256
from reinflow.evaluate import read_eval_info
from reinflow.paired import compare_results
from reinflow_so101.commands.compare import (
    Contender,
    Contest,
    play,
    show,
    unique_names,
    what_can_be_shown,
    what_stops,
    write,
)
from reinflow_so101.commands.evaluate import find_policy, parse_args, run_compare
from reinflow_so101.policy_card import stored_env, write_card
from so101_sim.tasks.registry import describe, task_env
from tests.reinflow.test_evaluate import FakeVectorEnv
from tests.test_benchmarks import quick
from train_reinflow import PRESETS, train


class OneStepEnv(FakeVectorEnv):
    """Episodes of one control step that succeed where the seed's draw is below the action."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def step_chunk(self, actions, next_seeds=None):
        result = super().step_chunk(np.repeat(actions, 7, axis=1))
        for stats in result.episodes:
            stats.success = np.random.default_rng(stats.seed).random() < actions[stats.env, 0, 0]
        return result


class PaidEnv(OneStepEnv):
    """The same, judged by its return, which is the action."""

    objective = "return"


def policy(name, rate, noise=0.0, env=OneStepEnv):
    """Wins a seed where its draw lies below ``rate``; ``noise`` is how much that varies from seed to seed."""

    def act(observation, seeds, _decision):
        return np.array([rate + noise * (seed * 7 % 11 - 5) / 5 for seed in seeds])[:, None, None]

    return Contender(name, lambda: act, env)


def shown(comparison):
    console = Console(file=io.StringIO(), width=120)
    show(comparison, console)
    return console.file.getvalue()


def test_each_is_paired_with_the_first_on_the_same_seeds(tmp_path):
    comparison = play([policy("old", 0.5), policy("new", 0.8), policy("same", 0.5)], Contest("fake", 10_000, 300, 32))
    new, same = comparison.pairs["new"], comparison.pairs["same"]
    assert new.only_a == 0 and new.only_b == pytest.approx(90, abs=25) and new.p_value < 1e-9
    assert same.difference == 0 and same.p_value == 1
    said = shown(comparison)
    assert "new against old on the same 300 seeds: won" in said and "2 comparisons with old" in said
    assert f"won {new.only_b}: {' '.join(map(str, new.won[:12]))} ..." in said
    as_json, as_csv = write(comparison, tmp_path)
    stored = json.loads(as_json.read_text())
    assert stored["pairs"][0]["won_seeds"] == list(new.won) and stored["pairs"][1]["p_value"] == 1
    assert [p["name"] for p in stored["policies"]] == ["old", "new", "same"] and stored["seed"] == 10_000
    with as_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["seed"]) for row in rows] == list(range(10_000, 10_300))
    assert {int(row["seed"]) for row in rows if row["new"] > row["old"]} == set(new.won)


def test_a_large_difference_stops_early_and_is_the_fixed_comparisons_beginning():
    contenders = [policy("old", 0.5), policy("new", 0.8)]
    early = play(contenders, Contest("fake", 10_000, 5_000, 32, until=0.05))
    assert early.verdict == "stopped: new is better than old"
    n = early.pairs["new"].episodes
    assert n % 32 == 0 and n < 200
    assert early.pairs["new"] == play(contenders, Contest("fake", 10_000, n, 50)).pairs["new"]
    assert "stopping early" in shown(early) and shown(early).rstrip().endswith(early.verdict)
    swapped = play(contenders[::-1], Contest("fake", 10_000, 5_000, 32, until=0.05))
    assert swapped.verdict == "stopped: new is better than old"


def test_equals_are_stopped_too_and_a_cap_is_said():
    equals = [policy("a", 0.5, noise=0.1), policy("b", 0.5, noise=-0.1)]
    assert "10 points is ruled out" in play(equals, Contest("fake", 10_000, 5_000, 32, until=0.1)).verdict
    capped = play(equals, Contest("fake", 10_000, 70, 32, until=0.02))
    assert capped.verdict.startswith("undecided: 70 episodes") and capped.pairs["b"].episodes == 70


def stopping(contender, after):
    """The same, but its policy meets a Ctrl-C at the decision behind ``after``."""
    act, made = contender.load(), iter(range(after))

    def act_or_stop(*seen):
        if next(made, None) is None:
            raise KeyboardInterrupt
        return act(*seen)

    return replace(contender, load=lambda: act_or_stop)


def test_ctrl_c_keeps_the_pairs_of_a_sequential_comparison(tmp_path):
    """The third batch of the second policy is cut off, after the first one has played it."""
    contenders = [policy("a", 0.5, noise=0.1), stopping(policy("b", 0.5, noise=-0.1), 2)]
    comparison = play(contenders, Contest("fake", 10_000, 5_000, 32, until=0.02))
    assert [len(result.episodes) for result in comparison.results.values()] == [64, 64]
    assert comparison.verdict.startswith("undecided, stopped: 64 episodes") and comparison.stopped
    assert "undecided, stopped" in shown(comparison)
    stored = json.loads(write(comparison, tmp_path)[0].read_text())
    assert stored["verdict"] == comparison.verdict and stored["seeds"] == [10_000, 10_063]
    assert sum(stored["pairs"][0][name] for name in ("both", "only_a", "only_b", "neither")) == 64
    with pytest.raises(KeyboardInterrupt):
        play([contenders[0], stopping(policy("b", 0.5), 0)], Contest("fake", 10_000, 5_000, 32, until=0.02))


def test_ctrl_c_keeps_the_policies_that_are_finished(tmp_path):
    contenders = [policy("a", 0.5), policy("b", 0.8), stopping(policy("c", 0.5), 1)]
    comparison = play(contenders, Contest("fake", 10_000, 64, 32))
    assert list(comparison.results) == ["a", "b"] and comparison.pairs["b"].episodes == 64
    assert "stopped by hand: c not finished, so left out" in shown(comparison)
    assert json.loads(write(comparison, tmp_path)[0].read_text())["stopped"] == comparison.stopped
    alone = play([contenders[0], contenders[2]], Contest("fake", 10_000, 64, 32))
    assert list(alone.results) == ["a"] and alone.pairs == {} and "a: success" in shown(alone)
    assert json.loads(write(alone, tmp_path)[0].read_text())["pairs"] == []
    with pytest.raises(KeyboardInterrupt):
        play(contenders[::-1], Contest("fake", 10_000, 64, 32))


def test_ctrl_c_ends_the_command_with_one_line(tmp_path, monkeypatch):
    from reinflow_so101.commands import evaluate

    made, load = [], evaluate.load_actor

    def load_twice(config, policy_dir):
        made.append(policy_dir)
        if len(made) == 2:
            raise KeyboardInterrupt
        return load(config, policy_dir)

    monkeypatch.setattr(evaluate, "load_actor", load_twice)
    flags = ["--compare", "flow_mlp", "flow_mlp", "--episodes", "2", "--output-dir", str(tmp_path / "c")]
    with pytest.raises(UserError, match="stopped by hand: what was finished is in"):
        evaluate.run(parse_args(flags))
    assert len(json.loads((tmp_path / "c/compare.json").read_text())["policies"]) == 1

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_actor", stop)
    for flags in (["--compare", "flow_mlp", "flow_mlp"], ["--policy-path", "flow_mlp"]):
        with pytest.raises(UserError, match="nothing was written"):
            evaluate.run(parse_args([*flags, "--output-dir", str(tmp_path / "d")]))
        assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["x[/a]", "[bold]/p", "[red]"])
def test_names_are_shown_as_they_are(name, monkeypatch):
    """On a terminal too, where a bar bears the name."""
    from reinflow import progress

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    monkeypatch.setattr(progress, "SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(progress.rich, "get_console", lambda: console)
    comparison = play([policy(name, 0.5), policy(f"{name}{name}", 0.8)], Contest("fake", 10_000, 40, 8))
    assert f"{name}, episodes" in console.file.getvalue()
    said = shown(comparison)
    for text in (f"{name}: success", f"{name} succeeds", f"{name}{name} fails", f"{name}{name} against {name} on"):
        assert text in said


def test_what_was_played_is_filed(tmp_path, capsys):
    flags = ["--compare", "flow_mlp", str(find_policy("flow_mlp")), "--episodes", "2", "--num-denoising-steps", "2"]
    comparison = run_compare(parse_args([*flags, "--output-dir", str(tmp_path / "c")]))
    stored = json.loads((tmp_path / "c/compare.json").read_text())
    assert stored["task"] == comparison.contest.task == describe(stored_env(find_policy("flow_mlp")))
    weights = sha256(find_policy("flow_mlp") / "model.safetensors")
    said = capsys.readouterr().out
    for played in stored["policies"]:
        assert played["directory"] == str(find_policy("flow_mlp").resolve()) and played["sha256"] == weights
        assert played["num_denoising_steps"] == 2 and played["n_action_steps"] > 0
        assert f"{played['name']}: {played['directory']}, weights {weights[:12]}, K 2" in said
    assert stored["seeds"] == [10_000, 10_001]


def test_what_is_judged_by_return_is_compared_by_return(tmp_path):
    paid = [policy("old", 1.0, env=PaidEnv), policy("new", 2.0, noise=0.5, env=PaidEnv)]
    comparison = play(paid, Contest("fake", 10_000, 44, 8))
    paired = comparison.pairs["new"]
    by_hand = [row.return_ - 1.0 * row.length for row in comparison.results["new"].episodes]
    assert paired.difference == pytest.approx(np.mean(by_hand)) and paired.p_value < 1e-6
    assert "mean difference of the returns +" in shown(comparison) and "McNemar" not in shown(comparison)
    as_json, as_csv = write(comparison, tmp_path)
    assert json.loads(as_json.read_text())["pairs"][0]["difference"] == paired.difference
    with as_csv.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["new"]) - float(row["old"]) == pytest.approx(by_hand[0])


def test_what_n_can_show_is_said_before():
    assert "10 %: 6.2 points" in what_can_be_shown(200) and "warning" not in what_can_be_shown(200)
    assert "5 %: none" in what_can_be_shown(50) and "warning: fewer than 200" in what_can_be_shown(50)
    assert "warning" in what_stops(Contest("fake", 0, 200, 32, until=0.03))
    assert "10 %: 1,635" in what_stops(Contest("fake", 0, 20_000, 32, until=0.03))
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_a_policy_against_itself_by_the_command(tmp_path, capsys):
    flags = ["--compare", "flow_mlp", "flow_mlp", "--episodes", "24", "--output-dir", str(tmp_path / "c")]
    comparison = run_compare(parse_args(flags))
    (paired,) = comparison.pairs.values()
    assert paired.difference == 0 and paired.p_value == 1 and 0 < paired.both < 24
    said = " ".join(capsys.readouterr().out.split())
    assert "task: lift (" in said and "warning: fewer than 200 episodes" in said and "p = 1 (McNemar, exact)" in said
    for name in ("compare.json", "compare.csv"):
        assert f"wrote {tmp_path}/c/{name}" in said and (tmp_path / "c" / name).is_file()
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        run_compare(parse_args(flags))


def test_different_tasks_are_refused_unless_one_is_said(tmp_path):
    other = tmp_path / "wide"
    shutil.copytree(find_policy("flow_mlp"), other, ignore=shutil.ignore_patterns("checksums.json"))
    write_card(other, task_env("lift_wide", render_images=False, environment_state=True))
    flags = ["--compare", "flow_mlp", str(other), "--episodes", "2", "--output-dir", str(tmp_path / "c")]
    with pytest.raises(ConfigError, match=r"different tasks \(flow_mlp: lift \(.*: lift_wide \(.*--task lift \|"):
        run_compare(parse_args(flags))
    assert not (tmp_path / "c").exists()
    comparison = run_compare(parse_args([*flags, "--task", "lift"]))
    assert comparison.contest.task.startswith("lift (") and comparison.contest.task.endswith(")")
    (paired,) = comparison.pairs.values()
    assert paired.difference == 0  # the same weights in the same task
    longer = run_compare(
        parse_args([*flags[:-1], str(tmp_path / "d"), "--task", "lift", "--env.max-steps-per-episode", "50"])
    )
    assert {row.length for result in longer.results.values() for row in result.episodes} == {50}  # both of them


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--policy-path", "tiny", "--compare", "tiny", "tiny"], "both are given"),
        ([], "neither is given"),
        (["--compare", "tiny"], "one policy"),
        (["--policy-path", "tiny", "--until", ".03"], "comparison of two"),
        (["--compare", "tiny", "tiny", "tiny", "--until", ".03"], "comparison of two"),
        (["--compare", "tiny", "tiny", "--until", ".9"], "until must"),
        (["--compare", "tiny", "tiny", "--video"], "video shows one policy"),
        (["--compare", "tiny", "nosuch"], "compare=nosuch is no run"),
    ],
)
def test_what_makes_no_comparison_is_refused(tmp_path, flags, problem):
    from reinflow_so101.commands.evaluate import run

    with pytest.raises(ConfigError, match=problem):
        run(parse_args([*flags, "--output-dir", str(tmp_path / "c")]))
    assert not (tmp_path / "c").exists()


def test_until_has_a_cap_of_its_own(tmp_path):
    flags = ["--compare", "tiny", "tiny", "--output-dir", str(tmp_path)]
    assert parse_args(flags).episodes == 200 and parse_args([*flags, "--until", ".03"]).episodes == 20_000
    assert parse_args([*flags, "--until", ".03", "--episodes", "700"]).episodes == 700
    for nothing in ("0", "0.0"):
        assert parse_args([*flags, "--until", nothing]).episodes == 200


def test_the_first_noise_is_the_seeds_and_measured(tmp_path):
    (row,) = quick("first_noise", tmp_path)[""]
    assert row["outcomes that change with the same x_0"] == "0" and 0 <= int(row["outcomes that change"]) <= 8


def test_a_training_says_what_it_changed_seed_by_seed(tmp_path, capsys):
    config = replace(
        PRESETS["flow_mlp"], output_dir=str(tmp_path / "run"), num_episodes=4, episodes_per_iteration=4,
        num_parallel_envs=4, minibatch_size=6, gradient_accumulation_steps=1, eval_interval=0,
        report_episodes=6, wandb_enabled=False,
    )  # fmt: skip
    train(config)
    said = capsys.readouterr().out
    before, after = (read_eval_info(tmp_path / "run" / f"eval_{when}.json") for when in ("before", "after"))
    assert compare_results(before, after).summary("before", "after") in said
    assert "after against before on the same 6 seeds: won" in said
