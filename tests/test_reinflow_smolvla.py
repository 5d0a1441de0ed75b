"""The SmolVLA adapter against the stock library: same actions, exact ratios, counted parameters, stock export."""

import numpy as np
import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow_smolvla import ReinFlowSmolVLA
from reinflow_vla import TrainableGroups, cache_from, pack_cache

ALL = TrainableGroups(True, True, True, True, True)
TASK = "pick up the block"


def load(directory, k=3, n=50, groups=ALL) -> ReinFlowSmolVLA:
    torch.manual_seed(0)
    return ReinFlowSmolVLA.from_pretrained(
        directory, "cpu", num_denoising_steps=k, n_action_steps=n, sigma_min=0.1, sigma_max=0.2, groups=groups,
        critic_hidden_size=512,
    )  # fmt: skip


def observe(policy, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "pixels": {c: rng.integers(0, 255, (batch, 96, 96, 3), dtype=np.uint8) for c in policy.cameras},
        "agent_pos": rng.normal(0, 1, (batch, 6)).astype(np.float32),
        "task": [TASK] * batch,
    }


@pytest.fixture(scope="module")
def policy(tiny_policy_dir):
    return load(tiny_policy_dir)


@pytest.fixture(scope="module")
def context(policy):
    return policy.encode(policy.preprocess(observe(policy)))


def noise_for(policy, batch=3, n=50):
    return torch.randn(batch, n, policy.padded_action_dim, generator=torch.Generator().manual_seed(1))


def test_noise_free_chain_is_lerobots_sampler(policy, context):
    noise = noise_for(policy)
    chain = sample_chain(policy, context, ChainSpec(3), noise, deterministic=True).chain
    expected = policy.vla.predict_action_chunk(policy.preprocess(observe(policy)), noise=noise)
    assert (chain[:, -1, :, :6] - expected).abs().max() < 1e-5


def test_executed_tokens_alone_give_the_same_first_actions(policy, context, tiny_policy_dir):
    noise = noise_for(policy)
    full = sample_chain(policy, context, ChainSpec(3), noise, deterministic=True).chain
    short = load(tiny_policy_dir, n=10)
    part = sample_chain(short, context, ChainSpec(3), noise[:, :10], deterministic=True).chain
    assert (full[:, :, :10] - part).abs().max() < 1e-6
    assert short.vla.config.chunk_size == 50  # restored after every pass


@pytest.mark.parametrize("spec", [ChainSpec(1), ChainSpec(3, "action"), ChainSpec(2, "dim", "dct", 5)], ids=str)
def test_ratio_is_one_for_any_batch_composition(policy, context, spec):
    drawn = sample_chain(policy, context, spec, noise_for(policy), torch.Generator().manual_seed(2))
    rows = torch.tensor([2, 0])
    part = {name: tensor[rows] for name, tensor in context.items()}
    score = chain_log_prob(policy, part, drawn.chain[rows], spec)
    assert (score.log_prob - drawn.log_prob[rows]).exp().sub(1).abs().max() < 1e-4 or spec.reduction == "chunk"
    assert ((score.log_prob - drawn.log_prob[rows]).abs().max() / 300) < 1e-6


def test_padded_dims_matter_and_are_stored(policy, context, monkeypatch):
    """Dims 6..31 get no noise, but the velocity of a trained policy depends on them (a freshly built tiny one reads
    the joints alone): scoring must condition on the stored ones."""
    spec, reads = ChainSpec(2, "action"), policy.vla.model.action_in_proj.weight
    monkeypatch.setattr(reads, "data", reads.data + 0.1 * torch.ones_like(reads))
    drawn = sample_chain(policy, context, spec, noise_for(policy), torch.Generator().manual_seed(2))
    assert drawn.chain.shape == (3, 3, 50, 32)
    forgotten = drawn.chain.clone()
    forgotten[..., 6:] = 0
    score = chain_log_prob(policy, context, forgotten, spec)
    assert (score.log_prob - drawn.log_prob).abs().max() > 1e-2


