"""PPO's pure functions against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinflow import ppo
from tests.fakes import make_policy


def column(*values: float) -> torch.Tensor:
    """One environment's time series, (T, 1), in float64."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def gae_by_hand(**changes):
    """The two-step example, with named inputs replaced."""
    inputs = {
        "rewards": column(1.0, 2.0),
        "values": column(0.5, 1.0),
        "next_values": column(1.0, 3.0),
        "terminated": column(0, 0).bool(),
        "truncated": column(0, 0).bool(),
        "discounts": column(0.9, 0.9),
        "gae_lambda": 0.5,
    }
    inputs.update(changes)
    return ppo.compute_gae(**inputs)


def test_gae_running_episode():
    advantages, returns = gae_by_hand()
    last = 2.0 + 0.9 * 3.0 - 1.0  # 3.7, bootstrapped from the observation after the rollout
    first = (1.0 + 0.9 * 1.0 - 0.5) + 0.9 * 0.5 * last
    torch.testing.assert_close(advantages, column(first, last))
    torch.testing.assert_close(returns, column(first + 0.5, last + 1.0))


def test_gae_terminated_ignores_what_follows_even_nan():
    advantages, _ = gae_by_hand(terminated=column(1, 0).bool(), next_values=column(math.nan, 3.0))
    torch.testing.assert_close(advantages, column(1.0 - 0.5, 3.7))


def test_gae_truncated_bootstraps_from_the_final_observation_and_cuts_the_sum():
    advantages, _ = gae_by_hand(truncated=column(1, 0).bool(), next_values=column(7.0, 3.0))
    torch.testing.assert_close(advantages, column(1.0 + 0.9 * 7.0 - 0.5, 3.7))


def test_time_limit_does_not_see_the_next_episode():
    kwargs = {"truncated": column(1, 0).bool(), "next_values": column(7.0, 3.0)}
    advantages, returns = gae_by_hand(**kwargs)
    # Another next episode: other first value, reward and future. Nothing of it may reach the truncated decision.
    other, other_returns = gae_by_hand(
        truncated=kwargs["truncated"],
        values=column(0.5, -50.0),
        rewards=column(1.0, 99.0),
        next_values=column(7.0, 1e3),
    )
    assert advantages[0] == other[0]
    assert returns[0] == other_returns[0]
    assert advantages[1] != other[1]


def test_gae_chunks_of_different_durations():
    gamma = 0.99
    discounts = column(gamma**50, gamma**20)
    advantages, _ = gae_by_hand(discounts=discounts, gae_lambda=0.95, terminated=column(0, 1).bool())
    last = 2.0 - 1.0
    first = 1.0 + gamma**50 * 1.0 - 0.5 + gamma**50 * 0.95 * last
    torch.testing.assert_close(advantages, column(first, last))


def test_gae_environments_are_independent():
    both = [torch.cat([a, b], dim=1) for a, b in ((column(1, 2), column(5, 6)), (column(0, 1), column(3, 1)))]
    flags = torch.tensor([[False, True], [False, False]])
    none = torch.zeros_like(flags)
    discounts = torch.full((2, 2), 0.9, dtype=torch.float64)
    together, _ = ppo.compute_gae(both[0], both[1], both[1], flags, none, discounts, 0.9)
    for n in range(2):
        columns = [tensor[:, n : n + 1] for tensor in (*both, both[1], flags, none, discounts)]
        alone, _ = ppo.compute_gae(*columns, 0.9)
        torch.testing.assert_close(together[:, n : n + 1], alone)


def test_gae_refuses_flattened_and_contradictory_input():
    flat = torch.zeros(4)
    with pytest.raises(ValueError, match=r"\[T, N\]"):
        ppo.compute_gae(flat, flat, flat, flat, flat, flat, 0.95)
    with pytest.raises(ValueError, match="both terminated and truncated"):
        gae_by_hand(terminated=column(1, 0), truncated=column(1, 0))


