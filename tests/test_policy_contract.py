"""What every policy class must keep to be trained by the loop: one contract, run over all of them."""

from __future__ import annotations

import re
import shutil
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.training_state import CheckpointError
from reinflow_vla.base import TrainableGroups
from reinflow_vla.directory import PolicyDirectoryError
from tests.policies import FAMILIES, VLAS, explore, load, noise_for, observe, only

EXPERT_OF_PI0 = "vla.model.paligemma_with_expert.gemma_expert.model."
LEARNS: dict[str, dict[str, tuple[str, ...]]] = {  # by flag, the parameters that must learn and no others
    "smolvla": {
        "train_action_head": ("vla.model.action_out_proj.",),
        "train_time_mlp": ("vla.model.action_time_mlp_in.", "vla.model.action_time_mlp_out."),
        "train_full_expert": ("vla.model.vlm_with_expert.lm_expert.", "vla.model.action_in_proj."),
    },
    "pi0": {
        "train_action_head": ("vla.model.action_out_proj.",),
        "train_time_mlp": ("vla.model.action_time_mlp_in.", "vla.model.action_time_mlp_out."),
        "train_full_expert": (EXPERT_OF_PI0, "vla.model.action_in_proj.", "vla.model.state_proj."),
    },
    "pi05": {
        "train_action_head": ("vla.model.action_out_proj.",),
        "train_time_mlp": ("vla.model.time_mlp_in.", "vla.model.time_mlp_out."),
        "train_full_expert": (EXPERT_OF_PI0, "vla.model.action_in_proj."),
    },
    "flow_mlp": {"train_action_head": ("head.",), "train_full_expert": ("trunk.",)},
}
HEADS = {"train_noise_head": ("noise_mlp.",), "train_critic": ("critic.",)}


class Subject(NamedTuple):
    """A policy and three encoded observations of it."""

    family: str
    directory: Any
    policy: Any
    context: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def subjects(policy_dirs) -> dict[str, Subject]:
    loaded = {family: load(family, policy_dirs[family]) for family in FAMILIES}
    return {
        family: Subject(family, policy_dirs[family], policy, policy.encode(policy.preprocess(observe(policy))))
        for family, policy in loaded.items()
    }


@pytest.fixture(params=FAMILIES)
def subject(request, subjects) -> Subject:
    return subjects[request.param]


@pytest.fixture(params=VLAS)
def vla(request, subjects) -> Subject:
    return subjects[request.param]


def noise_free(subject: Subject, noise: torch.Tensor) -> torch.Tensor:
    """Actions (B, n, A) of the chain without exploration noise."""
    chain = sample_chain(subject.policy, subject.context, ChainSpec(3), noise).chain
    return chain[:, -1, :, : subject.policy.action_dim]


def test_verbs_give_the_promised_shapes(subject):
    policy, context, x_t = subject.policy, subject.context, noise_for(subject.policy)
    assert all(len(tensor) == 3 for tensor in context.values())
    assert not any(tensor.requires_grad for tensor in context.values())
    velocity, features = policy.velocity(context, x_t, torch.full((3,), 0.5))
    assert velocity.shape == x_t.shape and features.shape[:2] == x_t.shape[:2]
    std = policy.noise_std(features)
    assert std.shape == (3, policy.n_action_steps, policy.action_dim)
    assert torch.allclose(std, torch.tensor(0.15))  # the middle of the bounds, before anything was learnt
    assert policy.value(context).shape == (3,)
    actions = policy.postprocess(x_t[..., : policy.action_dim])
    assert isinstance(actions, np.ndarray) and actions.dtype == np.float64


def test_noise_free_chain_is_the_librarys_sampler(vla):
    noise = noise_for(vla.policy)
    expected = vla.policy.vla.predict_action_chunk(vla.policy.preprocess(observe(vla.policy)), noise=noise)
    assert (noise_free(vla, noise) - expected).abs().max() < 1e-5
    assert expected.std(dim=0).max() > 1e-2  # observations do change the actions


