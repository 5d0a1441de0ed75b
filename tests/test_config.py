"""TrainingConfig: the seed's names and defaults, flags, and refusal of what cannot work."""

import json
import os
import subprocess
import sys
import time
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import pytest

from reinflow import ConfigError, run_command
from reinflow.settings import check_same_settings, config_from_json, config_to_json
from reinflow_so101.command_line import CHANGEABLE_ON_RESUME, SMOKE, resume_directory, saved_config
from train_reinflow import PRESETS, TrainingConfig, parse_args, train

ROOT = Path(__file__).parents[1]

# seeds/000, section "Quick Reference" and the tables above it.
SEED_DEFAULTS = {
    "policy_lr": 3e-6, "critic_lr": 1e-4, "clip_epsilon": 0.15, "target_kl": 0.1, "sigma_min": 0.25,
    "sigma_max": 0.50, "num_episodes": 20_000, "num_parallel_envs": 1, "num_ppo_epochs": 5, "minibatch_size": 8,
    "gae_lambda": 0.95, "gradient_accumulation_steps": 15, "value_clip_epsilon": 0.2, "num_denoising_steps": 1,
    "chunks_per_episode": 3, "noise_decay_start": 1.0, "noise_decay_ratio": 0.7, "entropy_coeff": 0.0,
    "grad_clip_norm": 0.25, "lr_warmup_iterations": 10, "critic_warmup_iters": 30, "gamma": 0.999,
    "max_steps_per_episode": 150, "contact_bonus": 0.1, "height_alignment_bonus": 0.05, "lift_threshold": 0.08,
    "train_action_head": True, "train_time_mlp": True, "train_full_expert": True, "train_noise_head": True,
    "train_critic": True, "model_type": "smolvla", "pretrained_path": "lerobot/smolvla_base",
    "pi0_pretrained_path": "lerobot/pi0", "pi0_gradient_checkpointing": True, "chunk_size": 50,
    "model_path": "model/scene.xml", "instruction": "pick up the block", "steps_per_action": 10,
    "block_pos": (0, 0.3, 0.0125), "image_size": 256, "log_interval": 1, "save_interval": 10,
    "wandb_project": "reinflow-smolvla", "wandb_enabled": True, "checkpoint_path": "reinflow_checkpoint.pt",
    "render": False, "use_subproc_env": False, "starting_position": (0.06, -100.21, 89.95, 66.46, 5.96, 1.0),
}  # fmt: skip

