"""What only the SmolVLA adapter does; the contract of all policies is in test_policy_contract.py."""

import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow_vla.base import cache_from, pack_cache
from tests.policies import explore, load, noise_for, observe


@pytest.fixture(scope="module")
def policy(tiny_policy_dir):
    return load("smolvla", tiny_policy_dir)


@pytest.fixture(scope="module")
def context(policy):
    return policy.encode(policy.preprocess(observe(policy)))


def test_executed_tokens_alone_give_the_same_first_actions(policy, context, tiny_policy_dir):
    noise = noise_for(policy)
    full = sample_chain(policy, context, ChainSpec(3), noise).chain
    short = load("smolvla", tiny_policy_dir, n_action_steps=10)
    part = sample_chain(short, context, ChainSpec(3), noise[:, :10]).chain
    assert (full[:, :, :10] - part).abs().max() < 1e-6
    assert short.vla.config.chunk_size == 50  # restored after every pass


def test_padded_dims_matter_and_are_stored(policy, context, monkeypatch):
    """Dims 6..31 get no noise, but the velocity of a trained policy depends on them (a freshly built tiny one reads
    the joints alone): scoring must condition on the stored ones."""
    spec, reads = ChainSpec(2, "action"), policy.vla.model.action_in_proj.weight
    monkeypatch.setattr(reads, "data", reads.data + 0.1 * torch.ones_like(reads))
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    assert drawn.chain.shape == (3, 3, 50, 32)
    forgotten = drawn.chain.clone()
    forgotten[..., 6:] = 0
    score = chain_log_prob(policy, context, forgotten, spec)
    assert (score.log_prob - drawn.log_prob).abs().max() > 1e-2


def test_cache_survives_a_second_backward(policy, context):
    spec = ChainSpec(1, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    before = context["kv"].clone()
    for _ in range(2):
        chain_log_prob(policy, context, drawn.chain, spec).log_prob.sum().backward()
    assert torch.equal(context["kv"], before)
    assert torch.equal(pack_cache(cache_from(before)), before)
    policy.zero_grad()


def test_export_is_a_stock_policy_with_the_full_chunk(policy, context, tmp_path):
    from reinflow_vla.smolvla_directory import load_smolvla

    policy.save_pretrained(tmp_path / "export")
    stock, _, _ = load_smolvla(tmp_path / "export")
    assert stock.config.chunk_size == 50 and stock.config.num_steps == 3
    noise = noise_for(policy)
    expected = sample_chain(policy, context, ChainSpec(3), noise).chain[:, -1, :, :6]
    batch = policy.preprocess(observe(policy))
    assert (stock.predict_action_chunk(batch, noise=noise) - expected).abs().max() < 1e-5


def test_too_long_n_action_steps_is_refused(tiny_policy_dir):
    with pytest.raises(ValueError, match="n_action_steps=51"):
        load("smolvla", tiny_policy_dir, n_action_steps=51)
