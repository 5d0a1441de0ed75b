"""Offline RL's pure functions: values by hand, weights, and that the weights reach what is learned."""

from __future__ import annotations

import math

import pytest
import torch

from reinflow.flow import ChainSpec, sample_chain
from reinflow.flow_losses import sample_shortcut_times
from reinflow.flow_mlp import FlowMLP
from reinflow.offline import (
    DoubleQ,
    Transitions,
    advantage_weights,
    chunk_rewards,
    chunk_targets,
    critic_loss,
    policy_chunk,
    value_figures,
    weighted_consistency_loss,
    weighted_flow_loss,
)


def test_a_chunk_earns_only_what_it_ran_discounted_step_by_step():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    earned = chunk_rewards(rewards, torch.tensor([3.0, 2.0]), gamma=0.5)
    assert earned.tolist() == [1 + 1 + 1, 1 + 1]


def test_the_target_discounts_by_the_executed_steps_and_stops_at_the_end():
    targets = chunk_targets(
        torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([8.0, 8.0, 8.0]), gamma=0.5,
    )  # fmt: skip
    assert targets.tolist() == [2.0, 5.0, 1.0]


def test_weights_are_the_documents_and_say_how_many_decisions_they_are_worth():
    values = torch.tensor([0.0, 0.1, 0.2, 0.7])  # mean .25
    weights, info = advantage_weights(values, beta=10.0, w_max=5.0)
    by_hand = torch.tensor([math.exp(-2.5), math.exp(-1.5), math.exp(-0.5), 5.0])
    torch.testing.assert_close(weights, by_hand / by_hand.mean())
    assert info["weight_clipped"] == 0.25
    assert info["weight_effective_share"] == pytest.approx(float(by_hand.sum() ** 2 / (by_hand**2).sum() / 4))
    same, told = advantage_weights(values, beta=0.0, w_max=5.0)
    assert same.tolist() == [1.0] * 4
    assert told["weight_entropy"] == pytest.approx(1.0) and told["weight_clipped"] == 0.0


def test_huge_values_leave_the_weights_finite():
    weights, info = advantage_weights(torch.tensor([-1e4, 0.0, 1e4]), beta=10.0, w_max=100.0)
    assert weights.tolist() == pytest.approx([0.0, 3 / 101, 300 / 101])
    assert weights.isfinite().all() and math.isfinite(info["weight_entropy"])


def test_no_gradient_goes_through_weights_or_targets():
    values = torch.randn(8, requires_grad=True)
    assert not advantage_weights(values, 1.0, 100.0)[0].requires_grad
    predicted = torch.zeros(2, 8, requires_grad=True)
    critic_loss(predicted, values)[0].backward()
    assert values.grad is None and predicted.grad is not None


def test_the_least_of_two_critics_is_taken_and_they_learn_a_value():
    torch.manual_seed(0)
    critic = DoubleQ(2, 6, hidden_size=16)
    states, chunks = torch.randn(128, 2), torch.randn(128, 3, 2)
    value = chunks[:, 0, 0] + states[:, 1]
    assert torch.equal(critic.least(states, chunks), critic(states, chunks).min(0).values)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-2)
    for _ in range(100):
        loss, _ = critic_loss(critic(states, chunks), value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert value_figures(critic.least(states, chunks).detach(), value)["q_correlation"] > 0.95


def test_the_policys_own_chunk_is_where_its_chain_ends():
    torch.manual_seed(0)
    policy = FlowMLP(5, 2, 6, hidden_size=16, n_action_steps=4)
    context = policy.state_context(torch.randn(3, 5))
    torch.manual_seed(1)
    chunk = policy_chunk(policy, context, 3, rows=3)
    torch.manual_seed(1)
    chain = sample_chain(policy, context, ChainSpec(3), torch.randn(3, 6, 2)).chain
    assert chunk.shape == (3, 4, 2)
    torch.testing.assert_close(chunk, chain[:, -1, :4])


def test_weights_choose_which_of_two_ways_is_learned():
    """Half of the data says +1, half -1: both terms follow the half that has the weight."""
    torch.manual_seed(0)
    actions = torch.cat([torch.ones(64, 2, 1), -torch.ones(64, 2, 1)])
    weights = torch.cat([torch.full((64,), 2.0), torch.zeros(64)])
    for term in ("flow", "consistency"):
        guess = torch.nn.Parameter(torch.zeros(()))

        def velocity(x_t, time, _size=None, guess=guess):
            return (x_t - guess) / time[:, None, None].clamp(min=1e-3)

        optimizer = torch.optim.Adam([guess], 0.05)
        for _ in range(100):
            if term == "flow":
                loss, _ = weighted_flow_loss(velocity, actions, weights)
            else:  # the teacher goes straight to each row's own action
                loss, _ = weighted_consistency_loss(
                    velocity, lambda x, t, _: (x - actions) / t[:, None, None], actions, weights,
                    sample_shortcut_times(len(actions), 4),
                )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert guess.item() == pytest.approx(1.0, abs=0.15), term


def test_figures_of_values_that_do_not_vary():
    figures = value_figures(torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert figures["q_correlation"] == 0.0 and figures["q_bias"] == -0.5 and figures["top_return"] == 3.0


def test_rows_of_transitions():
    tensors = [torch.arange(4.0)[:, None]] * 2 + [torch.arange(4.0)] * 3 + [torch.arange(4.0)[:, None]] * 2
    data = Transitions(*tensors, torch.arange(4.0))
    part = data.rows(torch.tensor([2, 0]))
    assert len(part) == 2 and part.rewards.tolist() == [2.0, 0.0]
