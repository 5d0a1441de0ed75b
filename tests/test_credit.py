"""Credit by control step: against sums over whole episodes, against credit by decision, and in a training loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reinflow.credit import control_step_credit, decision_credit
from reinflow.flow import ChainSpec, group_advantage
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import Cursor, RolloutSettings, collect_rollout
from tests.fakes import ReachEnv, clone_half_the_way, make_policy
from tests.test_learner import SETTINGS, Loop

PER_STEP = replace(SETTINGS, credit="control_step")
WHITE = ChainSpec(1, "action")


def credit_of(buffer, policy, gamma=0.9, gae_lambda=1.0, time_limit_is_terminal=True):
    return control_step_credit(
        buffer, policy, ReturnNormalizer(), gamma=gamma, gae_lambda=gae_lambda,
        time_limit_is_terminal=time_limit_is_terminal,
    )  # fmt: skip


def first_entry(context):
    """A critic that returns the first entry of the state."""
    return context["state"][..., 0]


@pytest.mark.parametrize("terminate_at", [None, 3])
def test_targets_are_the_discounted_rewards_to_the_episodes_end(terminate_at):
    """lambda 1 and no bootstrap: whatever the critic says, a target is the sum over what is left of the episode."""
    loop = Loop(WHITE, PER_STEP, num_envs=3, terminate_at=terminate_at)
    loop.policy.value = first_entry
    buffer, _ = loop.rollout(4)
    credit = credit_of(buffer, loop.policy)
    targets = iter(credit.target.tolist())
    steps = [(t, i) for t in range(4) for i in range(4)]
    chunks_per_episode = 2 if terminate_at is None else 1
    for at, (t, i) in enumerate(steps):
        for env in range(3):
            if not buffer.active[t, env, i]:
                assert credit.advantage[t, env, i] == 0.0
                continue
            own = [s for s in steps[at:] if s[0] // chunks_per_episode == t // chunks_per_episode]
            rewards = [buffer.steps.rewards[u, env, j].item() for u, j in own if buffer.active[u, env, j]]
            expected = sum(0.9**k * r for k, r in enumerate(rewards))
            assert next(targets) == pytest.approx(expected, abs=1e-5)
            value = buffer.steps.states[t, env, i, 0].item()
            assert credit.advantage[t, env, i].item() == pytest.approx(expected - value, abs=1e-5)
    assert next(targets, None) is None


def test_a_time_limit_bootstraps_from_its_own_last_state():
    loop = Loop(WHITE, PER_STEP, num_envs=3)
    loop.policy.value = first_entry
    shown = loop.env.states[:, 0].astype(np.float32).copy()
    buffer, _ = loop.rollout(2)
    credit = credit_of(buffer, loop.policy, gae_lambda=0.0, time_limit_is_terminal=False)
    last = buffer.steps.rewards[1, :, -1] + 0.9 * torch.from_numpy(shown)
    assert torch.allclose(credit.target[-3:], last, atol=1e-5)


@pytest.mark.parametrize("terminal", [True, False])
def test_chunks_of_one_step_have_the_credit_of_their_decisions(terminal):
    """With n = 1 the two ways are the same formula over the same numbers."""
    policy = make_policy(chunk=1)
    policy.value = first_entry
    env, settings = ReachEnv(5), RolloutSettings(0.9, "control_step", terminal, "control_step")
    cursor = Cursor.at(policy, env.reset(range(5)))
    generator = torch.Generator().manual_seed(0)
    buffer, _, _ = collect_rollout(policy, env, cursor, 6, WHITE, settings, ReturnNormalizer(), generator)
    by_decision = decision_credit(buffer, 0.8)
    by_step = credit_of(buffer, policy, gae_lambda=0.8, time_limit_is_terminal=terminal)
    assert torch.allclose(by_step.advantage[..., 0], by_decision.advantage, atol=1e-6)
    assert torch.allclose(by_step.target, by_decision.target, atol=1e-6)
    assert torch.allclose(by_step.context["state"], by_decision.context["state"])


def test_each_group_is_weighted_by_its_own_action():
    advantage = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert torch.equal(group_advantage(advantage, 2, WHITE), advantage)
    by_coordinate = group_advantage(advantage, 2, ChainSpec(1, "dim"))
    assert by_coordinate.tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]
    for spec in (ChainSpec(1, "chunk"), ChainSpec(1, "mean"), ChainSpec(1, "dim", "dct", 2)):
        assert group_advantage(advantage, 2, spec).tolist() == [1.0, 4.0]


def test_learns_the_fake_task_from_advantages_of_single_actions():
    settings = replace(
        PER_STEP, policy_lr=1e-3, target_kl=0.03, undo_overshoot=True, minibatch_size=128, num_critic_epochs=1
    )
    loop = Loop(WHITE, settings, num_envs=128)
    clone_half_the_way(loop.policy)
    loop.cursor = Cursor.at(loop.policy, loop.env._observe())
    returns = []
    for _ in range(25):
        buffer, info = loop.rollout()
        metrics = loop.learner.update(buffer)
        returns.append(sum(e.return_ for e in info.episodes) / len(info.episodes))
    assert sum(returns[-3:]) > 0.88 * sum(returns[:3])
    assert metrics["ppo/explained_variance"] > 0.1


def test_a_rollout_without_states_is_refused():
    loop = Loop(WHITE, SETTINGS)
    buffer, _ = loop.rollout(2)
    assert buffer.steps is None
    with pytest.raises(ValueError, match="holds no control steps"):
        credit_of(buffer, loop.policy)
    loop.cursor.state = None
    loop.rollout_settings = replace(loop.rollout_settings, credit="control_step")
    with pytest.raises(ValueError, match="environment_state=True"):
        loop.rollout(2)
