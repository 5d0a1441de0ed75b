"""A policy of which only the heads learn: an update runs nothing but the heads, with the gradients of the whole."""

import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.learner import LearnerSettings, PPOLearner
from reinflow.policy import PolicyError
from reinflow.rollout import RolloutSettings, RolloutState, collect_rollout
from reinflow.seeds import TrainingSeeds
from reinflow_vla.base import TrainableGroups
from reinflow_vla.prefix_cache import HEADS, STORED_BY, PrefixCache, plan_prefix_cache
from so101_sim.config import EnvConfig
from so101_sim.vector.make import make_vector_env
from tests.policies import VLAS, explore, load, noise_for, observe

HEADS_ONLY = TrainableGroups(True, False, False, True, True)
SPECS = {
    "one step": ChainSpec(1, "action"),
    "three steps": ChainSpec(3, "dim", "dct"),
    "last of three": ChainSpec(3, "chunk", noise_last_step_only=True),
    "flow_sde": ChainSpec(3, "action", chain_noise="flow_sde"),
}


@pytest.fixture(scope="module", params=VLAS)
def policy(request, policy_dirs):
    return load(request.param, policy_dirs[request.param], groups=HEADS_ONLY)


def gradients(policy, score):
    policy.zero_grad()
    (score.log_prob.sum() + score.entropy.sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SPECS)
def test_the_same_ratios_and_gradients_as_through_the_expert(policy, name, monkeypatch):
    spec = SPECS[name]
    policy.prefix_cache = PrefixCache(HEADS)
    context = policy.encode(policy.preprocess(observe(policy)))
    rows = torch.tensor([2, 0])
    noisy = torch.tensor([[1], [0], [2]]) if spec.chain_noise == "flow_sde" else None
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec), noisy)
    assert drawn.head_inputs.shape[:3] == (3, spec.num_noisy_steps, policy.denoised_steps)
    part = {key: tensor[rows] for key, tensor in context.items()}
    chosen = None if noisy is None else noisy[rows]
    whole = chain_log_prob(policy, part, drawn.chain[rows], spec, chosen)
    expected = gradients(policy, whole)

    kept = policy.to_buffer(context)
    assert "kv" not in kept and "features" in kept
    monkeypatch.setattr(policy, "denoise", None)  # nothing may ask for the expert
    score = chain_log_prob(policy, kept, drawn.chain[rows], spec, chosen, drawn.head_inputs[rows])
    assert (score.log_prob - drawn.log_prob[rows]).exp().sub(1).abs().max() < 1e-4
    got = gradients(policy, score)
    assert got.keys() == expected.keys() and len(got) >= 2
    for key, gradient in got.items():
        assert (gradient - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max().clamp(min=1e-3), key


def test_auto_keeps_them_where_nothing_else_learns(policy, policy_dirs):
    plan = policy.plan_prefix_cache(observe(policy, batch=1), "auto", 10, 0.0)
    assert plan.keep == HEADS and policy.settled() == {"prefix_cache": "heads"}
    context = policy.encode(policy.preprocess(observe(policy)))
    spec = ChainSpec(policy.num_denoising_steps, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    assert plan.bytes_per_decision == drawn.head_inputs[0].numel() * 4
    whole = load("smolvla", policy_dirs["smolvla"])
    assert whole.plan_prefix_cache(observe(whole, batch=1), "auto", 10, 0.0).keep == "kv"
    with pytest.raises(PolicyError, match="--no-train-full-expert"):
        whole.plan_prefix_cache(observe(whole, batch=1), "heads", 10, 0.0)


@pytest.mark.parametrize(("optimizer", "keep"), [("natural", "kv"), ("adam", "embeddings")])
def test_heads_first_leaves_the_expert_for_later(policy_dirs, optimizer, keep):
    """Of a policy whose expert learns too, rollouts keep what the heads read as long as they learn alone. The decision
    after it was encoded within it, and the update has all that it reads of it."""
    policy = load("smolvla", policy_dirs["smolvla"])
    policy.prefix_cache = PrefixCache(keep)
    spec = ChainSpec(policy.num_denoising_steps, "dim")
    settings = LearnerSettings(
        optimizer, target_kl=0.02, num_ppo_epochs=1, num_critic_epochs=1, minibatch_size=2,
        gradient_accumulation_steps=3, policy_lr=1e-4,
    )  # fmt: skip
    learner = PPOLearner(policy, spec, settings, seed=0)
    expert = policy.trainable_groups()["full_expert"]
    env, seeds = make_vector_env(EnvConfig(cameras=policy.cameras, image_size=32), 2), TrainingSeeds(0)
    current = RolloutState.start(policy, env, seeds)

    def moved_by_an_update():
        nonlocal current
        before = [p.detach().clone() for p in expert]
        heads = policy.vla.model.action_out_proj.weight.detach().clone()
        buffer, _, current = collect_rollout(
            policy, env, current, 3, spec, RolloutSettings(), learner.normalizer, seeds
        )
        learner.update(buffer)
        assert not torch.equal(heads, policy.vla.model.action_out_proj.weight)
        return buffer, any(not torch.equal(a, b) for a, b in zip(before, expert, strict=True))

    policy.learn_heads_alone(True)
    buffer, moved = moved_by_an_update()
    assert buffer.head_inputs is not None and not moved
    assert not any(name.startswith(("kv", "embeddings", "batch.")) for name in buffer.context)
    policy.learn_heads_alone(False)
    buffer, moved = moved_by_an_update()
    assert buffer.head_inputs is None and moved
    assert any(name.startswith(STORED_BY[keep]) for name in buffer.context)


def test_a_policy_without_such_an_update_refuses(policy_dirs):
    policy = load("flow_mlp", policy_dirs["flow_mlp"])
    policy.learn_heads_alone(False)
    with pytest.raises(PolicyError, match="heads_first"):
        policy.learn_heads_alone(True)


def test_without_room_for_them_the_prefix_is_kept():
    sizes = {"heads": 2**22, "kv": 2**21, "embeddings": 2**20, "none": 2**19}
    assert plan_prefix_cache("auto", sizes, 1024, "cpu", 4.0).keep == "heads"
    assert plan_prefix_cache("auto", sizes, 1024, "cpu", 3.0).keep == "kv"