BAD = [
    ("sigma_min", {"sigma_min": 0.6}),
    ("sigma_min", {"sigma_min": 0.0}),
    ("target_kl", {"policy_optimizer": "natural", "num_ppo_epochs": 1, "target_kl": 0.0}),
    ("compile_expert", {"policy_optimizer": "natural", "compile_expert": True}),
    ("n_action_steps", {"n_action_steps": 60, "max_steps_per_episode": 180}),
    ("chunks_per_episode", {"chunks_per_episode": 4}),
    ("max_steps_per_episode", {"max_steps_per_episode": 100}),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 16}),
    ("episodes_per_iteration", {"num_parallel_envs": 64}),
    ("use_subproc_env", {"use_subproc_env": True}),
    ("render", {"render": True, "headless": True}),
    ("num_parallel_envs", {"render": True, "num_parallel_envs": 2}),
    ("eval_seed", {"eval_seed": 9_950}),
    ("report_seed", {"report_seed": 100}),
    ("seed", {"seed": 10_000}),
    ("gamma", {"gamma": 1.5}),
    ("gae_lambda", {"gae_lambda": -0.1}),
    ("policy_lr", {"policy_lr": 0.0}),
    ("policy_lr", {"policy_lr": float("nan")}),
    ("minibatch_size", {"minibatch_size": 0}),
    ("num_parallel_envs", {"num_parallel_envs": 0}),
    ("num_threads", {"num_threads": 1_000_000}),
    ("image_size", {"image_size": 1}),
    ("image_size", {"image_size": 100_000}),
    ("report_seed", {"report_seed": 2**64}),
    ("target_kl", {"target_kl": float("inf")}),
    ("natural_momentum", {"natural_momentum": float("nan")}),
    ("natural_momentum", {"natural_momentum": 2.0}),
    ("natural_damping", {"natural_damping": -1.0}),
    ("num_ppo_epochs", {"policy_optimizer": "natural"}),
    ("undo_overshoot", {"policy_optimizer": "natural", "num_ppo_epochs": 1, "undo_overshoot": True}),
    ("block_radius_range", {"block_radius_range": (0.2, 5.0)}),
    ("block_pos", {"block_pos": (0.0, 0.3, -0.1)}),
    ("lift_threshold", {"lift_threshold": 0.01}),
    ("start_noise_deg", {"start_noise_deg": 200.0}),
    ("cameras", {"cameras": ()}),
    ("block_radius_range", {"block_radius_range": (0.3, 0.2)}),
    ("noise_last_step_only", {"noise_last_step_only": True}),
    ("num_noise_coefficients", {"noise_basis": "dct", "num_noise_coefficients": 51}),
    ("critic_input", {"credit": "control_step"}),
    ("discount_per", {"credit": "control_step", "critic_input": "state", "discount_per": "chunk"}),
    ("train_critic", {"credit": "control_step", "critic_input": "state", "train_critic": False}),
    ("train_noise_head", {
        "train_action_head": False, "train_time_mlp": False, "train_full_expert": False, "train_noise_head": False,
    }),
    ("heads_first", {"heads_first": 1.5}),
    ("heads_first", {"heads_first": 0.5, "train_action_head": False, "train_noise_head": False}),
    ("heads_first", {"model_type": "flow_mlp", "heads_first": 0.5}),
    ("noise_decay_ratio", {"noise_decay_ratio": 2.0}),
    ("flow_mlp_pretrained_path", {"flow_mlp_pretrained_path": "dir"}),
    ("pretrained_path", {"model_type": "flow_mlp", "pretrained_path": "dir"}),
    ("n_action_steps", {"model_type": "flow_mlp", "n_action_steps": 60, "chunks_per_episode": 3}),
    ("env_id", {"env_id": "Hopper-v5"}),
    ("credit", {"env_id": "Hopper-v5", "model_type": "flow_mlp", "credit": "control_step"}),
    ("use_subproc_env", {"env_id": "Hopper-v5", "model_type": "flow_mlp", "use_subproc_env": True}),
    ("chain_noise", {"chain_noise": "flow_sde", "noise_last_step_only": True, "num_denoising_steps": 4}),
    ("train_time_mlp", {"model_type": "flow_mlp", "train_time_mlp": False}),
]  # fmt: skip


def test_seed_names_and_defaults():
    assert {name: getattr(TrainingConfig(), name) for name in SEED_DEFAULTS} == SEED_DEFAULTS


def test_settings_classes_below_have_the_documented_defaults():
    """The numbers stand in TrainingConfig; where a room repeats one, for whoever takes it alone, it is the same."""
    documented = TrainingConfig()
    other_words = {"model_path", "wandb_mode", "wandb_project"}  # the shipped scene; this project's dashboard
    rooms = (documented.env(), documented.chain(), documented.rollout(), documented.learner(), documented.run())
    for settings in rooms:
        for field in fields(settings):
            if field.default is not MISSING and field.name not in other_words:
                assert getattr(settings, field.name) == field.default, (type(settings).__name__, field.name)


