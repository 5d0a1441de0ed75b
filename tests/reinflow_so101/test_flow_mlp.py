"""The state-based policy end to end: its contract, its supervised stage, training, resuming and evaluation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reinflow import ConfigError, UserError
from reinflow.checkpoint import load_training_state, resolve_checkpoint
from reinflow.evaluate import EvalResult
from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.flow_mlp import FlowMLP
from reinflow.metrics import read_metrics
from reinflow.policy import PolicyError
from reinflow_so101.commands.evaluate import EvalConfig, find_policy, parse_args, run_eval
from reinflow_so101.opening import settle
from reinflow_so101.policy_card import policy_card
from reinflow_so101.stages import sft_flow_mlp
from reinflow_so101.stages.sft_flow_mlp import FlowMlpSftConfig, FlowMlpSftError
from reinflow_so101.stages.state_data import StateEpisodes, write_state_dataset
from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, model_dir
from train_reinflow import PRESETS, TrainingConfig, make_policy, train

EMBEDDED = model_dir() / "flow_mlp"
STATES = len(ENVIRONMENT_STATE_NAMES)
GROUP_OF_FLAG = {
    "train_action_head": {"head"},
    "train_full_expert": {"trunk"},
    "train_noise_head": {"noise_mlp"},
    "train_critic": {"critic"},
}


@pytest.fixture
def small(tmp_path) -> TrainingConfig:
    """Two environments, one episode each per iteration, everything real."""
    return replace(
        PRESETS["flow_mlp"], output_dir=str(tmp_path / "run"), num_episodes=8, num_parallel_envs=2,
        episodes_per_iteration=2, minibatch_size=3, gradient_accumulation_steps=1, num_critic_epochs=1,
        critic_warmup_iters=1, save_interval=4, eval_interval=2, eval_episodes=2, report_episodes=0,
        lr_decay_ratio=1.0,
        wandb_enabled=False, device="cpu",
    )  # fmt: skip


@pytest.fixture
def observation() -> dict[str, np.ndarray]:
    """Four states of the environment, as a batch."""
    env = SO101PickEnv(PRESETS["flow_mlp"].env())
    rows = [env.reset(seed=seed)[0]["environment_state"] for seed in range(4)]
    env.close()
    return {"environment_state": np.stack(rows)}


def evaluate(path: Path | str, out: Path, *flags: str) -> EvalResult:
    """reinflow-eval as the command line would run it, with nothing said of the environment."""
    argv = ["--policy-path", str(path), "--output-dir", str(out), "--episodes", "2", "--seed", "5000", *flags]
    return run_eval(parse_args(argv))


# --- The contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_noise_free_chain_is_eulers_and_ends_at_the_predicted_action(observation, k):
    policy = FlowMLP.from_pretrained(EMBEDDED)
    with torch.no_grad():
        context = policy.encode(policy.preprocess(observation))
        x_t = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0))
        drawn = sample_chain(policy, context, ChainSpec(k), x_t)
        for step in range(k):
            flow_time = torch.full((4,), 1 - step / k)
            x_t = x_t - policy.velocity(context, x_t, flow_time)[0] / k
    assert drawn.chain.shape == (4, k + 1, 50, 6)
    assert torch.allclose(drawn.chain[:, -1], x_t, atol=1e-5)
    assert policy.postprocess(x_t).dtype == np.float64


def test_ratio_is_one_and_the_gradient_reaches_what_is_trained(observation):
    config = PRESETS["flow_mlp"]
    policy, spec = make_policy(config, "cpu"), ChainSpec(1, "dim", "dct", 5)
    policy.set_noise_bounds(0.1, 0.2)
    with torch.no_grad():
        context = policy.encode(policy.preprocess(observation))
        generator = torch.Generator().manual_seed(0)
        x_0, eps = (torch.randn(4, *shape, generator=generator) for shape in ((50, 6), spec.noise_shape(50, 6)))
        drawn = sample_chain(policy, context, spec, x_0, eps)
    score = chain_log_prob(policy, context, drawn.chain, spec)
    assert (score.log_prob - drawn.log_prob).exp().sub(1).abs().max() < 1e-4
    (score.log_prob.sum() + policy.value(context).sum()).backward()
    for parameter in (*policy.policy_parameters(), *policy.critic_parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_pure_noise_says_nothing_of_the_action(observation):
    """At flow time 1 the network is not shown x_t, so one denoising step gives one action whatever the noise."""
    policy = FlowMLP.from_pretrained(EMBEDDED)
    with torch.no_grad():
        context = policy.encode(policy.preprocess(observation))
        ends = [x - policy.velocity(context, x, torch.ones(4))[0] for x in torch.randn(2, 4, 50, 6)]
    assert torch.allclose(ends[0], ends[1], atol=1e-5)


@pytest.mark.parametrize("flag", GROUP_OF_FLAG)
def test_every_train_flag_freezes_its_group(flag):
    changes = {flag: False} | ({"train_time_mlp": False} if flag == "train_full_expert" else {})
    policy = make_policy(replace(PRESETS["flow_mlp"], **changes), "cpu")
    frozen = {name for name in FlowMLP.GROUPS if not next(policy.get_submodule(name).parameters()).requires_grad}
    assert frozen == GROUP_OF_FLAG[flag]
    learned = {id(p) for p in (*policy.policy_parameters(), *policy.critic_parameters())}
    assert learned == {id(p) for p in policy.parameters() if p.requires_grad}


def test_saving_leaves_noise_and_critic_out_and_loading_is_strict(tmp_path):
    torch.manual_seed(0)
    policy = FlowMLP(STATES, 6, 25, num_denoising_steps=2, hidden_size=16)
    policy.save_pretrained(tmp_path)
    loaded = FlowMLP.from_pretrained(tmp_path, sigma_min=0.3, sigma_max=0.3, critic_hidden_size=8)
    assert (loaded.chunk_size, loaded.n_action_steps, loaded.num_denoising_steps) == (25, 25, 2)
    assert torch.equal(loaded.head.weight, policy.head.weight)
    assert not torch.equal(loaded.critic.mlp[0].weight[:8], policy.critic.mlp[0].weight[:8])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="other shape"):
        FlowMLP.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"type": "act"}))
    with pytest.raises(PolicyError, match="flow_mlp"):
        FlowMLP.from_pretrained(tmp_path)


def test_an_observation_that_does_not_fit_is_named():
    policy = FlowMLP(STATES, 6, 50)
    with pytest.raises(PolicyError, match="environment_state=True"):
        policy.preprocess({"agent_pos": np.zeros((1, 6))})
    with pytest.raises(PolicyError, match=f"3 entries.*{STATES}"):
        policy.preprocess({"environment_state": np.zeros((1, 3))})


# --- Training ------------------------------------------------------------------------------------------------------


def test_training_resumes_bit_for_bit_and_changes_all_groups(small, tmp_path):
    train(small)
    resumed = replace(small, output_dir=str(tmp_path / "resumed"), num_episodes=4)
    train(resumed)
    train(replace(resumed, resume=True, num_episodes=8))
    states = [load_training_state(resolve_checkpoint(tmp_path / run))[0]["policy"] for run in ("run", "resumed")]
    start = make_policy(small, "cpu").trainable_state()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for group in ("trunk", "head", "critic"):
        assert any(not torch.equal(start[n], t) for n, t in states[0].items() if n.startswith(group + ".")), group
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["progress/episodes"] for row in rows] == [2, 4, 6, 8]
    assert all(row["ppo/ratio_error_before_update"] < 1e-4 for row in rows)


def test_a_checkpoint_brings_its_environment_to_reinflow_eval(small, tmp_path):
    train(replace(small, num_episodes=4, num_denoising_steps=2))
    policy_dir = find_policy(str(tmp_path / "run"))
    card = json.loads((policy_dir / "reinflow.json").read_text())
    assert card["env"]["environment_state"] and not card["env"]["render_images"]
    assert card.keys() == {"env"} and json.loads((policy_dir / "config.json").read_text())["num_denoising_steps"] == 2
    result = evaluate(tmp_path / "run", tmp_path / "eval")
    assert [row.seed for row in result.episodes] == [5_000, 5_001]
    assert FlowMLP.from_pretrained(find_policy(str(tmp_path / "run"))).num_denoising_steps == 2


def test_the_embedded_policy_can_be_evaluated_and_watched(tmp_path):
    flags = ("--video", "--video-episodes", "1", "--env.image-size", "32")
    first = evaluate("flow_mlp", tmp_path / "a", *flags)
    second = evaluate(EMBEDDED, tmp_path / "b")
    assert first.episodes == second.episodes
    assert (tmp_path / "a/video.mp4").stat().st_size > 500
    half = evaluate("flow_mlp", tmp_path / "c", "--n-action-steps", "25")  # of the 50 that it predicts
    assert [row.seed for row in half.episodes] == [5_000, 5_001] and half.episodes != first.episodes
    with pytest.raises(UserError, match="n_action_steps=60"):
        run_eval(EvalConfig(policy_path="flow_mlp", output_dir=str(tmp_path / "d"), n_action_steps=60))


def test_what_does_not_fit_is_refused_by_name(small, tmp_path):
    with pytest.raises(PolicyError, match=f"{tmp_path}.*flow_mlp"):
        make_policy(replace(small, flow_mlp_pretrained_path=str(tmp_path)), "cpu")
    with pytest.raises(ConfigError, match="chunk_size=25"):
        make_policy(replace(small, chunk_size=25, n_action_steps=25, chunks_per_episode=6), "cpu")


# --- The supervised stage ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    """What the command writes with a tiny budget."""
    out = tmp_path_factory.mktemp("sft") / "policy"
    config = FlowMlpSftConfig(
        out, episodes=2, steps=5, batch_size=8, hidden_size=16, chunk_size=25, num_denoising_steps=2, eval_episodes=2
    )
    return out, sft_flow_mlp.finetune(config)


def test_sft_writes_a_policy_that_trains_and_evaluates(made, small, tmp_path):
    out, record = made
    assert 0 < record["loss"] < 10 and 0 <= record["success"] <= 1
    assert json.loads((out / "sft.json").read_text())["demonstrations_tried"] >= 2
    assert len(evaluate(out, tmp_path / "eval").episodes) == 2
    train(replace(
        small, flow_mlp_pretrained_path=str(out), chunk_size=25, n_action_steps=25, chunks_per_episode=6,
        num_denoising_steps=2, num_episodes=2, eval_interval=0,
    ))  # fmt: skip
    with pytest.raises(FlowMlpSftError, match="output_dir"):
        sft_flow_mlp.finetune(FlowMlpSftConfig(out))


def test_samples_are_the_decisions_and_their_chunks():
    state = np.arange(12, dtype=np.float32).reshape(1, 12, 1)
    data = sft_flow_mlp.StateDemonstrations(state, state.repeat(6, axis=2) * 10, tried=1)
    states, chunks = sft_flow_mlp.decision_samples(data, chunk_size=6, jitter=1)
    assert states[:, 0].tolist() == [0, 1, 6, 7]
    assert chunks.shape == (4, 6, 6)
    assert chunks[1, :, 0].tolist() == [10, 20, 30, 40, 50, 60]
    assert chunks[3, :, 0].tolist() == [70, 80, 90, 100, 110, 110]  # the last action is held


def test_every_state_has_a_floor_for_its_std():
    floors = dict(zip(ENVIRONMENT_STATE_NAMES, sft_flow_mlp.least_state_std(), strict=True))
    assert floors["wrist_roll_vel"] == 2.0 and floors["block_linvel_z"] == 2.0
    assert floors["tool_pos_x"] == floors["tool_to_block_y"] == 0.01
    assert floors["gripper_pos_rad"] == 0.05 and floors["moving_jaw_force_x"] == 0.5


def test_one_step_share_trains_at_pure_noise(monkeypatch):
    policy, seen = FlowMLP(3, 2, 4, hidden_size=8), []
    predict = policy._predict_action
    monkeypatch.setattr(policy, "_predict_action", lambda c, x, t: (seen.append(t), predict(c, x, t))[1])
    policy.flow_matching_loss(torch.randn(400, 3), torch.randn(400, 4, 2), one_step_share=0.5).backward()
    assert float((seen[0] == 1.0).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("episodes", {"episodes": 0}),
        ("lr", {"lr": 0.0}),
        ("chunk_size", {"chunk_size": 40}),
        ("jitter", {"jitter": 50}),
        ("one_step_share", {"one_step_share": 1.5}),
        ("first_seed", {"first_seed": 4_990}),
        ("eval_seed", {"eval_seed": 4_999}),
        ("eval_seed", {"eval_seed": 9_900}),
    ],
)
def test_bad_sft_config_is_refused_by_name(name, changes):
    with pytest.raises(FlowMlpSftError, match=name):
        FlowMlpSftConfig(Path("x"), **changes)


@pytest.mark.parametrize("change", [{"chunk_size": None}, {"chunk_size": "x"}, {"num_denoising_steps": 0}])
def test_sizes_that_are_none_are_refused_before_a_run_begins(tmp_path, change):
    directory = tmp_path / "policy"
    shutil.copytree(model_dir() / "flow_mlp", directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(PolicyError, match=next(iter(change))):
        settle(replace(PRESETS["flow_mlp"], flow_mlp_pretrained_path=str(directory)), directory)


def state_data(root: Path, states: int = STATES, actions: int = 6, card: dict | None = None) -> Path:
    """Two episodes of numbers."""
    rng = np.random.default_rng(0)
    rows = [[rng.normal(size=(length, size)).astype(np.float32) for length in (20, 9)] for size in (states, actions)]
    write_state_dataset(root, StateEpisodes(rows[0], rows[1], None, [False, False]), 50, "t", card or {})
    return root


def test_a_data_set_of_states_is_learned_from_and_says_what_is_played(tmp_path, capsys):
    task = json.loads(policy_card(sft_flow_mlp.task_environment("lift_wide"))["reinflow.json"])
    root = state_data(tmp_path / "data", card=task)
    config = FlowMlpSftConfig(
        tmp_path / "policy", dataset_root=str(root), steps=3, batch_size=4, hidden_size=8, chunk_size=16,
        n_action_steps=8, jitter=0, eval_episodes=2,
    )  # fmt: skip
    record = sft_flow_mlp.finetune(config)
    assert 0 <= record["success"] <= 1 and "demonstrations_tried" not in record
    assert "task: lift_wide" in (out := capsys.readouterr().out) and "2 episodes, 5 samples" in out
    policy = FlowMLP.from_pretrained(tmp_path / "policy")
    assert (policy.chunk_size, policy.n_action_steps) == (16, 8)
    assert json.loads((tmp_path / "policy/reinflow.json").read_text())["env"]["task"] == "lift_wide"
    assert json.loads((tmp_path / "policy/stage.json").read_text())["record"] == record


def test_a_gymnasium_data_set_is_played_in_its_environment(tmp_path, capsys):
    card = {"env": {"env_id": "Pendulum-v1", "max_steps_per_episode": 8}}
    root = state_data(tmp_path / "data", 3, 1, card)
    config = FlowMlpSftConfig(
        tmp_path / "policy", dataset_root=str(root), steps=3, batch_size=4, hidden_size=8, chunk_size=4,
        every_frame=True, jitter=0, eval_episodes=2, num_parallel_envs=1, dataset_episodes=1,
    )  # fmt: skip
    record = sft_flow_mlp.finetune(config)
    assert record.keys() == {"loss", "return"} and record["return"] < 0
    assert "1 episodes, 20 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "policy/reinflow.json").read_text()) == card


def test_the_supervised_stage_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    root = state_data(tmp_path / "data")
    whole = FlowMlpSftConfig(
        tmp_path / "whole", dataset_root=str(root), steps=12, batch_size=4, hidden_size=8, chunk_size=4, jitter=0,
        eval_episodes=0, save_every=5,
    )  # fmt: skip
    cut = replace(whole, output_dir=tmp_path / "cut")
    sft_flow_mlp.finetune(whole)
    real = FlowMLP.flow_matching_loss
    calls = iter(range(100))

    def stops(*arguments):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(FlowMLP, "flow_matching_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        sft_flow_mlp.finetune(cut)
    monkeypatch.setattr(FlowMLP, "flow_matching_loss", real)
    with pytest.raises(ConfigError, match="lr"):
        sft_flow_mlp.finetune(replace(cut, resume=True, lr=0.1))
    sft_flow_mlp.finetune(replace(cut, resume=True))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


@pytest.mark.parametrize(
    ("name", "changes"),
    [("n_action_steps", {"n_action_steps": 60}), ("every_frame", {"every_frame": True}), ("jitter", {"jitter": 50})],
)
def test_flags_of_data_sets_are_refused_by_name(name, changes):
    with pytest.raises(FlowMlpSftError, match=name):
        FlowMlpSftConfig(Path("x"), **changes)
    FlowMlpSftConfig(Path("x"), chunk_size=16, n_action_steps=8)
