"""Reward terms on hand-made states, and what simple behaviours earn in an episode."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import REWARD_TERMS, RewardConfig, SceneState, compute_reward, is_grasped, is_success
from so101_sim.config import EnvConfig
from so101_sim.expert import PHASE_STEPS, ScriptedExpert

BASE = SceneState(
    tool_pos=np.array([0.0, 0.0, 0.0125]),
    block_pos=np.array([0.3, 0.4, 0.0125]),
    block_quat=np.array([1.0, 0.0, 0.0, 0.0]),
    block_linvel=np.zeros(3),
    fixed_jaw_force=np.zeros(3),
    moving_jaw_force=np.zeros(3),
    joint_pos_rad=np.zeros(6),
    joint_vel=np.zeros(6),
)
ABOVE = replace(BASE, tool_pos=BASE.block_pos + np.array([0.0, 0.05, 0.03]))
TOUCHING = replace(BASE, tool_pos=BASE.block_pos, moving_jaw_force=np.array([0.01, 0.0, 0.0]))
GRASPED = replace(TOUCHING, fixed_jaw_force=np.array([4.0, 0.5, 0.0]), moving_jaw_force=np.array([-4.0, 0.0, 0.3]))
LIFTED = replace(GRASPED, block_pos=np.array([0.3, 0.4, 0.081]), tool_pos=np.array([0.3, 0.4, 0.081]))
SEED, STAGED = RewardConfig(), RewardConfig(mode="staged")


def total(previous: SceneState, state: SceneState, config: RewardConfig) -> float:
    return float(sum(compute_reward(previous, state, config).values()))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (BASE, {"distance": -0.5, "height_alignment": 0.0, "contact": 0.0}),
        (ABOVE, {"distance": -np.hypot(0.05, 0.03), "height_alignment": 0.05, "contact": 0.0}),
        (TOUCHING, {"distance": 0.0, "height_alignment": 0.0, "contact": 0.1}),
        # Level with the block, or 10 cm to the side: not aligned above.
        (
            replace(BASE, tool_pos=BASE.block_pos + np.array([0.05, 0.0, 0.02])),
            {"distance": -np.hypot(0.05, 0.02), "height_alignment": 0.0, "contact": 0.0},
        ),
        (
            replace(BASE, tool_pos=BASE.block_pos + np.array([0.1, 0.0, 0.03])),
            {"distance": -np.hypot(0.1, 0.03), "height_alignment": 0.0, "contact": 0.0},
        ),
    ],
)
def test_seed_formula(state: SceneState, expected: dict[str, float]) -> None:
    terms = compute_reward(BASE, state, SEED)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, abs=1e-12)


def test_grasp_needs_two_opposing_forces() -> None:
    assert not is_grasped(TOUCHING)
    assert is_grasped(GRASPED)
    assert not is_grasped(replace(GRASPED, moving_jaw_force=GRASPED.fixed_jaw_force))
    assert not is_grasped(replace(GRASPED, moving_jaw_force=-0.01 * GRASPED.fixed_jaw_force))


def test_staged_terms_sum_to_differences_whatever_the_path() -> None:
    path = [BASE, ABOVE, TOUCHING, GRASPED, TOUCHING, ABOVE, GRASPED, TOUCHING, BASE]
    there_and_back = sum(total(a, b, STAGED) for a, b in pairwise(path))
    assert there_and_back == pytest.approx(0.0, abs=1e-12)


def test_staged_pays_for_progress_and_not_for_staying() -> None:
    for state in (BASE, ABOVE, TOUCHING, GRASPED):
        assert total(state, state, STAGED) == 0.0
    stages = [BASE, ABOVE, TOUCHING, GRASPED, LIFTED]
    rewards = [total(a, b, STAGED) for a, b in pairwise(stages)]
    assert min(rewards) > 0.0
    lift = compute_reward(GRASPED, LIFTED, STAGED)
    assert lift["lift"] == pytest.approx(STAGED.lift_scale)
    assert lift["success"] == STAGED.success_bonus


def test_success_is_height_above_the_threshold() -> None:
    assert is_success(LIFTED, 0.08)
    assert not is_success(replace(LIFTED, block_pos=np.array([0.0, 0.0, 0.08])), 0.08)
    assert not is_success(BASE, 0.08)


@pytest.mark.parametrize("config", [SEED, STAGED])
def test_terms_are_named_ordered_and_independent_of_batch_shape(config: RewardConfig) -> None:
    rng = np.random.default_rng(0)

    def random_state() -> SceneState:
        shapes = {"block_quat": 4, "joint_pos_rad": 6, "joint_vel": 6}
        return SceneState(**{name: rng.normal(size=(7, 5, shapes.get(name, 3))) for name in vars(BASE)})

    previous, state = random_state(), random_state()
    terms = compute_reward(previous, state, config)
    assert tuple(terms) == REWARD_TERMS[config.mode]
    one = [SceneState(**{name: values[3, 2] for name, values in vars(s).items()}) for s in (previous, state)]
    for name, value in compute_reward(one[0], one[1], config).items():
        assert float(value) == terms[name][3, 2]  # to the last bit: vector forms must agree


# --- What behaviours earn ---


def behaviours(env: SO101PickEnv) -> dict[str, np.ndarray]:
    """Joint targets (150, 6) in radians of the expert, and of what stops half way."""
    state = env.scene.layout.scene_state(env.row)
    yaw = 2.0 * np.arctan2(state.block_quat[3], state.block_quat[0])
    expert = ScriptedExpert(env.model).plan(state.joint_pos_rad, state.block_pos, yaw)
    above, gripped = PHASE_STEPS["approach"][1], PHASE_STEPS["close"][1]
    hover, camp = expert.copy(), expert.copy()
    hover[above:], camp[gripped:] = expert[above], expert[gripped]
    return {"expert": expert, "hover": hover, "camp": camp}


def returns(mode: str, seeds: range) -> dict[str, list[float]]:
    env = SO101PickEnv(EnvConfig(render_images=False, randomize_block=True, reward_mode=mode))
    earned: dict[str, list[float]] = {"expert": [], "hover": [], "camp": []}
    for seed in seeds:
        env.reset(seed=seed)
        for name, targets in behaviours(env).items():
            env.reset(seed=seed)
            _, rewards, terminated, truncated, _ = env.step_chunk(env.scene.frame.from_rad(targets))
            assert (terminated, truncated) == ((True, False) if name == "expert" else (False, True))
            earned[name].append(float(rewards.sum()))
    return earned


def test_staged_expert_beats_hovering_and_camping() -> None:
    earned = returns("staged", range(3))
    assert min(earned["expert"]) > max(earned["camp"]) + STAGED.success_bonus
    assert min(earned["camp"]) > max(earned["hover"])


def test_seed_formula_pays_camping_more_than_a_lift() -> None:
    """A known flaw of the documented formula, kept as documented: gripping the block without lifting it earns more than
    the lift, which ends the episode and with it the contact bonus. Prints the figures (pytest -s)."""
    earned = returns("seed", range(3))
    print({name: round(float(np.mean(values)), 2) for name, values in earned.items()})
    assert np.mean(earned["camp"]) > np.mean(earned["expert"]) > np.mean(earned["hover"])
