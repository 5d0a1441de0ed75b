"""reinflow-eval on policies that are not ours, and its refusals."""

import json
import re
import shutil

import pytest

from reinflow import ConfigError
from reinflow.checksums import sha256
from reinflow.evaluate import read_eval_info
from reinflow_so101.command_line import field_docs
from reinflow_so101.commands.evaluate import EvalConfig, find_policy, parse_args, run_eval
from reinflow_so101.policy_card import known_env, stored_env, write_card
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe, nearest_task, task_env


@pytest.fixture(scope="module")
def act_policy(tmp_path_factory):
    """A small stock ACT policy with our cameras and joints, written by LeRobot itself."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    from reinflow_so101.stages.build_smolvla import identity_stats

    directory = tmp_path_factory.mktemp("act")
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            "observation.images.camera_up": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
        device="cpu", chunk_size=50, n_action_steps=50, dim_model=32, n_heads=2, dim_feedforward=32,
        n_encoder_layers=1, n_decoder_layers=1, n_vae_encoder_layers=1, pretrained_backbone_weights=None,
    )  # fmt: skip
    policy = ACTPolicy(config)
    stats = identity_stats() | {"observation.images.camera_up": {"mean": [[[0.5]]] * 3, "std": [[[0.5]]] * 3}}
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    policy.save_pretrained(directory)
    before.save_pretrained(directory)
    after.save_pretrained(directory)
    return directory


def test_any_stock_policy_with_matching_features(act_policy, tmp_path):
    env = stored_env(act_policy)
    assert env.cameras == ("camera_up",) and env.image_size == 64
    config = EvalConfig(policy_path=str(act_policy), output_dir=str(tmp_path / "e"), episodes=2, env=env)
    result = run_eval(config)
    assert [e.seed for e in result.episodes] == [10_000, 10_001]
    assert "pc_success" in json.loads((tmp_path / "e/eval_info.json").read_text())["overall"]
    with pytest.raises(ConfigError, match="output_dir"):
        run_eval(config)


def test_flags_change_the_environment_that_the_policy_brings(act_policy, tmp_path):
    config = parse_args(
        ["--policy-path", str(act_policy), "--output-dir", str(tmp_path), "--env.randomize-block", "--episodes", "7"]
    )
    assert config.env.randomize_block and config.env.image_size == 64 and config.episodes == 7


def test_what_is_no_policy_is_named(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        find_policy(str(tmp_path))
    with pytest.raises(ConfigError, match="episodes"):
        run_eval(EvalConfig(policy_path="x", output_dir=str(tmp_path), episodes=0))


def test_help_says_of_every_field_what_that_field_is(capsys):
    """Each option's own text, between its name and the next one's."""
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    parts = [part.strip() for part in re.split(r"(?= --[a-z])", shown)]
    options = {part.split(" ", 1)[0].rstrip(","): part for part in parts}
    for kind, prefix in ((EvalConfig, "--"), (EnvConfig, "--env.")):
        for name, text in field_docs(kind).items():
            if name == "env":  # the heading of its own group
                assert text in shown
                continue
            flag = name.replace("_", "-")
            option = options[prefix + flag]
            if " " not in option:  # a switch: the text stands with its opposite
                option = options[f"{prefix}no-{flag}"]
            assert text in option, (name, option)


@pytest.mark.parametrize("flag", [{"rename_map": "{}"}, {"joint_frame": "lerobot"}, {"normalization": "policy"}])
def test_flags_that_a_policy_does_not_read_are_refused(act_policy, tmp_path, flag):
    for policy in (str(act_policy), "flow_mlp"):
        with pytest.raises(ConfigError, match=f"{next(iter(flag))} not read by a (act|flow_mlp) policy"):
            run_eval(EvalConfig(policy, str(tmp_path / "e"), env=stored_env(find_policy(policy)), **flag))


def test_it_says_which_task_is_played_and_why(act_policy, tmp_path, capsys):
    """A policy of LeRobot's own training, which says of no task: what is played is said, and that it is one scene."""
    flags = ["--policy-path", str(act_policy), "--episodes", "2", "--output-dir"]
    run_eval(parse_args([*flags, str(tmp_path / "a")]))
    said = " ".join(capsys.readouterr().out.split())
    assert "task: lift_fixed (" in said and "says of no task; --task lift | lift_wide | lift_fixed chooses" in said
    assert "warning: all 2 seeds show the same scene" in said
    config = parse_args([*flags, str(tmp_path / "b"), "--task", "lift_wide", "--env.block-yaw-deg", "5"])
    assert config.env.block_angle_deg == 60.0 and config.env.block_yaw_deg == 5.0
    assert config.env.cameras == ("camera_up",) and config.env.image_size == 64  # the policy's
    run_eval(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "with block_yaw_deg=5.0; as --task says" in said and "warning" not in said
    with pytest.raises(ConfigError, match="task=lfit is unknown"):
        parse_args([*flags, str(tmp_path / "c"), "--task", "lfit"])


def test_the_task_of_lerobots_training_is_found(act_policy, tmp_path, capsys):
    """lerobot-train forgets reinflow.json, and writes down its data set and the environment it evaluated in."""
    policy = tmp_path / "policy"
    shutil.copytree(act_policy, policy)
    assert known_env(policy) is None
    data = tmp_path / "data"
    (data / "meta").mkdir(parents=True)
    write_card(data / "meta", task_env("lift_wide"))
    config = {"dataset": {"root": str(data)}, "env": None}
    (policy / "train_config.json").write_text(json.dumps(config))
    env, where = known_env(policy)
    assert nearest_task(env) == "lift_wide" and where == data / "meta/reinflow.json"
    assert env.cameras == ("camera_up",) and env.image_size == 64
    played = {"env": {"type": "so101_reinflow", "task": "lift"}}
    (policy / "train_config.json").write_text(json.dumps(config | played))
    assert nearest_task(known_env(policy)[0]) == "lift_wide"  # what the data is of counts
    (data / "meta/reinflow.json").unlink()
    env, where = known_env(policy)
    assert nearest_task(env) == "lift" and where == policy / "train_config.json"
    (policy / "train_config.json").write_text(json.dumps({"dataset": {"root": str(tmp_path / "gone")}}))
    assert known_env(policy) is None


@pytest.mark.parametrize("content", [{"env": []}, {"env": None}, {"task": 5}, {}])
def test_a_damaged_card_is_no_missing_one(act_policy, tmp_path, content):
    policy = tmp_path / "policy"
    shutil.copytree(act_policy, policy)
    (policy / "reinflow.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"reinflow.json holds no environment"):
        stored_env(policy)


def test_another_rate_than_the_policys_is_said_and_an_empty_folder_goes(tmp_path, capsys):
    flags = ["--policy-path", "tiny", "--episodes", "1", "--output-dir"]
    run_eval(parse_args([*flags, str(tmp_path / "a"), "--env.control-hz", "33.3"]))
    assert "driven at 33.3 control steps a second; the policy was made for 50" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        run_eval(parse_args([*flags, str(tmp_path / "b"), "--normalization", "nosuch"]))
    assert not (tmp_path / "b").exists()
    (tmp_path / "mine").mkdir()
    for own, gone in (("mine", False), ("mine/new", True), ("fresh/deep", True)):
        with pytest.raises(ConfigError):
            run_eval(parse_args([*flags, str(tmp_path / own), "--normalization", "nosuch"]))
        assert (tmp_path / own).exists() is not gone
    assert not (tmp_path / "fresh").exists()


def test_what_cannot_work_is_refused_before_anything_is_played(tmp_path):
    for changes, problem in (
        ({"seed": -1}, "seed must"), ({"episodes": 0}, "episodes must"), ({"num_parallel_envs": 0}, "num_parallel"),
        ({"video_episodes": 33}, "video_episodes must"), ({"n_action_steps": -1}, "n_action_steps must"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=problem):
            run_eval(EvalConfig("tiny", str(tmp_path / "eval"), **changes))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file: choose a directory"):
        run_eval(EvalConfig("tiny", str(tmp_path / "file")))
    with pytest.raises(OSError, match="Not a directory"):
        run_eval(EvalConfig("tiny", str(tmp_path / "file/eval")))


@pytest.mark.parametrize("env", [{"cameras": 5}, {"image_size": "big"}, {"starting_position": [1]}, {"reward_mode": 1}])
def test_a_card_with_nonsense_is_one_line(tmp_path, env):
    (tmp_path / "reinflow.json").write_text(json.dumps({"env": env}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=next(iter(env))):
        stored_env(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("no\nOpenGL"), KeyboardInterrupt()])
def test_a_film_that_fails_takes_no_result_with_it(tmp_path, monkeypatch, capsys, error):
    from reinflow_so101 import films
    from reinflow_so101.commands import evaluate

    def fail(*_):
        raise error

    monkeypatch.setattr(films, "film_episodes", fail)
    out = tmp_path / "e"
    monkeypatch.setattr(
        "sys.argv",
        ["reinflow-eval", "--policy-path", "flow_mlp", "--episodes", "3", "--output-dir", str(out), "--video"],
    )
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    why = "stopped by hand" if isinstance(error, KeyboardInterrupt) else "no OpenGL"
    assert ended.value.code.startswith(f"reinflow-eval: the evaluation is kept in {out}, its video failed ({why})")
    assert "\n" not in ended.value.code and "success " in capsys.readouterr().out
    result = read_eval_info(out / "eval_info.json")
    assert len(result.episodes) == 3 and result.video_paths == [] and (out / "episodes.csv").is_file()


def test_the_evaluation_says_which_policy_was_played(act_policy, tmp_path, capsys):
    run_eval(parse_args(["--policy-path", "flow_mlp", "--episodes", "1", "--output-dir", str(tmp_path / "m")]))
    run_eval(parse_args(["--policy-path", str(act_policy), "--episodes", "1", "--output-dir", str(tmp_path / "a")]))
    said = capsys.readouterr().out
    for name, directory, sizes in (
        ("m", find_policy("flow_mlp"), {"num_denoising_steps", "n_action_steps"}),
        ("a", act_policy, {"n_action_steps"}),
    ):
        info = json.loads((tmp_path / name / "eval_info.json").read_text())
        played = info["policy"]
        assert played["directory"] == str(directory.resolve()) and set(played) == {"directory", "sha256"} | sizes
        assert played["sha256"] == sha256(directory / "model.safetensors") and played["n_action_steps"] > 0
        assert f"policy: {played['directory']}, weights {played['sha256'][:12]}" in said
        assert info["task"] == describe(stored_env(directory))


def test_what_came_out_is_told_and_filed_and_failures_are_filmed_first(tmp_path, capsys):
    out = tmp_path / "e"
    flags = ["--policy-path", "flow_mlp", "--episodes", "80", "--output-dir", str(out), "--video", "--gif"]
    result = run_eval(parse_args([*flags, "--video-episodes", "2"]))
    said = " ".join(capsys.readouterr().out.split())
    failed = [row.seed for row in result.episodes if not row.success]
    assert 2 < len(failed) < 80
    assert f"video: 2 of {len(failed)} failures, 0 successes; seeds {failed[0]}, {failed[1]}" in said
    assert f"{len(failed)} of 80 failed" in said and "time to success:" in said and "title: episodes" not in said
    assert "worst region: block x" in said and "the worst of" in said and "looks worse than it is" in said
    for name in ("eval_info.json", "episodes.csv", "video.mp4", "video.gif"):
        assert f"wrote {out / name}" in said and (out / name).stat().st_size > 1000
    stored = read_eval_info(out / "eval_info.json")
    assert stored.episodes == result.episodes and stored.video_paths == [str(out / "video.mp4")]
    assert stored.failures() == result.failures() and sum(result.failures().values()) == len(failed)
