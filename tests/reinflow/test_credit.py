"""Credit by control step: against sums over whole episodes, against credit by decision, and in a training loop."""

from dataclasses import replace

import pytest
import torch

from reinflow.credit import advantages_by_control_step, advantages_by_decision
from reinflow.flow import ChainSpec, group_advantage
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutSettings, RolloutState, collect_rollout
from reinflow.seeds import TrainingSeeds
from tests.fakes import ReachEnv, make_policy
from tests.reinflow.test_learner import SETTINGS, Loop

PER_STEP = replace(SETTINGS, credit="control_step")
WHITE = ChainSpec(1, "action")


def credit_of(buffer, policy, gamma=0.9, gae_lambda=1.0, time_limit_is_terminal=True):
    return advantages_by_control_step(
        buffer, policy, ReturnNormalizer(), gamma=gamma, gae_lambda=gae_lambda,
        time_limit_is_terminal=time_limit_is_terminal,
    )  # fmt: skip


def clock(context):
    """A critic that returns the control steps done in the episode, the fake's last state entry."""
    return context["state"][..., -1]


def clock_loop(terminate_at=None):
    """Episodes of two chunks of four steps, or of ``terminate_at`` steps, in three environments."""
    loop = Loop(WHITE, PER_STEP, num_envs=3)
    loop.env = ReachEnv(3, terminate_at, clock=True)
    loop.current = RolloutState.start(loop.policy, loop.env, loop.seeds)
    loop.policy.value = clock
    return loop


@pytest.mark.parametrize("terminate_at", [None, 3])
def test_targets_are_the_discounted_rewards_to_the_episodes_end(terminate_at):
    """lambda 1 and no bootstrap: whatever the critic says of each step, its target is the sum over what is left."""
    loop = clock_loop(terminate_at)
    buffer, _ = loop.rollout(4)
    credit = credit_of(buffer, loop.policy)
    rows = zip(credit.target.tolist(), credit.value.tolist(), clock(credit.context).tolist(), strict=True)
    steps = [(t, i) for t in range(4) for i in range(4)]
    chunks_per_episode = 2 if terminate_at is None else 1
    for at, (t, i) in enumerate(steps):
        for env in range(3):
            if not buffer.active[t, env, i]:
                assert credit.advantage[t, env, i] == 0.0
                continue
            own = [s for s in steps[at:] if s[0] // chunks_per_episode == t // chunks_per_episode]
            rewards = [buffer.step_reward[u, env, j].item() for u, j in own if buffer.active[u, env, j]]
            expected = sum(0.9**k * r for k, r in enumerate(rewards))
            done = t % chunks_per_episode * 4 + i  # control steps of the episode before this one
            target, value, seen = next(rows)
            assert target == pytest.approx(expected, abs=1e-5) and value == seen == done
            assert credit.advantage[t, env, i].item() == pytest.approx(expected - done, abs=1e-5)
    assert next(rows, None) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_one_step_targets_look_at_the_next_state_and_at_an_episodes_own_last_one(terminal):
    loop = clock_loop()
    buffer, _ = loop.rollout(2)
    credit = credit_of(buffer, loop.policy, gae_lambda=0.0, time_limit_is_terminal=terminal)
    following = torch.arange(1.0, 9.0)  # the last of them stands where the time limit struck
    following[-1] = 0.0 if terminal else 8.0
    rewards = buffer.step_reward.transpose(1, 2).flatten(0, 1)
    assert torch.allclose(credit.target.view(8, 3), rewards + 0.9 * following[:, None], atol=1e-5)


@pytest.mark.parametrize("terminal", [True, False])
def test_chunks_of_one_step_have_the_credit_of_their_decisions(terminal):
    """With n = 1 the two ways are the same formula over the same numbers."""
    policy = make_policy(chunk=1)
    policy.value = clock
    env, settings = ReachEnv(5, clock=True), RolloutSettings(0.9, "control_step", terminal, "control_step")
    seeds = TrainingSeeds(0)
    start = RolloutState.start(policy, env, seeds)
    buffer, _, _ = collect_rollout(policy, env, start, 6, WHITE, settings, ReturnNormalizer(), seeds)
    by_decision = advantages_by_decision(buffer, 0.8)
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
    returns, metrics = Loop(WHITE, settings, num_envs=128).learn(25)
    assert sum(returns[-3:]) > 0.88 * sum(returns[:3])
    assert metrics["ppo/explained_variance"] > 0.1


def test_a_rollout_without_states_is_refused():
    loop = Loop(WHITE, SETTINGS)
    buffer, _ = loop.rollout(2)
    assert buffer.states is None
    with pytest.raises(ValueError, match="holds no control steps"):
        credit_of(buffer, loop.policy)
    loop.current.state = None
    loop.rollout_settings = replace(loop.rollout_settings, credit="control_step")
    with pytest.raises(ValueError, match="environment_state=True"):
        loop.rollout(2)
