"""The denoising chain: one kernel, exact ratios, every reduction and basis."""

import itertools
import math

import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, dct_basis, group_mask, sample_chain, time_grid
from tests.fakes import ACTION_DIM, CHUNK, STATE_DIM, make_policy

REDUCTIONS = ("chunk", "action", "dim", "mean")
SPECS = [
    ChainSpec(k, reduction, basis, 3, last)
    for k, reduction, basis, last in itertools.product((1, 3), REDUCTIONS, ("white", "dct"), (False, True))
]


def sample(policy, spec, batch=16, seed=0, deterministic=False):
    generator = torch.Generator().manual_seed(seed)
    context = {"state": torch.randn(batch, STATE_DIM, generator=generator)}
    noise = torch.randn(batch, CHUNK, ACTION_DIM, generator=generator)
    eps = torch.randn(batch, *spec.noise_shape(CHUNK, ACTION_DIM), generator=generator)
    return context, sample_chain(policy, context, spec, noise, None if deterministic else eps)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scoring_reproduces_sampling(spec):
    policy = make_policy()
    context, drawn = sample(policy, spec)
    score = chain_log_prob(policy, context, drawn.chain, spec)
    assert score.log_prob.shape == drawn.log_prob.shape
    assert (score.log_prob - drawn.log_prob).abs().max() < 1e-4


@pytest.mark.parametrize("spec", SPECS[:8], ids=str)
def test_log_prob_does_not_depend_on_the_batch(spec):
    policy = make_policy()
    context, drawn = sample(policy, spec)
    rows = torch.tensor([7, 2, 11])
    score = chain_log_prob(policy, {"state": context["state"][rows]}, drawn.chain[rows], spec)
    assert (score.log_prob - drawn.log_prob[rows]).abs().max() < 1e-5


@pytest.mark.parametrize("basis", ["white", "dct"])
def test_log_prob_is_the_gaussian_of_the_drawn_noise(basis):
    """Against torch's own Normal, for one step with std known."""
    policy, spec = make_policy(sigma=(0.2, 0.2)), ChainSpec(1, "chunk", basis, CHUNK)
    context, drawn = sample(policy, spec)
    velocity, _ = policy.velocity(context, drawn.chain[:, 0], torch.ones(16))
    mean = drawn.chain[:, 0] - velocity
    # An orthonormal basis of full rank leaves the isotropic density as it is.
    expected = torch.distributions.Normal(mean, 0.2).log_prob(drawn.chain[:, 1]).sum(dim=(1, 2))
    assert torch.allclose(drawn.log_prob[:, 0], expected, atol=1e-4)


def test_mean_reduction_is_the_papers():
    policy = make_policy()
    context, drawn = sample(policy, ChainSpec(2, "chunk"))
    mean = chain_log_prob(policy, context, drawn.chain, ChainSpec(2, "mean")).log_prob
    assert torch.allclose(mean, drawn.log_prob / (3 * CHUNK * ACTION_DIM), atol=1e-6)


def test_deterministic_chain_is_plain_euler():
    policy, spec = make_policy(), ChainSpec(4)
    context, drawn = sample(policy, spec, deterministic=True)
    x_t = drawn.chain[:, 0]
    with torch.no_grad():
        for k in range(4):
            x_t = x_t - policy.velocity(context, x_t, torch.full((16,), 1 - k / 4))[0] / 4
    assert torch.allclose(drawn.chain[:, -1], x_t, atol=1e-6)


def test_dct_noise_stays_in_its_subspace():
    policy, spec = make_policy(), ChainSpec(1, "dim", "dct", 2)
    context, drawn = sample(policy, spec)
    velocity, _ = policy.velocity(context, drawn.chain[:, 0], torch.ones(16))
    noise = (drawn.chain[:, 1] - (drawn.chain[:, 0] - velocity)).detach()
    basis = dct_basis(CHUNK, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
    assert (noise - basis @ (basis.T @ noise)).abs().max() < 1e-6
    assert noise.abs().max() > 0.01


def test_noise_is_not_clamped_and_has_the_bounded_std():
    policy, spec = make_policy(sigma=(0.5, 0.5)), ChainSpec(1)
    context, drawn = sample(policy, spec, batch=4000)
    velocity, _ = policy.velocity(context, drawn.chain[:, 0], torch.ones(4000))
    noise = drawn.chain[:, 1] - drawn.chain[:, 0] + velocity
    assert abs(noise.std().item() - 0.5) < 0.02
    assert noise.abs().max() > 1.5


def test_gradient_reaches_velocity_and_noise_head():
    policy, spec = make_policy(), ChainSpec(2, "action")
    context, drawn = sample(policy, spec)
    chain_log_prob(policy, context, drawn.chain, spec).log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.policy_parameters())
    assert policy.head.weight.grad.abs().max() > 0
    assert policy.noise_mlp.mlp[-1].bias.grad.abs().max() > 0


def test_group_mask_drops_actions_that_were_never_executed():
    active = torch.tensor([[True, True, False, False]])
    assert group_mask(active, 2, ChainSpec(1, "action")).tolist() == [[True, True, False, False]]
    assert group_mask(active, 2, ChainSpec(1, "dim")).tolist() == [[True] * 4 + [False] * 4]
    assert group_mask(active, 2, ChainSpec(1, "chunk")).tolist() == [[True]]
    assert group_mask(active, 2, ChainSpec(1, "dim", "dct", 3)).tolist() == [[True] * 6]


def test_time_grid_runs_from_noise_to_action():
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_entropy_is_the_gaussians():
    policy, spec = make_policy(sigma=(0.3, 0.3)), ChainSpec(2)
    context, drawn = sample(policy, spec)
    entropy = chain_log_prob(policy, context, drawn.chain, spec).entropy
    expected = math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e)
    assert torch.allclose(entropy, torch.full_like(entropy, expected), atol=1e-5)
