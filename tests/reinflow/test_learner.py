"""Rollout and update together on the fake: targets, guard, KL control, accumulation, and that it learns."""

from dataclasses import replace

import pytest
import torch

from reinflow.flow import ChainSpec
from reinflow.learner import LearnerSettings, PPOLearner, RatioGuardError, _advantage_metrics, full_batches
from reinflow.rollout import RolloutSettings, RolloutState, chunk_return, collect_rollout, encode
from reinflow.seeds import TrainingSeeds
from tests.fakes import ReachEnv, clone_half_the_way, make_policy

SETTINGS = LearnerSettings(
    policy_optimizer="adam", natural_damping=0.1, natural_momentum=0.0,
    policy_lr=3e-3, critic_lr=3e-3, clip_epsilon=0.2, target_kl=0.0, undo_overshoot=False, num_ppo_epochs=4,
    num_critic_epochs=4, minibatch_size=32, gradient_accumulation_steps=2, gamma=0.99, gae_lambda=0.95,
    credit="decision", time_limit_is_terminal=False, value_clip_epsilon=0.2, entropy_coeff=0.0, anchor_coeff=0.0,
    grad_clip_norm=1.0,
)  # fmt: skip


DEFAULT_SPEC = ChainSpec(1, "action")


class Loop:
    """policy, env and learner on the fake."""

    def __init__(self, spec=DEFAULT_SPEC, settings=SETTINGS, num_envs=32, seed=0, terminate_at=None):
        self.policy, self.spec = make_policy(seed), spec
        self.env = ReachEnv(num_envs, terminate_at)
        self.learner = PPOLearner(self.policy, spec, settings, seed)
        self.rollout_settings = RolloutSettings(
            settings.gamma, "control_step", settings.time_limit_is_terminal, settings.credit
        )
        self.seeds = TrainingSeeds(seed)
        self.current = RolloutState.start(self.policy, self.env, self.seeds)

    def rollout(self, steps=4):
        buffer, info, self.current = collect_rollout(
            self.policy, self.env, self.current, steps, self.spec, self.rollout_settings,
            self.learner.normalizer, self.seeds,
        )  # fmt: skip
        return buffer, info

    def learn(self, iterations):
        """From half of the way on; mean return of every iteration, and the metrics of the last."""
        clone_half_the_way(self.policy)
        self.current.context = encode(self.policy, self.env._observe())
        returns = []
        for _ in range(iterations):
            buffer, info = self.rollout()
            metrics = self.learner.update(buffer)
            returns.append(sum(e.return_ for e in info.episodes) / len(info.episodes))
        return returns, metrics


@pytest.mark.parametrize(
    ("spec", "target_kl"),
    [(ChainSpec(1, "chunk"), 0.1), (ChainSpec(2, "action"), 0.03), (ChainSpec(1, "dim", "dct", 2), 0.03)],
    ids=["chunk", "action-K2", "dct"],
)
def test_learns_the_fake_task(spec, target_kl):
    """From half of the way to most of it, KL-controlled; a chunk sum needs, and finds, a smaller step."""
    settings = LearnerSettings(**{
        **SETTINGS.__dict__, "policy_lr": 1e-3, "target_kl": target_kl, "undo_overshoot": True, "minibatch_size": 128
    })  # fmt: skip
    returns, _ = Loop(spec, settings, num_envs=128).learn(25)
    assert sum(returns[-3:]) > 0.88 * sum(returns[:3])


def test_natural_step_spends_its_kl_and_learns():
    """No learning rate to choose: the step is as long as target_kl allows."""
    settings = LearnerSettings(**{
        **SETTINGS.__dict__, "policy_optimizer": "natural", "target_kl": 0.05, "num_ppo_epochs": 1
    })  # fmt: skip
    loop = Loop(ChainSpec(1, "dim", "dct", 2), settings, num_envs=128)
    clone_half_the_way(loop.policy)
    loop.current.context = encode(loop.policy, loop.env._observe())
    returns = []
    for _ in range(25):
        buffer, info = loop.rollout()
        metrics = loop.learner.update(buffer)
        assert 0 < metrics["ppo/approx_kl"] <= 0.06
        returns.append(sum(e.return_ for e in info.episodes) / len(info.episodes))
    assert sum(returns[-3:]) > 0.5 * sum(returns[:3])


