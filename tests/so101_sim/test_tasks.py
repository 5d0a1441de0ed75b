"""Named tasks: what they set, how an environment is told by its name, and that the presets are of them."""

import dataclasses

import pytest

from reinflow import ConfigError
from reinflow_so101.policy_card import stored_env
from so101_mujoco_utils import model_dir
from so101_sim.config import EnvConfig
from so101_sim.tasks import registry
from so101_sim.tasks.registry import (
    ASPECTS,
    TASKS,
    demonstration_env,
    describe,
    differences,
    nearest_task,
    shows_one_scene,
    task_env,
)
from train_reinflow import PRESETS, TrainingConfig, parse_args


def test_every_task_is_an_environment_of_its_own():
    assert {f.name for f in dataclasses.fields(EnvConfig)} >= set(ASPECTS)
    for name in TASKS:
        assert nearest_task(task_env(name)) == name and differences(task_env(name), name) == {}
    assert task_env(registry.DEFAULT_TASK) == EnvConfig()
    with pytest.raises(ConfigError, match=r"task=lfit is unknown: choose one of lift, lift_wide, lift_fixed"):
        task_env("lfit")


def test_demonstrations_reach_beyond_the_task():
    task, recorded = task_env("lift"), demonstration_env("lift")
    assert recorded.block_radius_range[0] < task.block_radius_range[0]
    assert recorded.block_radius_range[1] > task.block_radius_range[1]
    assert recorded.block_angle_deg > task.block_angle_deg and recorded.block_yaw_deg > task.block_yaw_deg
    assert demonstration_env("lift_wide") == task_env("lift_wide")


def test_an_environment_is_described_by_what_it_is_nearest_to():
    assert describe(task_env("lift")).startswith("lift (")
    changed = task_env("lift", block_angle_deg=45.0, reward_mode="sparse")
    assert "with block_angle_deg=45.0, reward_mode=sparse" in describe(changed)
    fixed = task_env("lift_fixed", block_angle_deg=45.0, image_size=96, cameras=("camera_up",))
    assert describe(fixed) == describe(EnvConfig())  # a range that nothing is drawn from, and how it is looked at


@pytest.mark.parametrize(("changes", "one"), [
    ({}, True), ({"start_noise_deg": 1.0}, False), ({"randomize_block": True}, False),
    ({"randomize_block": True, "block_radius_range": (0.2, 0.2), "block_angle_deg": 0.0, "block_yaw_deg": 0.0}, True),
])  # fmt: skip
def test_whether_all_seeds_show_one_scene(changes, one):
    assert shows_one_scene(EnvConfig(**changes)) is one


def test_presets_are_of_their_tasks():
    for name, preset in PRESETS.items():
        assert differences(dataclasses.replace(preset, image_size=96).env(), preset.task) == {}, name
    assert TrainingConfig().task == "lift_fixed" and PRESETS["tiny"].task == "lift"


def test_task_flag_sets_the_environment_and_other_flags_override_it(capsys):
    config = parse_args(["--preset", "tiny", "--task", "lift_wide", "--block-yaw-deg", "10"])
    assert (config.task, config.block_angle_deg, config.block_yaw_deg) == ("lift_wide", 60.0, 10.0)
    assert config.cameras == PRESETS["tiny"].cameras
    with pytest.raises(ConfigError, match="task=lfit is unknown"):
        parse_args(["--task", "lfit"])


def test_the_trainer_reads_the_policys_own_task_as_the_evaluation_does(capsys):
    config = parse_args(["--pretrained-path", "tiny"])  # the document's settings, on a policy of another task
    assert config.preset == "smolvla" and config.task == "lift" and config.randomize_block
    own = stored_env(model_dir() / "tiny_smolvla")
    assert config.starting_position == own.starting_position and config.cameras == own.cameras
    assert "reinflow.json has it: lift (" in capsys.readouterr().out
    other = parse_args(["--pretrained-path", "tiny", "--task", "lift_fixed"])
    assert other.task == "lift_fixed" and not other.randomize_block and other.cameras == own.cameras


def test_a_file_may_name_a_task(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\ntask: lift_wide\nblock_yaw_deg: 10\n")
    config = parse_args(["--config", str(file)])
    assert (config.task, config.block_angle_deg, config.block_yaw_deg) == ("lift_wide", 60.0, 10.0)
    file.write_text("task: lfit\n")
    with pytest.raises(ConfigError, match="task=lfit is unknown"):
        parse_args(["--config", str(file)])
