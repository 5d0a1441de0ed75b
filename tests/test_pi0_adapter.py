"""What only Pi0 does: its strict loader and errors, recomputation, adapters, bf16, stock export, and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinflow import ConfigError
from reinflow.checkpoint import load_training_state, resolve_checkpoint
from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.metrics import read_metrics
from reinflow_so101.commands.evaluate import find_policy, parse_args, run_eval
from reinflow_so101.commands.materialize import materialize
from reinflow_so101.stages.build_pi0 import TinyPi0Config, build_policy
from reinflow_vla.directory import PolicyDirectoryError, read_json, store_tokenizer, write_json
from reinflow_vla.lora import adapters
from reinflow_vla.pi0_directory import GATED_TOKENIZER, load_pi0, policy_class, reduced_sizes, stored_sizes
from so101_mujoco_utils import model_dir
from tests.policies import explore, load, noise_for, observe, saved_bytes
from train_reinflow import PRESETS, TrainingConfig, make_policy, train

EMBEDDED = model_dir() / "tiny_pi0"
SPEC = ChainSpec(2, "action")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "copy"))


def draw(policy):
    """Context and a sampled chain of three decisions."""
    context = policy.encode(policy.preprocess(observe(policy)))
    return context, sample_chain(policy, context, SPEC, noise_for(policy), explore(policy, SPEC)).chain


def gradients(policy, context, chain) -> dict[str, torch.Tensor]:
    chain_log_prob(policy, context, chain, SPEC).log_prob.sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


# --- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_must_fit_where_the_library_goes_on(copy, change, capsys):
    file, name = copy / "model.safetensors", "model.action_out_proj.weight"
    weights = load_file(file)
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.other"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, file)
    with pytest.raises(
        PolicyDirectoryError, match=rf"(?s){'other' if change == 'unexpected' else name}.*random weights"
    ):
        load_pi0(copy)
    with reduced_sizes(stored_sizes(copy)):
        policy_class("pi0").from_pretrained(copy)  # says a warning and returns
    assert "Could not load state dict" in capsys.readouterr().out


def test_weights_are_those_of_the_file():
    policy, *_ = load_pi0(EMBEDDED)
    stored = load_file(EMBEDDED / "model.safetensors")
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in stored.items())
    assert sum(p.numel() for p in policy.parameters()) == 170_880


def test_unfit_directories_are_named(copy):
    write_json(copy / "sizes.json", {"depth": 2})
    with pytest.raises(PolicyDirectoryError, match=r"sizes\.json.*head_dim"):
        load_pi0(copy)
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", config | {"type": "smolvla"})
    with pytest.raises(PolicyDirectoryError, match="'smolvla', not one of"):
        load_pi0(copy)
    with pytest.raises(PolicyDirectoryError, match=r"hf download lerobot/pi0"):
        load_pi0("lerobot/pi0")


def test_relative_actions_are_refused(copy):
    write_json(copy / "config.json", read_json(copy / "config.json") | {"use_relative_actions": True})
    with pytest.raises(PolicyDirectoryError, match="use_relative_actions"):
        load_pi0(copy)


def test_gated_tokenizer_says_repository_licence_and_override(copy):
    store_tokenizer(copy, GATED_TOKENIZER)
    with pytest.raises(PolicyDirectoryError) as caught:
        load_pi0(copy)
    for part in (
        GATED_TOKENIZER,
        "accept its licence at https://huggingface.co",
        "hf auth login",
        "--pi0-tokenizer-path",
    ):
        assert part in str(caught.value)
    policy, *_ = load_pi0(copy, tokenizer=str(EMBEDDED / "tokenizer"))
    assert policy.config.type == "pi0"
    with pytest.raises(PolicyDirectoryError, match="pi0_tokenizer_path=nowhere"):
        load_pi0(copy, tokenizer="nowhere")


def test_build_refuses(tmp_path):
    with pytest.raises(PolicyDirectoryError, match="exists"):
        build_policy(TinyPi0Config(output_dir=tmp_path))
    with pytest.raises(PolicyDirectoryError, match="multiple"):
        build_policy(TinyPi0Config(output_dir=tmp_path / "odd", image_size=100))


# --- The adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(policy_dirs, family):
    plain, saving = (load(family, policy_dirs[family], gradient_checkpointing=on) for on in (False, True))
    context, chain = draw(plain)
    kept = []
    for policy in (plain, saving):
        kept.append(saved_bytes(lambda p=policy: chain_log_prob(p, context, chain, SPEC)))
    assert kept[1] < 0.7 * kept[0]
    expected, found = gradients(plain, context, chain), gradients(saving, context, chain)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_adapters_learn_alone_start_at_zero_and_are_merged_by_the_export(policy_dirs, family, tmp_path):
    plain, adapted = load(family, policy_dirs[family]), load(family, policy_dirs[family], peft_rank=4)
    context, chain = draw(plain)
    before = chain_log_prob(plain, context, chain, SPEC).log_prob
    assert (chain_log_prob(adapted, context, chain, SPEC).log_prob - before).abs().max() < 1e-5
    counts = adapted.parameter_counts()
    factors = sum(p.numel() for module in adapters(adapted.expert()) for p in module.parameters())
    assert factors < counts["full_expert"] < plain.parameter_counts()["full_expert"] / 2
    learning = {name for name, p in adapted.expert().named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    expected = sample_chain(adapted, context, SPEC, chain[:, 0]).chain
    adapted.save_pretrained(tmp_path / "export")
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
    found = sample_chain(load(family, tmp_path / "export"), context, SPEC, chain[:, 0]).chain
    assert (found - expected).abs().max() < 1e-5
    unadapted = sample_chain(plain, context, SPEC, chain[:, 0]).chain
    assert (unadapted - expected).abs().max() > 1e-3


def test_bf16_language_model_with_fp32_trainables_keeps_the_ratio(tmp_path):
    policy = load("pi0", EMBEDDED, dtype="bfloat16")
    inside = policy.vla.model.paligemma_with_expert
    assert inside.paligemma.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.policy_parameters())
    context, chain = draw(policy)
    assert context["kv"].dtype == torch.bfloat16 and context["features"].dtype == torch.float32
    drawn = sample_chain(policy, context, SPEC, chain[:, 0], explore(policy, SPEC))
    score = chain_log_prob(policy, {k: v[:1] for k, v in context.items()}, drawn.chain[:1], SPEC)
    assert (score.log_prob - drawn.log_prob[:1]).exp().sub(1).abs().max() < 1e-4
    with torch.no_grad():  # an fp32 step that bf16 could not hold survives the export
        policy.expert().norm.weight.add_(1e-5)
    policy.save_pretrained(tmp_path / "export")
    again = load("pi0", tmp_path / "export")
    assert again.vla.config.dtype == "bfloat16"
    assert torch.equal(again.expert().norm.weight, policy.expert().norm.weight)


def test_part_of_a_chunk_cannot_be_executed():
    with pytest.raises(ValueError, match="n_action_steps=25 is not the policy's chunk_size=50"):
        load("pi0", EMBEDDED, n_action_steps=25)
    with pytest.raises(ConfigError, match="n_action_steps=25"):
        replace(PRESETS["tiny-pi0"], n_action_steps=25, chunks_per_episode=6)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_stock_library_loads_the_export_and_acts_alike(policy_dirs, family, tmp_path, monkeypatch):
    from lerobot.policies.factory import make_pre_post_processors

    ours = load(family, policy_dirs[family], k=2)
    ours.save_pretrained(tmp_path / "export")
    for file in (tmp_path / "export").rglob("*.json"):
        assert str(policy_dirs[family]) not in file.read_text()
    monkeypatch.chdir(tmp_path)
    target = materialize(tmp_path / "export", tmp_path / "absolute")
    with reduced_sizes(stored_sizes(target)):
        stock = policy_class(family).from_pretrained(target).eval()
    before, after = make_pre_post_processors(stock.config, pretrained_path=str(target))
    noise, observation = noise_for(ours), observe(ours)
    batch = {"observation.state": torch.as_tensor(observation["agent_pos"]), "task": observation["task"]}
    for camera, images in observation["pixels"].items():
        batch[f"observation.images.{camera}"] = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    found = after(stock.predict_action_chunk(before(batch), noise=noise)).double().numpy()
    context = ours.encode(ours.preprocess(observation))
    chain = sample_chain(ours, context, SPEC, noise).chain
    assert stock.config.num_inference_steps == 2
    assert abs(found - ours.postprocess(chain[:, -1, :, :6])).max() < 1e-3  # degrees


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> TrainingConfig:
    """The tiny-pi0 preset with two environments, everything real."""
    return replace(
        PRESETS["tiny-pi0"], output_dir=str(tmp_path / "straight"), num_episodes=4, num_parallel_envs=2,
        episodes_per_iteration=2, minibatch_size=3, gradient_accumulation_steps=1, save_interval=2, eval_episodes=2,
        report_episodes=0, lr_decay_ratio=1.0, wandb_enabled=False, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("peft_rank", [0, 2])
def test_two_iterations_resume_bitwise_and_evaluate(small, tmp_path, peft_rank):
    config = replace(small, peft_rank=peft_rank)
    train(config)
    resumed = replace(config, output_dir=str(tmp_path / "resumed"), num_episodes=2)
    train(resumed)
    train(replace(resumed, resume=True, num_episodes=4))
    first, second = (load_training_state(resolve_checkpoint(tmp_path / d)) for d in ("straight", "resumed"))
    assert first[1]["iteration"] == second[1]["iteration"] == 2
    assert first[0]["policy"].keys() == second[0]["policy"].keys()
    assert all(torch.equal(tensor, second[0]["policy"][name]) for name, tensor in first[0]["policy"].items())
    rows = read_metrics(tmp_path / "straight/metrics.jsonl")
    assert rows[1]["ppo/ratio_error_before_update"] < 1e-4 and "eval/success_rate" in rows[1]
    exported = find_policy(str(tmp_path / "straight"))
    before, after = load_file(EMBEDDED / "model.safetensors"), load_file(exported / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("gemma_expert.model" in name or "_proj" in name or "time_mlp" in name for name in changed)
    argv = ["--policy-path", str(exported), "--output-dir", str(tmp_path / "eval"), "--episodes", "2"]
    assert len(run_eval(parse_args(argv)).episodes) == 2
    assert json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]["pc_success"] >= 0


def test_pi0_presets_and_fields():
    assert make_policy(PRESETS["tiny-pi0"], "cpu").n_action_steps == 50
    with pytest.raises(ConfigError, match="peft_rank=4 is not read with model_type=smolvla"):
        replace(PRESETS["tiny"], peft_rank=4)
    with pytest.raises(ConfigError, match="peft_rank=4 adapts the expert"):
        replace(PRESETS["tiny-pi0"], peft_rank=4, train_full_expert=False)
    with pytest.raises(ConfigError, match="pretrained_path=tiny"):
        replace(PRESETS["tiny-pi0"], pretrained_path="tiny")
    with pytest.raises(PolicyDirectoryError, match=r"lerobot/pi0.*hf download"):
        make_policy(PRESETS["pi0"], "cpu")