def test_natural_step_leaves_a_policy_without_signal_alone():
    settings = LearnerSettings(**{**SETTINGS.__dict__, "policy_optimizer": "natural", "target_kl": 0.02})
    loop = Loop(settings=settings)
    buffer, _ = loop.rollout()
    buffer.reward[:], buffer.value[:], buffer.next_value[:] = 0.0, 0.0, 0.0  # equal advantages: zeros
    before = loop.policy.head.weight.detach().clone()
    loop.learner.update(buffer)
    assert torch.equal(before, loop.policy.head.weight)


def test_a_strong_anchor_holds_the_policy_at_its_start():
    moved = []
    for coeff in (0.0, 1000.0):
        settings = LearnerSettings(**{**SETTINGS.__dict__, "policy_lr": 1e-3, "anchor_coeff": coeff})
        loop = Loop(settings=settings)
        start = loop.policy.head.weight.detach().clone()
        for _ in range(6):
            buffer, _ = loop.rollout()
            loop.learner.update(buffer)
        moved.append((loop.policy.head.weight - start).norm().item())
    assert moved[1] < 0.5 * moved[0]


def test_ratio_guard_stops_on_changed_weights():
    loop = Loop()
    buffer, _ = loop.rollout()
    with torch.no_grad():
        loop.policy.head.bias += 0.01
    with pytest.raises(RatioGuardError, match="weights or noise bounds changed"):
        loop.learner.update(buffer)


def test_ratio_guard_names_changed_noise_bounds_and_nan():
    loop = Loop()
    buffer, _ = loop.rollout()
    loop.policy.set_noise_bounds(0.1, 0.25)
    with pytest.raises(RatioGuardError, match="noise bounds"):
        loop.learner.update(buffer)
    loop.policy.set_noise_bounds(0.1, 0.3)
    buffer.log_prob[0, 0] = float("nan")
    with pytest.raises(RatioGuardError, match="not finite"):
        loop.learner.update(buffer)


def test_rescored_log_probs_are_the_updates_own_and_the_guard_looks_all_over_the_rollout():
    for rescore in (False, True):
        loop = Loop()
        loop.learner.rescore_log_probs = rescore
        buffer, _ = loop.rollout()
        buffer.log_prob[-1, -1] += 0.01  # the last decision, as another batch shape might round it
        if rescore:
            assert loop.learner.update(buffer)["ppo/ratio_error_before_update"] == 0
        else:
            with pytest.raises(RatioGuardError, match="ratio is off 1 by"):
                loop.learner.update(buffer)