def test_cached_prefix_equals_the_joint_training_forward(policy, context):
    """Velocity from the cache against the library's own training pass over prefix and suffix together."""
    batch = policy.preprocess(observe(policy))
    images, masks = policy.vla.prepare_images(batch)
    actions, noise, time = noise_for(policy), noise_for(policy) * 0.5, torch.tensor([0.9, 0.5, 0.1])
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    losses = policy.vla.model.forward(
        images, masks, batch["observation.language.tokens"], batch["observation.language.attention_mask"],
        policy.vla.prepare_state(batch), actions, noise, time,
    )  # fmt: skip
    velocity, _ = policy.velocity(context, x_t, time)
    assert ((velocity - (noise - actions)) ** 2 - losses).abs().max() < 1e-4


def test_cache_survives_a_second_backward(policy, context):
    spec = ChainSpec(1, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy))
    before = context["kv"].clone()
    for _ in range(2):
        chain_log_prob(policy, context, drawn.chain, spec).log_prob.sum().backward()
    assert torch.equal(context["kv"], before)
    assert torch.equal(pack_cache(cache_from(before)), before)
    policy.zero_grad()


EXPECTED = {
    "train_action_head": {"vla.model.action_out_proj.weight", "vla.model.action_out_proj.bias"},
    "train_time_mlp": {
        f"vla.model.action_time_mlp_{side}.{kind}" for side in ("in", "out") for kind in ("weight", "bias")
    },
}


@pytest.mark.parametrize("flag", list(TrainableGroups.__dataclass_fields__))
def test_each_flag_changes_which_parameters_get_gradients(tiny_policy_dir, flag):
    off = TrainableGroups(*(name == flag for name in TrainableGroups.__dataclass_fields__))
    policy = load(tiny_policy_dir, k=1, groups=off)
    context = policy.encode(policy.preprocess(observe(policy)))
    spec = ChainSpec(1, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy))
    loss = chain_log_prob(policy, context, drawn.chain, spec).log_prob.sum() + policy.value(context).sum()
    loss.backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None}
    group = flag.removeprefix("train_")
    assert policy.parameter_counts()[group] == sum(p.numel() for p in policy.parameters() if p.requires_grad) > 0
    assert touched == {name for name, p in policy.named_parameters() if p.requires_grad}
    if flag in EXPECTED:
        assert touched == EXPECTED[flag]
    elif flag == "train_full_expert":
        assert all(n.startswith(("vla.model.vlm_with_expert.lm_expert.", "vla.model.action_in_proj.")) for n in touched)
    else:
        assert all(n.startswith({"noise_head": "noise_mlp.", "critic": "critic."}[group]) for n in touched)


def test_policy_acts_and_learns_in_eval_mode(policy):
    assert not any(module.training for module in policy.modules())


def test_trainable_weights_are_fp32(policy):
    assert all(p.dtype == torch.float32 for p in policy.policy_parameters() + policy.critic_parameters())


def test_trainable_state_round_trip_is_strict(policy, tiny_policy_dir):
    other = load(tiny_policy_dir)
    with torch.no_grad():
        for p in other.policy_parameters():
            p.add_(0.1)
    other.load_trainable_state(policy.trainable_state())
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), other.state_dict().values(), strict=True)
    )
    broken = policy.trainable_state()
    broken.pop("critic.mlp.0.weight")
    with pytest.raises(ValueError, match=r"critic\.mlp\.0\.weight"):
        other.load_trainable_state(broken)


def test_export_is_a_stock_policy_with_the_full_chunk(policy, context, tmp_path):
    from smolvla_tiny import load_smolvla

    policy.save_pretrained(tmp_path / "export")
    stock, _, _ = load_smolvla(tmp_path / "export")
    assert stock.config.chunk_size == 50 and stock.config.num_steps == 3
    noise = noise_for(policy)
    expected = sample_chain(policy, context, ChainSpec(3), noise, deterministic=True).chain[:, -1, :, :6]
    batch = policy.preprocess(observe(policy))
    assert (stock.predict_action_chunk(batch, noise=noise) - expected).abs().max() < 1e-5


def test_missing_camera_is_named(policy):
    observation = observe(policy)
    del observation["pixels"]["wrist_camera"]
    with pytest.raises(ValueError, match="wrist_camera"):
        policy.preprocess(observation)


def test_too_long_n_action_steps_is_refused(tiny_policy_dir):
    with pytest.raises(ValueError, match="n_action_steps=51"):
        load(tiny_policy_dir, n=51)