finite = st.floats(-10, 10)
endings = st.sampled_from(["runs", "terminated", "truncated"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite, finite, st.integers(1, 50), endings), min_size=1, max_size=8))
def test_lambda_one_is_the_discounted_return_minus_the_value(steps):
    rewards, values, next_values, durations, ends = zip(*steps, strict=True)
    discounts = [0.99**duration for duration in durations]
    terminated = [end == "terminated" for end in ends]
    truncated = [end == "truncated" for end in ends]
    next_values = list(next_values)
    for t in range(len(steps) - 1):  # inside an episode the observation that follows is the next decision's
        if ends[t] == "runs":
            next_values[t] = values[t + 1]
    advantages, returns = ppo.compute_gae(
        column(*rewards), column(*values), column(*next_values), column(*terminated).bool(),
        column(*truncated).bool(), column(*discounts), 1.0,
    )  # fmt: skip
    expected = 0.0
    for t in reversed(range(len(steps))):
        episode_goes_on = ends[t] == "runs" and t < len(steps) - 1
        future = expected if episode_goes_on else next_values[t] * (not terminated[t])
        expected = rewards[t] + discounts[t] * future
        assert float(returns[t]) == pytest.approx(expected, abs=1e-9)
        assert float(advantages[t]) == pytest.approx(expected - values[t], abs=1e-9)


def test_lambda_zero_is_the_td_error():
    advantages, _ = gae_by_hand(gae_lambda=0.0)
    torch.testing.assert_close(advantages, column(1.0 + 0.9 - 0.5, 3.7))


def test_policy_loss_by_hand():
    ratios = torch.tensor([[1.5], [0.5], [1.1], [0.5]], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -2.0, -1.0], dtype=torch.float64)
    loss, info = ppo.policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, 0.2)
    # 1.5 clips at 1.2; .5 with A > 0 keeps its gradient; 1.1 is inside; .5 with A < 0 clips at .8.
    assert float(loss) == pytest.approx(-(1.2 + 0.5 - 2.2 - 0.8) / 4)
    assert float(info["ratio_min"]) == pytest.approx(0.5)
    assert float(info["ratio_max"]) == pytest.approx(1.5)
    assert float(info["ratio_mean"]) == pytest.approx(0.9)
    assert float(info["clip_fraction"]) == pytest.approx(0.75)
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 0.5)]
    assert float(info["approx_kl"]) == pytest.approx(sum(k3) / 4)
    half = torch.tensor([[True], [True], [False], [False]])
    assert float(ppo.approx_kl(ratios.log(), torch.zeros_like(ratios), half)) == pytest.approx(sum(k3[:2]) / 2)


def test_unchanged_policy_has_ratio_one_and_the_policy_gradient():
    log_prob = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    loss, info = ppo.policy_loss(log_prob, log_prob.detach(), advantages, 0.1)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages[:, None].expand(6, 3) / 18)
    assert float(info["approx_kl"]) == 0.0
    assert float(info["clip_fraction"]) == 0.0
    assert all(not value.requires_grad and value.dim() == 0 for value in info.values())


def test_clipped_samples_have_no_gradient():
    log_prob = torch.log(torch.tensor([[1.5], [0.5]])).requires_grad_()
    ppo.policy_loss(log_prob, torch.zeros(2, 1), torch.tensor([1.0, -1.0]), 0.2)[0].backward()
    assert log_prob.grad is not None
    assert not log_prob.grad.any()


def test_masked_groups_count_for_nothing_even_when_nan():
    log_prob = torch.tensor([[0.1, math.nan], [0.2, -0.1]], requires_grad=True)
    old, mask = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    loss, info = ppo.policy_loss(log_prob, old, torch.tensor([1.0, 2.0]), 10.0, mask)
    expected = -(math.exp(0.1) + 2 * math.exp(0.2) + 2 * math.exp(-0.1)) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(info["ratio_max"]) == pytest.approx(math.exp(0.2), rel=1e-6)
    loss.backward()
    assert torch.isfinite(log_prob.grad).all()
    assert log_prob.grad[0, 1] == 0


def test_micro_batches_weighted_by_active_groups_make_the_full_loss():
    torch.manual_seed(0)
    log_prob, old, advantages = torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 5)
    mask = torch.rand(8, 5) > 0.4
    full, _ = ppo.policy_loss(log_prob, old, advantages, 0.2, mask)
    parts = torch.zeros(())
    for rows in (slice(0, 3), slice(3, 8)):
        part, _ = ppo.policy_loss(log_prob[rows], old[rows], advantages[rows], 0.2, mask[rows])
        parts += part * mask[rows].sum() / mask.sum()
    torch.testing.assert_close(full, parts)


