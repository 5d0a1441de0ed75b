"""Noise and seeds of episodes: functions of the seed and the decision alone."""

import numpy as np
import pytest
import torch

from reinflow.env import ChunkVectorEnv, take_rows
from reinflow.flow import ChainSpec
from reinflow.noise import episode_noise
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutSettings, RolloutState, collect_rollout, noise_free_actor
from reinflow.seeds import FIRST_TUNING_SEED, PASS, TrainingSeeds
from tests.fakes import ReachEnv, make_policy

SHAPE = (50, 32)


@pytest.mark.parametrize("num", [1, 7, 64])
def test_a_row_is_the_same_to_the_bit_alone_among_others_and_in_any_order(num):
    seeds = np.random.default_rng(0).permutation(100)[:64].tolist()
    decisions = [seed % 3 for seed in seeds]
    together = episode_noise(seeds, decisions, SHAPE, "x_0")
    parts = [episode_noise(seeds[i : i + num], decisions[i : i + num], SHAPE, "x_0") for i in range(0, 64, num)]
    assert torch.equal(torch.cat(parts), together)
    assert torch.equal(episode_noise(seeds[::-1], decisions[::-1], SHAPE, "x_0"), together.flip(0))


def test_seeds_decisions_and_purposes_share_nothing_and_look_normal():
    draws = [
        episode_noise([seed], [decision], SHAPE, purpose)
        for seed in (0, 1, 7 + PASS, 2**63)
        for decision in (0, 1, 2)
        for purpose in ("x_0", "exploration")
    ]
    numbers = torch.stack(draws).flatten(1)
    correlation = torch.corrcoef(numbers) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / numbers.shape[1] ** 0.5
    assert numbers.mean().abs() < 0.02 and abs(numbers.std() - 1) < 0.02
    assert numbers.unique().numel() > 0.99 * numbers.numel()


def test_recorded_figures():
    """Results name their seeds: the same ones must draw the same noise in every version."""
    drawn = episode_noise([10_000], [1], (3,), "x_0")[0].tolist()
    assert drawn == [-0.9700464606285095, -0.3513997495174408, -0.5827226638793945]


def test_training_seeds_shuffle_the_range_and_never_play_an_episode_twice():
    seeds = TrainingSeeds(3, 100)
    first, second = seeds.of(np.arange(100)), seeds.of(np.arange(100, 200))
    assert sorted(seed % PASS for seed in first) == list(range(100)) and first != sorted(first)
    assert second == [seed + PASS for seed in first]
    others = TrainingSeeds(4, 100).of(np.arange(200))
    assert not set(others) & {*first, *second}  # three seeds of a table are three trainings
    assert max(seed % PASS for seed in TrainingSeeds(9_999).of(np.arange(20_000))) < FIRST_TUNING_SEED
    assert max(TrainingSeeds(9_999).of(np.arange(100_000))) < 2**63


def play(env: ChunkVectorEnv, chunk_steps: int) -> dict[int, tuple]:
    """Every episode that ends, by its seed, with exploration noise."""
    policy, seeds = make_policy(), TrainingSeeds(5)
    with torch.no_grad():
        state = RolloutState.start(policy, env, seeds)
        spec, settings = ChainSpec(2, "action"), RolloutSettings(0.9, "control_step", True)
        _, info, _ = collect_rollout(policy, env, state, chunk_steps, spec, settings, ReturnNormalizer(), seeds)
    return {e.seed: (round(e.return_, 4), e.length, e.success) for e in info.episodes}


def test_any_number_of_environments_plays_the_same_training_episodes():
    episodes = play(ReachEnv(12), 2)
    assert len(episodes) == 12
    assert play(ReachEnv(1), 24) == play(ReachEnv(3), 8) == play(ReachEnv(4), 6) == episodes


def test_a_noise_free_actor_gives_a_row_the_same_actions_among_any_number_of_others():
    """Real products of matrices: alone, or with a few, a row would take another kernel's rounding."""
    policy, rng = make_policy(action_dim=6, chunk=50), np.random.default_rng(0)
    act = noise_free_actor(policy, ChainSpec(2))
    observation, seeds = {"environment_state": rng.normal(size=(64, 7)).astype(np.float32)}, list(range(64))
    together = act(observation, seeds, 1)
    for num in (1, 3, 7):
        parts = [
            act(take_rows(observation, np.arange(i, min(i + num, 64))), seeds[i : i + num], 1)
            for i in range(0, 64, num)
        ]
        assert np.array_equal(np.concatenate(parts), together), num