@pytest.mark.parametrize(("field", "changes"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_config_is_refused_by_name(field, changes):
    with pytest.raises(ConfigError, match=field):
        replace(TrainingConfig(), **changes)


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError, match=r"gamma.*sigma_min"):
        replace(TrainingConfig(), gamma=2.0, sigma_min=0.7)


def test_short_flags_that_users_type():
    config = parse_args(
        ["--parallel-envs", "4", "--episodes", "400", "--no-render", "--headless", "--no-wandb", "--seed", "3",
         "--device", "cpu", "--output-dir", "x", "--pretrained-path", "dir", "--episodes-per-iteration", "40"]
    )  # fmt: skip
    assert (config.num_parallel_envs, config.num_episodes, config.wandb_enabled) == (4, 400, False)
    assert (config.seed, config.device, config.output_dir, config.pretrained_path) == (3, "cpu", "x", "dir")


def test_preset_is_the_base_of_other_flags():
    config = parse_args(["--preset", "tiny", "--policy-lr", "1e-4"])
    assert config == replace(PRESETS["tiny"], policy_lr=1e-4)


def test_flow_mlp_is_tiny_without_pixels():
    config, tiny = parse_args(["--preset", "flow_mlp"]), PRESETS["tiny"]
    assert config.policy_path == "embedded" and parse_args(["--model-type", "flow_mlp"]).policy_path == "embedded"
    task = ("randomize_block", "block_radius_range", "block_angle_deg", "block_yaw_deg", "starting_position")
    chain = ("noise_basis", "num_noise_coefficients", "log_prob_reduction", "num_denoising_steps", "reward_mode")
    assert all(getattr(config, name) == getattr(tiny, name) for name in (*task, *chain))


def test_unknown_preset_and_bad_flag_exit_with_the_name(capsys):
    with pytest.raises(ConfigError, match="preset=huge"):
        parse_args(["--preset", "huge"])
    with pytest.raises(ConfigError, match=r"sigma_min=0\.9 exceeds sigma_max=0\.5"):
        parse_args(["--sigma-min", "0.9"])
    with pytest.raises(SystemExit):
        parse_args(["--sigma-mni", "0.9"])
    assert "--sigma-min" in capsys.readouterr().err  # tyro's proposal


def test_json_round_trip():
    for config in PRESETS.values():
        assert config_from_json(json.loads(json.dumps(config_to_json(config))), TrainingConfig) == config


def test_config_json_of_another_version_is_refused():
    data = config_to_json(TrainingConfig())
    data["colour"] = data.pop("gamma")
    with pytest.raises(ConfigError, match=r"gamma.*colour"):
        config_from_json(data, TrainingConfig)


def test_resume_keeps_settings_but_may_run_longer():
    saved = config_to_json(TrainingConfig())
    check_same_settings(saved | {"num_episodes": 30_000}, saved, CHANGEABLE_ON_RESUME)
    with pytest.raises(ConfigError, match=r"policy_lr \(3e-06 -> 1.0\)"):
        check_same_settings(saved | {"policy_lr": 1.0}, saved, CHANGEABLE_ON_RESUME)


def test_resume_without_a_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match="resume"):
        parse_args(["--resume"])
    with pytest.raises(ConfigError, match="output_dir"):
        parse_args(["--resume", "--output-dir", str(tmp_path)])


def test_existing_run_is_not_overwritten(tmp_path):
    state = tmp_path / "checkpoints/000000/training_state"
    state.mkdir(parents=True)
    (state / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="output_dir"):
        train(replace(TrainingConfig(), output_dir=str(tmp_path)))


