"""Anyone's policy in, and out as what plain LeRobot runs: names, statistics, units, sizes, before a weight is read."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file

from reinflow import ConfigError, UserError
from reinflow.env import take_rows
from reinflow.flow import ChainSpec
from reinflow_so101.commands.export import ExportConfig, export
from reinflow_so101.door import DoorSettings, adapted, enter
from reinflow_so101.opening import make_policy, make_run, settle
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.policy_card import stored_env
from reinflow_vla.adaptation import known_cameras
from reinflow_vla.base import lerobot_batch
from reinflow_vla.directory import locate_policy
from reinflow_vla.smolvla_directory import load_smolvla
from so101_mujoco_utils import CAMERA_NAMES, FRAMES, m100_frame, model_dir
from tests.foreign import add_camera, bf16_backbone, clone, convert_statistics, edit, rename_cameras
from tests.hub import smolvla_base
from train_reinflow import PRESETS, TrainingConfig, parse_args, train

TWO = ("camera_up", "wrist_camera")
IMAGES = "observation.images."
SPEC = ChainSpec(1)
RENAMED = {IMAGES + "camera_up": IMAGES + "front", IMAGES + "wrist_camera": IMAGES + "wrist"}
OWN = load_arrays(model_dir() / "tiny_smolvla/policy_preprocessor_step_5_normalizer_processor.safetensors")


def renamed(folder: Path) -> Path:
    return rename_cameras(clone(folder), {"camera_up": "front", "wrist_camera": "wrist"})


def actions(directory: Path, **settings) -> torch.Tensor:
    """What a directory does at a start of the scene, through the door."""
    from reinflow.rollout import act, encode
    from so101_sim.vector.make import make_vector_env

    env_config = replace(stored_env(model_dir() / "tiny_smolvla"), cameras=settings.pop("cameras", TWO))
    policy = FAMILIES["smolvla"].load(
        directory, ActingSettings(door=DoorSettings(**settings), cameras=env_config.cameras)
    )  # fmt: skip
    with make_vector_env(env_config, 2) as env:
        context = encode(policy, env.reset([1, 2]))
    return torch.as_tensor(act(policy, context, SPEC, [1, 2], [0, 0], explore=False)[1])


def problems(directory: Path, cameras=TWO, **settings) -> str:
    return "; ".join(enter(directory, DoorSettings(**settings), cameras).problems)


# --- Cameras ----------------------------------------------------------------------------------------------------------


def test_other_camera_names_are_mapped_by_flag_by_a_stored_map_or_by_position(tmp_path):
    expected = actions(clone(tmp_path / "own"))
    by_flag = renamed(tmp_path / "flag")
    said = problems(by_flag)
    assert "lacks front wrist" in said and json.dumps(RENAMED) in said  # the map that mends it, ready to copy
    assert torch.equal(actions(by_flag, rename_map=json.dumps(RENAMED)), expected)
    stored = renamed(tmp_path / "stored")
    edit(stored, "policy_preprocessor.json", lambda c: c["steps"][0]["config"].update(rename_map=RENAMED))
    assert torch.equal(actions(stored), expected)
    numbered = rename_cameras(clone(tmp_path / "numbered"), {"camera_up": "camera1", "wrist_camera": "camera2"})
    assert torch.equal(actions(numbered), expected)
    swapped = json.dumps({v: k for k, v in RENAMED.items()})
    assert "rename_map leads to camera_up, wrist_camera, which" in problems(by_flag, rename_map=swapped)
    with pytest.raises(ConfigError, match="is no JSON"):
        problems(by_flag, rename_map="front=up")


def test_cameras_that_were_only_declared_are_left_out_and_empty_ones_stay(tmp_path):
    expected = actions(clone(tmp_path / "own"))
    three = add_camera(clone(tmp_path / "three"), "camera3")
    entrance = enter(three, DoorSettings(), TWO)
    assert list(entrance.cameras) == list(TWO) and any("camera3" in line for line in entrance.lines)
    assert torch.equal(actions(three), expected)
    empty = add_camera(clone(tmp_path / "empty"), "empty_camera_0", (3, 480, 640))
    edit(empty, "config.json", lambda c: c.update(empty_cameras=1))
    assert stored_env(empty).cameras == TWO and stored_env(empty).image_size == 96
    assert actions(empty).shape == expected.shape


# --- Joints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [FRAMES["so100_legacy"], m100_frame()], ids=lambda frame: frame.name)
def test_statistics_in_another_frame_are_folded_into_lerobots_degrees(tmp_path, frame):
    directory = convert_statistics(clone(tmp_path / "policy"), frame)
    entrance = enter(directory, DoorSettings(joint_frame=frame.name), TWO)
    for feature, values in entrance.statistics.items():
        for what, array in values.items():
            np.testing.assert_allclose(array, OWN[f"{feature}.{what}"], rtol=1e-4, atol=1e-3)
    close = actions(directory, joint_frame=frame.name) - actions(clone(tmp_path / "own"))
    assert float(close.abs().max()) < 0.05  # degrees; float32 statistics


def test_auto_takes_the_frame_that_fits_the_joint_limits_and_refuses_what_fits_none(tmp_path):
    legacy = enter(convert_statistics(clone(tmp_path / "legacy"), FRAMES["so100_legacy"]), DoorSettings(), TWO)
    assert any("joint frame so100_legacy: lerobot would put" in line for line in legacy.lines)
    both = enter(convert_statistics(clone(tmp_path / "m100"), m100_frame()), DoorSettings(), TWO)
    assert any("joint frame lerobot, the usual one; lerobot_m100_100 would fit too" in line for line in both.lines)
    radians = clone(tmp_path / "wild")
    for file in radians.glob("policy_*.safetensors"):
        from safetensors.numpy import save_file

        save_file({name: value * np.float32(5) for name, value in OWN.items()}, file)
    assert "fit no joint frame" in problems(radians) and "--joint-frame" in problems(radians)
    wrong = enter(legacy.source, DoorSettings(joint_frame="lerobot"), TWO)
    assert any("so100_legacy would fit" in line for line in wrong.lines)


def test_a_calibration_gives_the_ranges_of_ones_own_arm(tmp_path):
    ranges = {name: {"range_min": 1000, "range_max": 3000} for name in ("shoulder_pan", "shoulder_lift", "elbow_flex")}
    ranges |= {name: {"range_min": 1000, "range_max": 3000} for name in ("wrist_flex", "wrist_roll", "gripper")}
    file = tmp_path / "arm.json"
    file.write_text(json.dumps(ranges))
    half = 1000 * 360 / 4096
    frame = m100_frame((half, half, half, half, 180.0))
    directory = convert_statistics(clone(tmp_path / "policy"), frame)
    entrance = enter(directory, DoorSettings(joint_frame=frame.name, calibration=str(file)), TWO)
    np.testing.assert_allclose(entrance.statistics["action"]["mean"], OWN["action.mean"], rtol=1e-4, atol=1e-3)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no calibration of an SO-101"):
        enter(directory, DoorSettings(joint_frame=frame.name, calibration=str(file)), TWO)


def test_statistics_by_data_set_by_dataset_folder_or_not_at_all(tmp_path):
    base = smolvla_base(tmp_path / "home")
    auto = enter(base, DoorSettings(), CAMERA_NAMES)
    assert auto.problems == [] and any("so100, those of actions for the state too" in line for line in auto.lines)
    legacy, degrees = FRAMES["so100_legacy"], FRAMES["lerobot"]
    mean = load_arrays(base / "policy_preprocessor_step_5_normalizer_processor.safetensors")["so100.buffer.action.mean"]
    np.testing.assert_allclose(
        auto.statistics["observation.state"]["mean"], degrees.from_rad(legacy.to_rad(mean)), rtol=1e-5
    )  # fmt: skip
    red = enter(base, DoorSettings(normalization="so100-red"), CAMERA_NAMES)
    assert not np.allclose(red.statistics["action"]["mean"], auto.statistics["action"]["mean"])
    said = problems(base, CAMERA_NAMES, normalization="so100-green")
    assert "so100, so100-red" in said and "--normalization dataset:PATH" in said
    (tmp_path / "data/meta").mkdir(parents=True)
    features = ("observation.state", "action")
    stats = {f: {w: OWN[f"{f}.{w}"].tolist() for w in ("mean", "std")} | {"count": [600]} for f in features}
    (tmp_path / "data/meta/stats.json").write_text(json.dumps(stats))
    mine = enter(base, DoorSettings(normalization=f"dataset:{tmp_path / 'data'}"), CAMERA_NAMES)
    np.testing.assert_allclose(mine.statistics["action"]["mean"], OWN["action.mean"], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"has no meta/stats\.json"):
        enter(base, DoorSettings(normalization="dataset:nowhere"), CAMERA_NAMES)


# --- Features and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda c: c["input_features"]["observation.state"].update(shape=[32]),
    lambda c: c.update(input_features=None),
    lambda c: c.update(brand_new_field=None, optimizer_of_tomorrow="x"),
], ids=["padded state", "no input_features", "fields of a newer LeRobot"])  # fmt: skip
def test_what_a_directory_says_too_much_or_not_at_all(tmp_path, change):
    directory = clone(tmp_path / "policy")
    edit(directory, "config.json", change)
    assert torch.equal(actions(directory), actions(clone(tmp_path / "own")))


def test_an_unknown_field_of_consequence_is_one_line_that_names_the_users_file(tmp_path):
    directory = clone(tmp_path / "policy")
    edit(directory, "config.json", lambda c: c.update(action_scale=2.0))
    with pytest.raises(UserError, match=rf"{directory}/config.json has action_scale=2.0, which this LeRobot does not"):
        actions(directory)


def test_every_mismatch_is_in_one_error_before_a_weight_is_read(tmp_path):
    directory = renamed(tmp_path / "policy")
    for file in directory.glob("policy_*.safetensors"):
        from safetensors.numpy import save_file

        save_file({f"{group}.buffer.{name}": value for name, value in OWN.items() for group in ("mine", "his")}, file)
    (directory / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match=r"--rename-map .*mine.*--normalization dataset:PATH") as error:
        train(replace(PRESETS["tiny"], pretrained_path=str(directory), output_dir=str(tmp_path / "run")))
    assert "never read" not in str(error.value) and not (tmp_path / "run").exists()


def test_sizes_left_to_the_policy_and_what_never_changes_silently(tmp_path, capsys):
    directory = clone(tmp_path / "policy")
    edit(directory, "config.json", lambda c: c.update(chunk_size=30, n_action_steps=15, num_steps=4))
    left = replace(PRESETS["finetune"], pretrained_path=str(directory), cameras=TWO)
    config = settle(left, directory)
    assert (config.chunk_size, config.n_action_steps, config.num_denoising_steps, config.image_size) == (30, 15, 4, 96)
    assert (config.chunks_per_episode, config.max_steps_per_episode) == (10, 150)
    given = settle(replace(PRESETS["tiny"], pretrained_path=str(directory)), directory)
    assert (given.chunk_size, given.n_action_steps, given.chunks_per_episode) == (30, 30, 5)  # 50 is one policy's chunk
    said = capsys.readouterr().out
    assert "denoising steps: 1 here and in the export, the policy stores 4" in said
    assert "n_action_steps: 30 here and in the export, the policy stores 15" in said


def test_older_policies_missing_backbones_and_revisions_say_what_to_do(tmp_path, monkeypatch):
    old = clone(tmp_path / "old")
    for file in old.glob("policy_*"):
        file.unlink()
    with pytest.raises(UserError, match=r"migrate_policy_normalization --pretrained-path .*old"):
        locate_policy(old)
    hub = clone(tmp_path / "hub")
    edit(hub, "config.json", lambda c: c.update(vlm_model_name="somebody/backbone"))
    with pytest.raises(UserError, match="hf download somebody/backbone"):
        load_smolvla(hub)
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, revision: asked.update({repo: revision}) or old
    )
    with pytest.raises(UserError):
        locate_policy("somebody/policy@v2")
    assert asked == {"somebody/policy": "v2"}


# --- Out --------------------------------------------------------------------------------------------------------------


def plain(directory: Path) -> SmolVLAPolicy:
    """As plain LeRobot loads it; a moved backbone folder is named by its absolute path."""
    config = PreTrainedConfig.from_pretrained(directory)
    if (directory / "vlm").is_dir():
        config.vlm_model_name = str(directory / "vlm")
    return SmolVLAPolicy.from_pretrained(directory, config=config, strict=True).eval()


def test_all_of_an_update_is_in_what_plain_lerobot_loads_in_bf16(tmp_path):
    start = bf16_backbone(clone(tmp_path / "start"))
    shutil.copy(model_dir() / "tiny_smolvla/reinflow.json", start)
    config = replace(
        parse_args(["--preset", "tiny", "--smoke"]), pretrained_path=str(start), output_dir=str(tmp_path / "run"),
        report_episodes=0, wandb_enabled=False, num_threads=1, policy_optimizer="adam", policy_lr=1e-5,
    )  # fmt: skip
    train(config)
    export = tmp_path / "run/checkpoints/last/pretrained_model"
    theirs, ours = plain(export).state_dict(), load_file(export / "model.safetensors")
    before = load_file(start / "model.safetensors")
    changed = [name for name in ours if not torch.equal(ours[name].float(), before[name].float())]
    assert len(changed) > 30
    made, kept = (torch.cat([(w[n].float() - before[n].float()).flatten() for n in changed]) for w in (ours, theirs))
    assert torch.equal(made, kept)
    masters = load_file(tmp_path / "run/checkpoints/last/training_state/policy.safetensors")
    name = next(name for name in masters if "lm_expert" in name and "q_proj" in name)
    assert not torch.equal(masters[name], masters[name].bfloat16().float())  # small steps are not lost either


def test_ours_and_plain_lerobots_actions_agree_in_fp32_and_bf16(tmp_path):
    from reinflow.rollout import act, encode
    from so101_sim.vector.make import make_vector_env

    for directory, tolerance in ((clone(tmp_path / "fp32"), 1e-5), (bf16_backbone(clone(tmp_path / "bf16")), 0.1)):
        policy, stock = FAMILIES["smolvla"].load(directory, ActingSettings()), plain(directory)
        env_config = stored_env(model_dir() / "tiny_smolvla")
        with make_vector_env(env_config, 20) as env:
            observation = env.reset(list(range(20)))
        sample, _ = act(policy, encode(policy, observation), SPEC, list(range(20)), [0] * 20, explore=False)
        overrides = {"tokenizer_processor": {"tokenizer_name": str(directory / "vlm")}}
        before, _ = make_pre_post_processors(stock.config, str(directory), preprocessor_overrides=overrides)
        with torch.no_grad():
            theirs = stock.predict_action_chunk(before(lerobot_batch(observation, TWO)), noise=sample.chain[:, 0])
        difference = (theirs - sample.chain[:, -1, :, :6]).abs()  # the expert's sums are fp32 here, bf16 there
        assert float(difference.max()) < tolerance and float(difference.mean()) < tolerance / 10


def test_the_default_command_takes_smolvla_base_as_the_hub_ships_it(tmp_path, monkeypatch, capsys):
    base = smolvla_base(tmp_path / "home", bf16=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home/hub"))
    config = replace(TrainingConfig(), pretrained_path=str(base), wandb_enabled=False, image_size=96, device="cpu")
    settled = settle(config, base)
    said = capsys.readouterr().out
    assert "cameras by their position: camera1 is camera_up, camera2 is wrist_camera, camera3 is camera_side" in said
    assert "joint frame so100_legacy" in said and "the policy stores 10" in said
    assert (settled.num_denoising_steps, settled.chunk_size) == (1, 50)
    with adapted(enter(base, DoorSettings(), settled.cameras)) as folder:
        stored = json.loads((folder / "config.json").read_text())
        assert [name.removeprefix(IMAGES) for name in stored["input_features"] if IMAGES in name] == [*CAMERA_NAMES]
        assert os.readlink(folder / "model.safetensors") == str((base / "model.safetensors").resolve())


def test_the_manifest_says_what_trains_and_what_is_frozen(tmp_path, capsys):
    directory = bf16_backbone(clone(tmp_path / "policy"))
    config = replace(PRESETS["tiny"], pretrained_path=str(directory), num_parallel_envs=2)
    _, run = make_run(config, tmp_path / "run")
    run.env.close()
    said = capsys.readouterr().out
    assert "trains: action_head 2,336 in 2 tensors" in said and "bfloat16)" in said
    assert "plain LeRobot holds" in said and "1 denoising steps, exported too" in said


def test_an_adapter_is_folded_into_its_base(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base, adapter = clone(tmp_path / "base"), clone(tmp_path / "adapter")
    model = get_peft_model(load_smolvla(base)[0], LoraConfig(r=2, target_modules=r".*lm_expert.*q_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    (adapter / "model.safetensors").unlink()
    assert not torch.equal(actions(adapter), actions(base)) and "folded into its base" in capsys.readouterr().out
    merged, plain_base = (load_smolvla(d)[0].state_dict() for d in (adapter, base))
    changed = [name for name in merged if not torch.equal(merged[name], plain_base[name])]
    assert merged.keys() == plain_base.keys() and changed and all("q_proj" in name for name in changed)
    assert load_smolvla(adapter)[0].config.use_peft is False  # or LeRobot looks for an adapter in the export
    stored = load_arrays(adapter / "adapter_model.safetensors")
    renamed_keys = {name.replace("lm_expert", "lm_exp"): values for name, values in stored.items()}
    save_arrays(renamed_keys, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit its base"):
        load_smolvla(adapter)


def test_an_export_has_a_card_and_no_local_path_and_one_in_fp32_is_exact(tmp_path, capsys):
    start = bf16_backbone(clone(tmp_path / "start"))
    config = replace(
        parse_args(["--preset", "tiny", "--smoke"]), pretrained_path=str(start), output_dir=str(tmp_path / "run"),
        wandb_enabled=False, num_threads=1,
    )  # fmt: skip
    train(config)
    out = export(ExportConfig(str(tmp_path / "run"), tmp_path / "out"))
    card = (out / "README.md").read_text()
    assert "base_model: start" in card and "Success after training" in card and "seeds 10000 to 10001" in card
    for file in out.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    with pytest.raises(UserError, match="exists"):
        export(ExportConfig(str(tmp_path / "run"), tmp_path / "out"))
    exact = export(ExportConfig(str(tmp_path / "run"), tmp_path / "exact", fp32_backbone=True))
    theirs = SmolVLAPolicy.from_pretrained(exact, strict=True).state_dict()
    for name, tensor in load_file(out / "model.safetensors").items():
        assert theirs[name].dtype == torch.float32 and torch.equal(theirs[name], tensor.float()), name


def test_finetune_takes_the_task_that_the_policy_was_made_for(capsys):
    config = parse_args(["--preset", "finetune", "--pretrained-path", "tiny"])
    assert (config.randomize_block, config.cameras, config.chunk_size) == (True, TWO, 0)
    assert parse_args(["--preset", "finetune", "--pretrained-path", "tiny", "--no-randomize-block"]).cameras == TWO
    assert "reinflow.json" in capsys.readouterr().out
    assert parse_args(["--preset", "finetune"]).cameras == CAMERA_NAMES
    assert "says of no task" in capsys.readouterr().out


@pytest.mark.parametrize("keep", ["kv", "embeddings", "none"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_bf16_prefix_gives_ratio_one_at_another_batch_shape(bf16_policy, keep, steps):
    from reinflow.flow import chain_log_prob
    from reinflow.rollout import act, encode
    from so101_sim.vector.base import blank_observation

    policy, spec = bf16_policy, ChainSpec(steps, "chunk")
    blank = blank_observation(stored_env(model_dir() / "tiny_smolvla"))
    observation = take_rows(blank, np.zeros(64, dtype=np.int64))
    rng = np.random.default_rng(0)
    observation["pixels"] = {c: rng.integers(0, 255, v.shape, dtype=np.uint8) for c, v in observation["pixels"].items()}
    policy.prefix_cache = replace(policy.prefix_cache, keep=keep)
    context = encode(policy, observation)
    sample, _ = act(policy, context, spec, list(range(64)), [0] * 64, explore=True)  # D = 300 summed
    stored = policy.to_buffer(context)
    for rows in torch.arange(64).split(8):
        part = {name: tensor[rows] for name, tensor in stored.items()}
        new = chain_log_prob(policy, part, sample.chain[rows], spec).log_prob.detach()
        assert float((new - sample.log_prob[rows]).exp().sub(1).abs().max()) <= 1e-4


@pytest.fixture(scope="module")
def bf16_policy(tmp_path_factory):
    directory = bf16_backbone(clone(tmp_path_factory.mktemp("bf16") / "policy"))
    config = replace(PRESETS["tiny"], pretrained_path=str(directory), sigma_min=0.1, sigma_max=0.1)
    return make_policy(config)


@pytest.mark.slow
def test_lerobots_sampler_and_ours_agree_on_100_outcomes(tmp_path):
    """The same x_0 in both; tuning seeds."""
    from reinflow.evaluate import evaluate_seeds
    from reinflow.noise import episode_noise
    from reinflow.rollout import noise_free_actor, whole_tiles
    from so101_sim.vector.make import make_vector_env

    directory = clone(tmp_path / "policy")
    policy, stock = FAMILIES["smolvla"].load(directory, ActingSettings()), plain(directory)
    overrides = {"tokenizer_processor": {"tokenizer_name": str(directory / "vlm")}}
    before, after = make_pre_post_processors(stock.config, str(directory), preprocessor_overrides=overrides)

    @torch.no_grad()
    def act_by_lerobot(observation, seeds, decision):
        rows = whole_tiles(len(seeds))
        taken = take_rows(observation, rows)
        playing = [seeds[row] for row in rows]
        x_0 = episode_noise(playing, [decision] * len(rows), (50, 32), "x_0", torch.device("cpu"))
        chunk = stock.predict_action_chunk(before(lerobot_batch(taken, TWO)), noise=x_0)
        return after(chunk).double().numpy()[: len(seeds)]

    env = stored_env(model_dir() / "tiny_smolvla")
    ours, theirs = (
        evaluate_seeds(act, lambda n: make_vector_env(env, n), 5_000, 100, 50).episodes
        for act in (noise_free_actor(policy, SPEC), act_by_lerobot)
    )
    assert [row.success for row in ours] == [row.success for row in theirs]
    assert 20 < sum(row.success for row in ours) < 90


def test_a_damaged_export_is_refused_by_every_reader(tmp_path):
    from reinflow.checksums import write_sums

    directory = clone(tmp_path / "policy")
    write_sums(directory)
    assert not problems(directory)
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors is missing, or not as checksums.json says"):
        actions(directory)
    for change in (
        lambda c: c["input_features"][IMAGES + "camera_up"].update(shape=[3]),
        lambda c: c.update(num_steps="x"),
    ):
        strange = clone(tmp_path / f"strange{id(change)}")
        edit(strange, "config.json", change)
        with pytest.raises(UserError):
            actions(strange)


def test_what_was_found_on_a_second_look(tmp_path):
    nonsense = clone(tmp_path / "card")
    (nonsense / "reinflow.json").write_text('{"env": null}')
    assert not problems(nonsense)
    numbered = rename_cameras(clone(tmp_path / "numbered"), {"camera_up": "camera2", "wrist_camera": "camera1"})
    assert enter(numbered, DoorSettings(), TWO).cameras == {"camera2": "wrist_camera", "camera1": "camera_up"}
    silent = clone(tmp_path / "silent")
    edit(silent, "config.json", lambda c: c.pop("num_steps"))
    assert enter(silent, DoorSettings(), TWO).num_denoising_steps == 10  # LeRobot's
    huge = clone(tmp_path / "huge")
    edit(huge, "config.json", lambda c: c.update(max_state_dim=10**400))
    with pytest.raises(UserError, match="which no policy has"):
        actions(huge)
    raw = clone(tmp_path / "raw")
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit(raw, name, lambda c: [
            s["config"]["norm_map"].update(STATE="IDENTITY", ACTION="IDENTITY")
            for s in c["steps"] if "normalizer" in s["registry_name"]
        ])  # fmt: skip
    assert "cannot be folded in" in problems(raw, joint_frame="so100_legacy") and not problems(raw)
    linked = clone(tmp_path / "linked")
    (tmp_path / "secret.txt").write_text("secret")
    (linked / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="holds no files from elsewhere"):
        export(ExportConfig(str(linked), tmp_path / "out"))
    with pytest.raises(UserError, match="of SmolVLA alone"):
        export(ExportConfig(str(model_dir() / "tiny_pi0"), tmp_path / "out", fp32_backbone=True))
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_does_not_look_at_the_outside_again(tmp_path):
    (tmp_path / "data/meta").mkdir(parents=True)
    features = ("observation.state", "action")
    stats = {f: {w: OWN[f"{f}.{w}"].tolist() for w in ("mean", "std")} for f in features}
    (tmp_path / "data/meta/stats.json").write_text(json.dumps(stats))
    config = replace(
        parse_args(["--preset", "tiny", "--smoke"]), output_dir=str(tmp_path / "run"), wandb_enabled=False,
        report_episodes=0, num_threads=1, normalization=f"dataset:{tmp_path / 'data'}",
    )  # fmt: skip
    train(config)
    shutil.rmtree(tmp_path / "data")
    train(replace(config, resume=True, num_episodes=6))
    after = load_arrays(
        tmp_path / "run/checkpoints/last/pretrained_model/policy_preprocessor_step_5_normalizer_processor.safetensors"
    )  # fmt: skip
    np.testing.assert_allclose(after["action.mean"], OWN["action.mean"], rtol=1e-6)


def test_cameras_that_lerobot_renamed_in_training_are_the_ones_it_knows(tmp_path):
    """lerobot-train --rename_map keeps a base's camera1 to camera3, and its statistics by the data set's names."""
    folder = rename_cameras(clone(tmp_path / "p"), {"camera_up": "camera1", "wrist_camera": "camera2"})
    add_camera(folder, "camera3", (3, 96, 96))
    names = {"observation.images.camera_up": "camera1", "observation.images.wrist_camera": "camera2"}
    rename = {name: f"observation.images.{theirs}" for name, theirs in names.items()}
    for step in json.loads((folder / "policy_preprocessor.json").read_text())["steps"]:
        if step["registry_name"] == "normalizer_processor":
            file, declared = folder / step["state_file"], step
    edit(folder, "policy_preprocessor.json", lambda c: [
        s["config"].update(rename_map=rename) if s["registry_name"] == "rename_observations_processor" else
        s["config"]["features"].update({"observation.images.camera3": {"type": "VISUAL", "shape": [3, 96, 96]}})
        if s["registry_name"] == declared["registry_name"] else None
        for s in c["steps"]
    ])  # fmt: skip
    seen = {f"{name}.mean": np.full((3, 1, 1), 0.5, dtype=np.float32) for name in rename}
    save_arrays(load_arrays(file) | seen, file)
    assert known_cameras(folder) == (["camera1", "camera2"], ["camera3"])
    entrance = enter(folder, DoorSettings(), CAMERA_NAMES)
    assert entrance.problems == [] and entrance.cameras == {"camera1": "camera_up", "camera2": "wrist_camera"}