def test_accumulation_equals_one_large_batch():
    weights = []
    for minibatch, accumulation in ((64, 1), (8, 8)):
        settings = LearnerSettings(**{
            **SETTINGS.__dict__, "minibatch_size": minibatch, "gradient_accumulation_steps": accumulation,
            "num_ppo_epochs": 1,
        })  # fmt: skip
        loop = Loop(settings=settings)
        buffer, _ = loop.rollout(2)
        assert loop.learner.update(buffer)["ppo/optimizer_steps"] == 1
        weights.append(loop.policy.head.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_every_optimizer_step_sees_a_full_batch():
    batches = list(full_batches(10, 4, 3, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [4] * 7
    counts = torch.bincount(torch.cat(batches), minlength=10)
    assert counts.max() <= 3 and counts.sum() == 28


def test_kl_stop_is_measured_after_a_step_and_undo_takes_it_back():
    for undo in (False, True):
        settings = LearnerSettings(**{
            **SETTINGS.__dict__, "policy_lr": 0.3, "target_kl": 1e-3, "undo_overshoot": undo
        })  # fmt: skip
        loop = Loop(settings=settings)
        buffer, _ = loop.rollout()
        before = loop.policy.head.weight.detach().clone()
        metrics = loop.learner.update(buffer)
        assert metrics["ppo/early_stopped"] == 1 and metrics["ppo/optimizer_steps"] == 1
        assert metrics["ppo/approx_kl"] > 1e-3
        assert torch.equal(loop.policy.head.weight, before) == undo


def test_critic_warmup_leaves_the_policy_alone():
    loop = Loop()
    buffer, _ = loop.rollout()
    before = [p.detach().clone() for p in loop.policy.policy_parameters()]
    critic = [p.detach().clone() for p in loop.policy.critic_parameters()]
    loop.learner.update(buffer, critic_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.policy.policy_parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, loop.policy.critic_parameters(), strict=True))


def test_rollout_discounts_by_executed_steps():
    loop = Loop(terminate_at=3)
    buffer, info = loop.rollout(1)
    assert torch.allclose(buffer.discount, torch.full((1, 32), 0.99**3))
    assert buffer.active.sum(-1).eq(3).all() and buffer.terminated.all() and not buffer.truncated.any()
    assert len(info.episodes) == 32


def test_time_limit_looks_at_the_final_observation():
    """With a critic that returns the first state entry, next_value must be the old episode's, not the next one's."""
    loop = Loop()
    loop.policy.value = lambda context: context["state"][:, 0]
    states = [loop.env.states[:, 0].copy()]
    buffer, _ = loop.rollout(2)
    assert buffer.truncated[1].all() and not buffer.truncated[0].any()
    assert torch.allclose(buffer.next_value[1], torch.as_tensor(states[0], dtype=torch.float32), atol=1e-6)
    assert not torch.allclose(buffer.next_value[1], loop.policy.value(loop.current.context))


def test_metrics_say_what_rewards_explain_and_what_the_critic_adds():
    """With a critic that returns 7 everywhere, also of the final observation."""
    loop = Loop()
    loop.policy.value = lambda context: torch.full((len(context["state"]),), 7.0)
    buffer, _ = loop.rollout(4)
    expected = buffer.reward.clone()
    expected[0::2] += buffer.discount[0::2] * buffer.reward[1::2]  # episodes of two chunks
    advantages = loop.learner._advantages(buffer)
    metrics, normalized = _advantage_metrics(buffer, advantages), loop.learner._normalize(advantages)
    assert metrics["critic/reward_to_go_mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert metrics["critic/bootstrap_mean"] == pytest.approx(7.0)
    assert metrics["critic/return_mean"] > metrics["critic/reward_to_go_mean"] + 5
    shift = (normalized.target - normalized.value).mean().item()  # values as the critic put them out
    assert shift == pytest.approx(-7.0, abs=1e-5)


def test_metrics_show_the_gradient_norm_of_the_first_and_the_last_step():
    loop = Loop()
    metrics = loop.learner.update(loop.rollout()[0])
    first, last, mean = (metrics[f"gradients/policy_norm{end}"] for end in ("_first", "_last", ""))
    assert metrics["ppo/optimizer_steps"] > 1 and first > 0 and last > 0 and first != last
    assert mean * metrics["ppo/optimizer_steps"] > first + last
    assert metrics["logprob/coordinates"] == 2  # one joint pair per control step


def test_chunk_return_by_hand():
    import numpy as np

    rewards, active = np.array([[1.0, 2.0, 4.0]]), np.array([[True, True, False]])
    reward, discount = chunk_return(rewards, active, RolloutSettings(0.5, "control_step", False))
    assert reward == pytest.approx([2.0]) and discount == pytest.approx([0.25])
    reward, discount = chunk_return(rewards, active, RolloutSettings(0.5, "chunk", False))
    assert reward == pytest.approx([3.0]) and discount == pytest.approx([0.5])


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_leaves_no_trace(optimizer):
    settings = replace(SETTINGS, policy_optimizer=optimizer, target_kl=0.03, num_ppo_epochs=1)
    loop = Loop(settings=settings)
    before = {name: tensor.clone() for name, tensor in loop.policy.trainable_state().items()}
    hooks = [
        parameters[0].register_hook(lambda gradient: gradient * torch.nan)
        for parameters in (loop.policy.policy_parameters(), loop.policy.critic_parameters())
    ]
    metrics = loop.learner.update(loop.rollout()[0])
    assert metrics["ppo/steps_refused"] == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in loop.policy.trainable_state().items())
    for hook in hooks:
        hook.remove()
    metrics = loop.learner.update(loop.rollout()[0])
    after = loop.policy.trainable_state()
    assert metrics["ppo/steps_refused"] == 0.0 and metrics["ppo/approx_kl"] > 0.0
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert sum(not torch.equal(before[name], tensor) for name, tensor in after.items()) > 4