def test_pickled_checkpoint_is_refused(tmp_path):
    (tmp_path / "reinflow_checkpoint.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="checkpoint_path"):
        parse_args(["--resume", "--checkpoint-path", str(tmp_path / "reinflow_checkpoint.pt")])


def test_a_pickled_checkpoint_that_lies_about_stops_nobody(tmp_path, monkeypatch):
    """The user's earlier system writes a file of the default name; it only matters with --resume."""
    (tmp_path / TrainingConfig.checkpoint_path).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert parse_args(["--preset", "tiny"]).preset == "tiny"


@pytest.mark.parametrize("preset", PRESETS)
def test_smoke_changes_sizes_alone(preset):
    small, whole = parse_args(["--preset", preset, "--smoke"]), PRESETS[preset]
    changed = {f.name for f in fields(whole) if getattr(small, f.name) != getattr(whole, f.name)}
    assert changed <= set(SMOKE) and "num_episodes" in changed
    assert parse_args(["--preset", preset, "--smoke", "--episodes", "6"]).num_episodes == 6
    with pytest.raises(ConfigError, match="leave out --resume"):
        parse_args(["--smoke", "--resume"])


def test_help_explains_every_field_quickly():
    start = time.perf_counter()
    text = subprocess.run(
        [sys.executable, "train_reinflow.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert time.perf_counter() - start < 10
    for field in fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert "rise" in text and "linearly" in text  # the docstrings, not only the names
    assert len(asdict(TrainingConfig())) == len(fields(TrainingConfig))


def test_bad_flag_fails_fast():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "train_reinflow.py", "--gamma", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0 and "gamma" in result.stderr
    assert time.perf_counter() - start < 10


def test_a_checkpoint_that_is_not_there_is_not_replaced_by_another(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    run = tmp_path / "a"
    assert resume_directory(str(run / "checkpoints"), "") == resume_directory("", str(run)) == run
    with pytest.raises(ConfigError, match=r"checkpoint_path=.*000099 is not there"):
        resume_directory(str(run / "checkpoints/000099"), "")
    with pytest.raises(ConfigError, match=r"output_dir=.*typo is not there"):
        resume_directory("", str(run / "typo"))
    with pytest.raises(ConfigError, match=r"is of the run .*a, not of output_dir=.*b"):
        resume_directory(str(run / "checkpoints"), str(tmp_path / "b"))


def test_what_a_disk_does_is_one_line_and_what_we_do_wrong_is_a_traceback():
    def fill():
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(SystemExit, match=r"^train: No space left on device: .*Make room"):
        run_command("train", fill)
    with pytest.raises(SystemExit, match="No such file or directory: /proc/nope"):
        run_command("train", lambda: Path("/proc/nope/run").mkdir(parents=True))
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_command("train", lambda: os.close(-1))


def test_settings_come_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\npolicy_lr: 1e-4\ncameras: [wrist_camera]\n")
    config = parse_args(["--config", str(file), "--seed", "7"])
    expected = replace(PRESETS["tiny"], policy_lr=1e-4, cameras=("wrist_camera",), seed=7)
    assert config == expected
    run = tmp_path / "config.json"
    run.write_text(json.dumps(config_to_json(replace(expected, output_dir="elsewhere", resume=True))))
    assert parse_args([f"--config={run}"]) == expected  # how a run was opened is not taken from it
    for content, problem in (
        ("polcy_lr: 1", "polcy_lr, which is no setting: is policy_lr meant"),
        ("policy_lr: fast", "policy_lr is .fast."),
        ("policy_lr: .nan", "policy_lr must"), ("- 1", "holds no fields"), ("a: [", "cannot be read"),
        ("preset: huge", "preset=huge is unknown"), ("num_episodes: 2.5", "num_episodes is 2.5"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            parse_args(["--config", str(file)])
    with pytest.raises(ConfigError, match="leave one out"):
        parse_args(["--config", str(file), "--resume"])


def test_a_config_of_an_older_version_gets_what_that_version_implied(tmp_path, capsys):
    saved = config_to_json(PRESETS["flow_mlp"])
    del saved["max_minutes"], saved["auto_scale"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = saved_config(tmp_path, TrainingConfig)
    assert config == replace(PRESETS["flow_mlp"], resume=True, output_dir=str(tmp_path))
    assert "implied max_minutes=0.0, auto_scale=False" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(saved | {"of_the_future": 1}))
    with pytest.raises(ConfigError, match=r"another version: .* unknown \['of_the_future'\]"):
        saved_config(tmp_path, TrainingConfig)