@pytest.mark.parametrize("spec", [ChainSpec(1), ChainSpec(3, "action"), ChainSpec(2, "dim", "dct", 5)], ids=str)
def test_ratio_is_one_for_any_batch_composition(subject, spec):
    policy, context = subject.policy, subject.context
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    rows = torch.tensor([2, 0])
    part = {name: tensor[rows] for name, tensor in context.items()}
    score = chain_log_prob(policy, part, drawn.chain[rows], spec)
    assert (score.log_prob - drawn.log_prob[rows]).exp().sub(1).abs().max() < 1e-4  # the guard's own limit


def test_cached_prefix_equals_the_joint_training_forward(vla):
    """Velocity from the cache against the library's own training pass over prefix and suffix together."""
    policy, flow = vla.policy, vla.policy.vla.model
    batch = policy.preprocess(observe(policy))
    prepare_images = getattr(policy.vla, "prepare_images", None) or policy.vla._preprocess_images
    state = [] if vla.family == "pi05" else [policy.vla.prepare_state(batch)]
    actions, noise, time = noise_for(policy), noise_for(policy) * 0.5, torch.tensor([0.9, 0.5, 0.1])
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    language = (batch["observation.language.tokens"], batch["observation.language.attention_mask"])
    losses = flow.forward(*prepare_images(batch), *language, *state, actions, noise, time)
    velocity, _ = policy.velocity(vla.context, x_t, time)
    assert ((velocity - (noise - actions)) ** 2 - losses).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "flag"), [(family, flag) for family in FAMILIES for flag in (*LEARNS[family], *HEADS)]
)
def test_each_flag_lets_its_group_learn_and_nothing_else(policy_dirs, family, flag):
    policy = load(family, policy_dirs[family], k=1, groups=only(flag))
    context, spec = policy.encode(policy.preprocess(observe(policy))), ChainSpec(1, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    loss = chain_log_prob(policy, context, drawn.chain, spec).log_prob.sum() + policy.value(context).sum()
    loss.backward()
    expected = {name for name, _ in policy.named_parameters() if name.startswith((LEARNS[family] | HEADS)[flag])}
    assert expected == {name for name, p in policy.named_parameters() if p.grad is not None}
    assert expected == {name for name, p in policy.named_parameters() if p.requires_grad}
    learning = {id(p) for p in (*policy.policy_parameters(), *policy.critic_parameters())}
    assert learning == {id(p) for name, p in policy.named_parameters() if name in expected}
    if family in VLAS:
        counts = policy.parameter_counts()
        assert counts.pop(flag.removeprefix("train_")) == sum(policy.get_parameter(n).numel() for n in expected) > 0
        assert not any(counts.values())


def test_policy_acts_and_learns_in_eval_mode(subject):
    assert not any(module.training for module in subject.policy.modules())


def test_trainable_weights_are_fp32(subject):
    learning = subject.policy.policy_parameters() + subject.policy.critic_parameters()
    assert learning and all(p.dtype == torch.float32 for p in learning)


def test_trainable_state_round_trip_is_strict(subject):
    policy, other = subject.policy, load(subject.family, subject.directory)
    with torch.no_grad():
        for parameter in (*other.policy_parameters(), *other.critic_parameters()):
            parameter.add_(0.1)
    other.load_trainable_state(policy.trainable_state())
    pairs = zip(policy.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    broken = policy.trainable_state()
    broken.pop("critic.mlp.0.weight")
    with pytest.raises(ValueError, match=r"critic\.mlp\.0\.weight"):
        other.load_trainable_state(broken)


def test_export_reloads_to_the_same_actions(subject, tmp_path):
    subject.policy.save_pretrained(tmp_path / "export")
    again = load(subject.family, tmp_path / "export")
    context = again.encode(again.preprocess(observe(again)))
    noise = noise_for(again)
    actions = noise_free(Subject(subject.family, None, again, context), noise)
    assert (actions - noise_free(subject, noise)).abs().max() < 1e-6
    exported = {name for file in (tmp_path / "export").glob("*.safetensors") for name in _names(file)}
    assert not any("noise_mlp" in name or "critic" in name for name in exported)


def _names(file) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradients_are_those_of_the_library(vla, backend):
    spec, policy = ChainSpec(3), load(vla.family, vla.directory)
    chain = sample_chain(policy, vla.context, spec, noise_for(policy), explore(policy, spec)).chain.detach()

    def score_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        log_prob = chain_log_prob(policy, vla.context, chain, spec).log_prob
        log_prob.mean().backward()
        return log_prob, torch.cat([p.grad.flatten() for p in policy.policy_parameters() if p.grad is not None])

    log_prob, gradient = score_and_gradient()
    policy.compile_expert(backend)
    compiled_log_prob, compiled_gradient = score_and_gradient()
    assert (log_prob - compiled_log_prob).abs().max() < 1e-4
    assert (gradient - compiled_gradient).norm() < 1e-4 * gradient.norm()


def test_acting_is_never_compiled(vla, monkeypatch):
    policy = load(vla.family, vla.directory)
    calls = []
    eager = policy.vla.model.denoise_step
    monkeypatch.setattr(torch, "compile", lambda step, backend: lambda *a, **k: calls.append(1) or eager(*a, **k))
    policy.compile_expert()
    chain = sample_chain(policy, vla.context, ChainSpec(3), noise_for(policy), explore(policy, ChainSpec(3))).chain
    calls_with_gradient = len(calls)
    with torch.no_grad():
        chain_log_prob(policy, vla.context, chain.detach(), ChainSpec(3))
    assert len(calls) == calls_with_gradient
    chain_log_prob(policy, vla.context, chain.detach(), ChainSpec(3)).log_prob.sum().backward()
    assert len(calls) > calls_with_gradient


def test_missing_camera_is_named(vla):
    observation = observe(vla.policy)
    del observation["pixels"]["wrist_camera"]
    with pytest.raises(ValueError, match="wrist_camera"):
        vla.policy.preprocess(observation)


@pytest.mark.parametrize("lost", ["observation.state.", "action."])
def test_policy_without_statistics_is_refused(vla, tmp_path, lost):
    """LeRobot would pass joints and actions on as they are."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(vla.directory, tmp_path / "policy")
    for file in (tmp_path / "policy").glob("policy_*normalizer*.safetensors"):
        save_file({name: value for name, value in load_file(file).items() if not name.startswith(lost)}, file)
    with pytest.raises(PolicyDirectoryError, match=rf"hold no {lost}.*lerobot-train"):
        load(vla.family, tmp_path / "policy")


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_statistics_without_spread_are_refused(vla, tmp_path, key, value):
    """All of a joint's statistics the same, or none a number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(vla.directory, tmp_path / "policy")
    for file in (tmp_path / "policy").glob("policy_*normalizer*.safetensors"):
        statistics = load_file(file)
        for name in statistics:
            if name.startswith(f"{key}."):
                statistics[name][2] = value
        save_file(statistics, file)
    with pytest.raises(PolicyDirectoryError, match=rf"unusable {key}\."):
        load(vla.family, tmp_path / "policy")


def test_damaged_weights_are_refused_by_name(subject, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(subject.directory, tmp_path / "policy")
    file = tmp_path / "policy/model.safetensors"
    weights = load_file(file)
    damaged = max(weights)
    weights[damaged].view(-1)[0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model.safetensors is damaged: NaN.* in {re.escape(damaged)}"):
        load(subject.family, tmp_path / "policy")


def test_flags_are_those_of_the_config():
    assert set(LEARNS["smolvla"]) | set(HEADS) == set(TrainableGroups.__dataclass_fields__)
