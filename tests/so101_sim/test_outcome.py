"""How episodes end: what an arm really did in the simulator, and hand-made states at the edges of the judgement."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from reinflow.env import EpisodeStats
from so101_mujoco_utils import Array, SceneState
from so101_sim.expert import ScriptedExpert
from so101_sim.outcome import LIFT
from so101_sim.tasks.registry import TASKS, task_env, taxonomy_of
from so101_sim.vector.base import SO101VectorEnv
from so101_sim.vector.make import make_vector_env

SEEDS, STEPS, DT = [101, 102, 103, 104], 150, 0.02
CONFIG = task_env("lift", render_images=False)


# --- In the simulator -----------------------------------------------------------------------------------------------


class Player:
    """The expert's joint targets (N, 150, 6) for four blocks, and what becomes of changed ones."""

    def __init__(self, env: SO101VectorEnv) -> None:
        self.env = env
        env.reset(SEEDS)
        self.start = env.scene.layout.scene_state(env.get_state()["rows"])  # type: ignore[attr-defined]
        self.expert = ScriptedExpert(env.scene.model)  # type: ignore[attr-defined]
        self.lift = self.plan()

    def plan(self, shift: tuple[float, float] = (0.0, 0.0)) -> Array:
        start, plans = self.start, []
        for row in range(len(SEEDS)):
            yaw = 2.0 * np.arctan2(start.block_quat[row, 3], start.block_quat[row, 0])
            plans.append(self.expert.plan(start.joint_pos_rad[row], start.block_pos[row] + (*shift, 0.0), yaw))
        return np.stack(plans)

    def play(self, targets_rad: Array, chunk: int = 50) -> list[EpisodeStats]:
        self.env.reset(SEEDS)
        actions = np.rad2deg(targets_rad)
        actions[..., 5] = (actions[..., 5] + 10.0) / 1.1  # the gripper's percentage
        ended = []
        for start in range(0, STEPS, chunk):
            ended += self.env.step_chunk(actions[:, start : start + chunk]).episodes
        return sorted(ended, key=lambda stats: stats.env)


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    with make_vector_env(CONFIG, len(SEEDS), "batched") as env:
        yield Player(env)


def still(player: Player) -> Array:
    return np.repeat(player.start.joint_pos_rad[:, None], STEPS, axis=1)


def jaws(targets: Array, degrees: float, first: int) -> Array:
    changed = targets.copy()
    changed[:, first:, 5] = np.deg2rad(degrees)
    return changed


def held(targets: Array, step: int) -> Array:
    """The arm stays as it is at `step`."""
    changed = targets.copy()
    changed[:, step:] = targets[:, step : step + 1]
    return changed


def turned(targets: Array, degrees: float) -> Array:
    changed = targets.copy()
    changed[..., 0] = np.deg2rad(degrees)
    return changed


def swept(targets: Array) -> Array:
    """Down around the block with open jaws, then aside with it."""
    changed = held(jaws(targets, 50.0, 60), 75)
    changed[:, 75:, 0] += np.deg2rad(30.0) * np.clip(np.arange(STEPS - 75) / 40, 0.0, 1.0)
    return changed