@pytest.mark.parametrize(
    ("log_prob", "old", "advantages", "mask", "message"),
    [
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), None, "log-probs"),
        (torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(3), None, "log-probs"),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1), None, "advantages"),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), torch.ones(3), "mask"),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2), "no active"),
    ],
)
def test_policy_loss_refuses_silent_broadcasts(log_prob, old, advantages, mask, message):
    with pytest.raises(ValueError, match=message):
        ppo.policy_loss(log_prob, old, advantages, 0.2, mask)


def test_value_loss_with_and_without_clipping():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    loss, info = ppo.value_loss(values, old, returns, 0.0)
    assert float(loss) == pytest.approx(0.5 * (0.0 + 0.81) / 2)
    assert float(info["value_clip_fraction"]) == 0.0
    loss, info = ppo.value_loss(values, old, returns, 0.2)
    assert float(loss) == pytest.approx(0.5 * (0.64 + 0.81) / 2)  # the jump to 1.0 is scored as .2
    assert float(info["value_clip_fraction"]) == 0.5
    with pytest.raises(ValueError, match="one shape"):
        ppo.value_loss(values[:, None], old, returns, 0.2)


def test_explained_variance():
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert float(ppo.explained_variance(targets, targets)) == 1.0
    assert float(ppo.explained_variance(torch.full((3,), 9.0), targets)) == pytest.approx(0.0)
    assert float(ppo.explained_variance(-targets, targets)) == pytest.approx(-3.0)
    assert math.isnan(ppo.explained_variance(targets, torch.ones(3)))


def test_normalize_advantages():
    advantages = torch.tensor([[1.0, 3.0], [500.0, 2.0]])
    mask = torch.tensor([[True, True], [False, True]])
    normalized = ppo.normalize_advantages(advantages, mask)
    assert normalized[1, 0] == 0
    assert float(normalized.sum()) == pytest.approx(0, abs=1e-6)
    assert float(normalized[mask].std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert not ppo.normalize_advantages(torch.full((4,), 2.5)).any()
    assert not ppo.normalize_advantages(torch.tensor([7.0])).any()
    assert not ppo.normalize_advantages(advantages, torch.zeros_like(mask)).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), min_size=1, max_size=5))
def test_return_normalizer_equals_the_statistics_of_everything(batches):
    normalizer = ppo.ReturnNormalizer()
    for batch in batches:
        normalizer.update(torch.tensor(batch, dtype=torch.float64))
    everything = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    assert normalizer.mean == pytest.approx(float(everything.mean()), abs=1e-6)
    expected = max(float(everything.std(correction=0)), normalizer.MIN_STD)
    assert normalizer.std == pytest.approx(expected, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(everything)), everything)


def test_return_normalizer_state_and_bad_input():
    normalizer, copy = ppo.ReturnNormalizer(), ppo.ReturnNormalizer()
    assert (normalizer.mean, normalizer.std) == (0.0, 1.0)
    normalizer.update(torch.randn(7, 3))
    normalizer.update(torch.zeros(0))
    copy.load_state_dict(normalizer.state_dict())
    assert copy.state_dict() == normalizer.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        normalizer.update(torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="sum_squares"):
        copy.load_state_dict({"mean": 0.0})


class OnAppleGpu(torch.Tensor):
    """A tensor of a device without float64, as MPS is: it must come to the host first."""

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_float64_is_of_the_host_alone():
    returns = torch.tensor([1.0, 2.0, 4.0]).as_subclass(OnAppleGpu)
    with pytest.raises(TypeError, match="float64"):
        returns.detach().double()
    assert float(ppo.explained_variance(returns, returns)) == 1.0
    normalizer = ppo.ReturnNormalizer()
    normalizer.update(returns)
    assert normalizer.count == 3
    policy = make_policy()
    actions = torch.zeros(1, policy.chunk_size, policy.action_dim).as_subclass(OnAppleGpu)
    assert policy.postprocess(actions).dtype == float
