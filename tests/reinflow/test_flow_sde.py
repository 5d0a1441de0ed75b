"""Flow-SDE as a choice of the chain's noise: one noisy step, the flow's own marginals, scored by the one kernel."""

import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain, transition
from reinflow.flow_mlp import FlowMLP
from reinflow.noise import episode_choice

LEVEL = 0.5


def gaussian_flow(n=1, executed=1, actions=1, centre=1.0, width=0.3):
    """A policy whose velocity is that of the exact flow from N(0, 1) to N(centre, width^2), whatever it observes."""
    policy = FlowMLP(1, actions, n, hidden_size=4, n_action_steps=executed, sigma_min=LEVEL, sigma_max=LEVEL).eval()

    def velocity(_context, x_t, time):
        t = time[:, None, None]
        variance = t**2 + (1 - t) ** 2 * width**2
        noise = t * (x_t - (1 - t) * centre) / variance  # E[noise | x_t]
        action = centre + (1 - t) * width**2 * (x_t - (1 - t) * centre) / variance
        return noise - action, torch.zeros(len(x_t), x_t.shape[1], 4)

    policy.velocity = velocity
    return policy


def steps_of(rows, number):
    return torch.arange(rows)[:, None] % number


def test_the_noisy_step_keeps_the_marginals_of_the_flow():
    """Many fine steps, all of them noisy: the end is still N(1, .3^2). Without the drift it is far too wide."""
    policy, steps, rows = gaussian_flow(), 200, 4_000
    spec = ChainSpec(steps, chain_noise="flow_sde")
    generator = torch.Generator().manual_seed(0)
    x, plain = torch.randn(rows, 1, 1, generator=generator), None
    plain = x.clone()
    for k in range(steps):
        time = torch.full((rows,), 1 - k / steps)
        eps = torch.randn(rows, 1, 1, generator=generator)
        step = transition(policy, {}, x, time, spec)
        x = step.mean + step.std * eps
        step = transition(policy, {}, plain, time, spec)
        plain = step.euler + step.std * eps
    assert x.mean().item() == pytest.approx(1.0, abs=0.03) and x.std().item() == pytest.approx(0.3, abs=0.03)
    assert plain.std().item() > 0.4


def test_it_is_finite_at_pure_noise():
    for steps in (1, 2, 16):
        step = transition(
            gaussian_flow(), {}, torch.randn(3, 1, 1), torch.ones(3), ChainSpec(steps, chain_noise="flow_sde")
        )
        assert torch.isfinite(step.mean).all()
        assert step.std.flatten().tolist() == pytest.approx([LEVEL] * 3)  # sqrt(dt) a sqrt(1 / dt)


@pytest.mark.parametrize(("basis", "executed"), [("white", 4), ("white", 2), ("dct", 4), ("dct", 2)])
def test_one_step_of_each_row_is_noisy_and_scored(basis, executed):
    torch.manual_seed(0)
    policy = FlowMLP(3, 2, 4, hidden_size=8, n_action_steps=executed, sigma_min=LEVEL, sigma_max=LEVEL).eval()
    spec, rows = ChainSpec(4, "dim", basis, 2, chain_noise="flow_sde"), 8
    context, x_0, noisy = {"state": torch.randn(rows, 3)}, torch.randn(rows, 4, 2), steps_of(rows, 4)
    eps = torch.randn(rows, *spec.noise_shape(executed, 2))
    sample, ode = sample_chain(policy, context, spec, x_0, eps, noisy), sample_chain(policy, context, spec, x_0)
    for row, k in enumerate(noisy[:, 0].tolist()):  # the ODE up to the noisy step, and another way from there on
        torch.testing.assert_close(sample.chain[row, : k + 1], ode.chain[row, : k + 1])
        assert not torch.equal(sample.chain[row, k + 1, :executed], ode.chain[row, k + 1, :executed])
        torch.testing.assert_close(sample.chain[row, k + 1, executed:], ode.chain[row, k + 1, executed:])
    score = chain_log_prob(policy, context, sample.chain, spec, noisy)
    torch.testing.assert_close(score.log_prob, sample.log_prob, atol=1e-4, rtol=0)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(eps[:, 0]).flatten(1)
    std = LEVEL * torch.tensor([1.0, (0.75 / 0.25 / 4) ** 0.5, 0.5, (0.25 / 0.75 / 4) ** 0.5])[noisy]
    torch.testing.assert_close(sample.log_prob, density - std.log(), atol=1e-4, rtol=0)


def test_the_noisy_step_must_be_said():
    spec = ChainSpec(2, chain_noise="flow_sde")
    with pytest.raises(ValueError, match="noisy step"):
        sample_chain(gaussian_flow(), {}, spec, torch.randn(2, 1, 1), torch.randn(2, 1, 1, 1))


def test_which_step_is_noisy_depends_on_the_episode_alone_and_is_even():
    seeds, decisions = list(range(3_000)), [7] * 3_000
    chosen = episode_choice(seeds, decisions, 4, "noisy_step")
    assert torch.equal(chosen[10:20], episode_choice(seeds[10:20], decisions[10:20], 4, "noisy_step"))
    assert torch.bincount(chosen, minlength=4).tolist() == pytest.approx([750] * 4, abs=100)