BEHAVIOURS: dict[str, tuple[Callable[[Player], Array], str]] = {
    "the expert": (lambda p: p.lift, "success"),
    "an arm that stays where it is": (still, "never_reached"),
    "a lift of a block that lies 8 cm beside": (lambda p: p.plan((0.08, 0.0)), "never_reached"),
    "a joint against its limit": (lambda p: turned(still(p), 130.0), "joint_limit"),
    "a gripper against its limit": (lambda p: jaws(still(p), -30.0, 0), "never_reached"),
    "jaws that stay open": (lambda p: jaws(p.lift, 50.0, 60), "never_closed"),
    "a lift of a block that lies 4 cm farther": (lambda p: p.plan((0.0, 0.04)), "missed"),
    "open jaws that sweep": (lambda p: swept(p.lift), "pushed_away"),
    "jaws that open before the lift": (lambda p: jaws(p.lift, 50.0, 100), "slipped"),
    "jaws that open during the lift": (lambda p: jaws(p.lift, 50.0, 113), "dropped"),
    "a grasp that waits on the floor": (lambda p: held(p.lift, 98), "timed_out"),
    "a lift that stops half-way": (lambda p: held(p.lift, 110), "timed_out"),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_what_an_arm_did_is_told(player: Player, name: str) -> None:
    make, expected = BEHAVIOURS[name]
    ended = player.play(make(player))
    assert [stats.outcome for stats in ended] == [expected] * len(SEEDS)
    assert [stats.success for stats in ended] == [expected == "success"] * len(SEEDS)


def test_every_outcome_is_shown_here_or_breaks_the_physics() -> None:
    assert {outcome for _, outcome in BEHAVIOURS.values()} | {"unstable"} == set(LIFT.outcomes)
    assert all(taxonomy_of(task_env(name)) is LIFT for name in TASKS)


def test_outcome_and_facts_do_not_depend_on_the_chunks(player: Player) -> None:
    targets = swept(player.lift)
    targets[1:3] = player.lift[1:3]
    whole = player.play(targets)
    for chunk in (2, 7, 150):
        assert player.play(targets, chunk) == whole


def test_facts_of_a_lift(player: Player) -> None:
    start, ended = player.start, player.play(player.lift)
    for row, stats in enumerate(ended):
        facts = stats.facts
        assert facts.keys() == LIFT.facts.keys()
        assert (facts["block_x"], facts["block_y"]) == tuple(start.block_pos[row, :2])
        turn = np.deg2rad(facts["block_yaw"])
        assert np.abs(start.block_quat[row]) == pytest.approx([np.cos(turn / 2), 0, 0, np.abs(np.sin(turn / 2))])
        assert facts["time_to_success"] == pytest.approx(stats.length * DT)
        assert facts["closest"] <= facts["closing_distance"] < 0.0125 and facts["pushed"] < 0.005
    (moved, *_), rough = ended, player.lift.copy()
    rough[:, :, :5] += np.random.default_rng(0).normal(scale=0.02, size=rough[:, :, :5].shape)
    assert player.play(rough)[0].facts["jerk"] > 3 * moved.facts["jerk"]
    assert player.play(still(player))[0].facts["jerk"] < moved.facts["jerk"] / 10


def test_facts_of_a_miss_say_by_how_much(player: Player) -> None:
    for stats in player.play(player.plan((0.0, 0.04))):
        assert stats.facts["closing_distance"] == pytest.approx(0.04, abs=0.006)
        assert "time_to_success" not in stats.facts
    for stats in player.play(player.plan((0.08, 0.0))):
        assert stats.facts["closest"] == pytest.approx(0.08, abs=0.012) and "closing_distance" not in stats.facts
    assert all(stats.facts["pushed"] > 0.025 for stats in player.play(swept(player.lift)))


def test_a_state_of_before_there_were_outcomes_goes_on_without(player: Player) -> None:
    player.env.reset(SEEDS)
    state = player.env.get_state()
    for episode in state["episodes"][:2]:
        del episode["trace"]
    player.env.set_state(state)
    actions = np.zeros((len(SEEDS), STEPS, 6))
    ended = player.env.step_chunk(actions, [episode + 4 for episode in SEEDS]).episodes
    assert [(stats.outcome, bool(stats.facts)) for stats in ended[:2]] == [("", False)] * 2
    assert all(stats.outcome and stats.facts for stats in ended[2:])
    assert all(stats.outcome for stats in player.env.step_chunk(actions).episodes)  # the next ones have all


# --- On paper -------------------------------------------------------------------------------------------------------


class Story:
    """An episode written down by hand, one phase after the other; the block lies at x .1, y .2 m."""

    def __init__(self) -> None:
        self.instants: list[dict[str, Array | float]] = []

    def then(
        self, steps: int, beside: float, jaw_deg: float, both_jaws: bool = False, height: float = 0.0, x: float = 0.1
    ) -> "Story":
        """`steps` with the tool `beside` m from the block, which lies at `x`, `height` m above the floor."""
        block = np.array([x, 0.2, 0.0125 + height])
        force = np.array([2.0, 0.0, 0.0]) if both_jaws else np.zeros(3)
        joints = np.array([0.0, 0.0, 0.0, 0.0, 0.0, np.deg2rad(jaw_deg)])
        instant = {"block_pos": block, "tool_pos": block + np.array([beside, 0.0, 0.0]), "fixed_jaw_force": force}
        self.instants += [instant | {"joint_pos_rad": joints}] * steps
        return self

    def states(self) -> SceneState:
        """(1, n)"""
        columns = {name: np.array([[i[name] for i in self.instants]]) for name in self.instants[0]}
        n = len(self.instants)
        rest = {"block_linvel": np.zeros((1, n, 3)), "joint_vel": np.zeros((1, n, 6))}
        quat = np.broadcast_to([1.0, 0.0, 0.0, 0.0], (1, n, 4))
        return SceneState(**columns, **rest, block_quat=quat, moving_jaw_force=-columns["fixed_jaw_force"])

    def end(self, leaning: int = 0, chunk: int = 10) -> tuple[str, dict[str, float]]:
        """Judged, with an arm joint driven beyond its limit in the first `leaning` steps."""
        states, n = self.states(), len(self.instants)
        trace = np.array([LIFT.begin(rows(states, 0, 0))])
        for first in range(1, n, chunk):
            part = slice(first, min(first + chunk, n))
            used = np.arange(part.start, part.stop)[None]
            before = rows(states, slice(None), first - 1)
            trace = LIFT.follow(trace, before, rows(states, slice(None), part), used, used > 0, used <= leaning)
        return LIFT.judge(trace[0].tolist(), n - 1, success=False, broken=False, control_period_s=DT)


def rows(state: SceneState, row: int | slice, instants: int | slice) -> SceneState:
    return SceneState(**{name: values[row, instants] for name, values in vars(state).items()})


def approach() -> Story:
    """From 8 cm away with shut jaws, opened to 45 degrees, to 1 cm."""
    return Story().then(5, 0.08, 1.0).then(10, 0.08, 45.0).then(10, 0.04, 45.0).then(10, 0.01, 45.0)


def start_under_jaws() -> Story:
    return Story().then(1, 0.01, 1.0).then(5, 0.05, 1.0, height=0.05).then(10, 0.05, 45.0).then(10, 0.01, 45.0)


@pytest.mark.parametrize(
    ("story", "outcome"),
    [
        (Story().then(50, 0.01, 1.0), "never_reached"),  # at the block, but the jaws never opened
        (Story().then(5, 0.08, 1.0).then(50, 0.03, 45.0), "never_reached"),  # beside it by more than its width
        (approach(), "never_closed"),
        (approach().then(10, 0.08, 1.0), "never_closed"),  # they closed elsewhere
        (approach().then(20, 0.01, 7.0), "missed"),
        (approach().then(20, 0.01, 7.0).then(20, 0.3, 7.0, x=0.4), "missed"),  # it was knocked away by closing
        (approach().then(20, 0.02, 45.0, x=0.14).then(20, 0.02, 7.0, x=0.14), "pushed_away"),
        (approach().then(20, 0.01, 45.0, x=0.11).then(20, 0.01, 7.0, x=0.11), "missed"),  # by less than its width
        (approach().then(2, 0.01, 7.0, both_jaws=True).then(20, 0.03, 3.0), "missed"),  # a glance of both jaws
        (approach().then(12, 0.01, 7.0, both_jaws=True).then(20, 0.03, 3.0), "slipped"),
        # Tipped onto an edge it is no higher than a corner of it allows.
        (approach().then(12, 0.01, 7.0, both_jaws=True, height=0.009).then(20, 0.03, 3.0), "slipped"),
        (approach().then(12, 0.01, 7.0, both_jaws=True, height=0.03).then(20, 0.03, 3.0), "dropped"),
        (approach().then(12, 0.01, 7.0, height=0.03).then(20, 0.03, 3.0), "missed"),  # it jumped up beside the jaws
        # A block that starts under the jaws jumps as well.
        (start_under_jaws().then(12, 0.01, 7.0, both_jaws=True).then(20, 0.03, 3.0), "slipped"),
        (approach().then(12, 0.01, 7.0, both_jaws=True), "timed_out"),
        (approach().then(12, 0.01, 7.0, height=0.03), "timed_out"),  # in the air, however
        # A contact that flickers at the end is still a grasp.
        (approach().then(12, 0.01, 7.0, both_jaws=True).then(2, 0.01, 7.0), "timed_out"),
    ],
)
def test_stories(story: Story, outcome: str) -> None:
    for chunk in (1, 10, 1000):
        assert story.end(chunk=chunk)[0] == outcome


def test_a_limit_explains_failures_without_a_grasp_alone() -> None:
    missed, slipped = approach().then(20, 0.01, 7.0), approach().then(12, 0.01, 7.0, both_jaws=True).then(20, 0.03, 3.0)
    half = (len(missed.instants) - 1) // 2
    assert missed.end(leaning=half)[0] == "missed"
    assert missed.end(leaning=half + 1)[0] == "joint_limit"
    assert slipped.end(leaning=len(slipped.instants))[0] == "slipped"


def test_distances_are_those_of_the_story() -> None:
    facts = approach().then(5, 0.02, 45.0, x=0.105).then(5, 0.02, 9.0, x=0.11).then(20, 0.005, 7.0, x=0.3).end()[1]
    assert facts["closest"] == pytest.approx(0.005)
    assert facts["closing_distance"] == pytest.approx(0.02)
    assert facts["pushed"] == pytest.approx(0.01)  # up to the closing, no farther


def test_jerk_is_the_second_difference_of_joint_velocities() -> None:
    velocity = np.random.default_rng(3).normal(size=(40, 6))
    velocity[0] = 0.0  # an episode starts at rest
    states = replace(Story().then(40, 0.1, 1.0).states(), joint_vel=velocity[None])
    trace = np.array([LIFT.begin(rows(states, 0, 0))])
    for part in (slice(1, 3), slice(3, 4), slice(4, 40)):
        used = np.arange(part.start, part.stop)[None]
        before = rows(states, slice(None), part.start - 1)
        trace = LIFT.follow(trace, before, rows(states, slice(None), part), used, used > 0, used < 0)
    at_rest_before = np.concatenate([np.zeros((1, 6)), velocity])
    expected = np.sqrt((np.diff(at_rest_before, n=2, axis=0) ** 2).mean()) / DT**2
    _, facts = LIFT.judge(trace[0].tolist(), 39, success=False, broken=False, control_period_s=DT)
    assert facts["jerk"] == pytest.approx(expected)


def test_steps_after_the_end_count_for_nothing() -> None:
    story = approach().then(12, 0.01, 7.0).then(30, 0.001, 1.0, both_jaws=True, height=0.2)
    states, n = story.states(), len(story.instants)
    used = np.arange(1, n)[None]
    start, after = rows(states, slice(None), 0), rows(states, slice(None), slice(1, n))
    active = used <= n - 31  # the time limit ended it
    trace = LIFT.follow(np.array([LIFT.begin(rows(states, 0, 0))]), start, after, used, active, used < 0)
    outcome, facts = LIFT.judge(trace[0].tolist(), n - 31, success=False, broken=False, control_period_s=DT)
    assert outcome == "missed" and facts["closest"] == pytest.approx(0.01)
