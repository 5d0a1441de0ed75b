"""How much of a gradient is signal: against a noise scale that is known, and in a real update."""

from dataclasses import replace

import pytest
import torch

from reinflow.flow import ChainSpec
from reinflow.gradient_noise import GradientMemory, noise_scale
from reinflow.update_log import Probe
from reinflow.whole_rollout import WholeRollout
from tests.reinflow.test_learner import SETTINGS, Loop

DIMENSIONS = 4_000


def signal_of(batch, scale, steps=40, seed=0):
    """Mean signal share of gradients over ``batch`` episodes that have ``scale`` as their noise scale."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.nn.Parameter(torch.zeros(DIMENSIONS))
    memory = GradientMemory(Probe([weights]))
    truth = torch.randn(DIMENSIONS, generator=generator)
    shares = []
    for _ in range(steps):
        noise = torch.randn(DIMENSIONS, generator=generator) * (scale / batch) ** 0.5
        weights.grad = truth + noise
        shares += memory.remember().values()
    assert len(shares) == steps - 1  # the first has nothing to be compared with
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("batch", "scale"), [(200, 50), (200, 200), (20, 400)])
def test_a_known_noise_scale_is_found(batch, scale):
    share = signal_of(batch, scale)
    assert share == pytest.approx(batch / (batch + scale), abs=0.03)
    assert noise_scale(share, batch) == pytest.approx(scale, rel=0.4)


def test_pure_noise_has_no_signal():
    assert abs(signal_of(1, 1e9)) < 0.03


def test_what_has_no_gradient_says_nothing():
    weights = torch.nn.Parameter(torch.zeros(5))
    memory = GradientMemory(Probe([weights]))
    assert memory.remember() == {}
    weights.grad = torch.full((5,), torch.inf)
    assert memory.remember() == {} and memory.weight == 0


def test_gradients_of_other_parts_of_a_policy_are_not_compared():
    """Heads first, then the whole: what learned alone knows nothing of the rest."""
    heads, rest = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    memory = GradientMemory(Probe([heads, rest]))
    heads.grad = torch.ones(5)
    assert memory.remember() == {} and memory.remember() == {"gradients/signal_share": 1.0}
    rest.grad = torch.ones(5)
    assert memory.remember() == {} and memory.remember() == {"gradients/signal_share": 1.0}


def test_memory_survives_a_checkpoint():
    weights = torch.nn.Parameter(torch.zeros(6))
    old, new = GradientMemory(Probe([weights])), GradientMemory(Probe([weights]))
    weights.grad = torch.arange(6.0)
    old.remember()
    new.load_state_dict(old.state_dict())
    assert old.remember() == new.remember() == {"gradients/signal_share": 1.0}


def test_probe_takes_a_bounded_part_of_all_tensors():
    parameters = [torch.nn.Parameter(torch.ones(1_000, 30)), torch.nn.Parameter(torch.zeros(7))]
    probe = Probe(parameters, size=300)
    before = probe.weights()
    assert 300 <= len(before) <= 304 and before.unique().tolist() == [0.0, 1.0]
    parameters[0].grad = torch.ones(1_000, 30)
    with torch.no_grad():
        parameters[0][:500] += 1.0
    assert probe.moved_share(before) == 0.5  # of those with a gradient, which the second tensor has not


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
def test_an_update_tells_how_far_it_went(optimizer):
    """Real rollouts: nothing is scored otherwise than it was acted, all weights move, and the noise is measured."""
    loop = Loop(settings=replace(SETTINGS, policy_optimizer=optimizer, target_kl=0.01))
    rows = [loop.learner.update(loop.rollout()[0]) for _ in range(4)]
    for row in rows:
        assert row["ppo/kl_before_update"] < 1e-8 and row["ppo/decision_kl"] > 1e-4
        assert row["ppo/weights_moved"] > 0.9
    assert "gradients/signal_share" not in rows[0] and all("gradients/signal_share" in row for row in rows[1:])
    found = [row for row in rows[1:] if row["gradients/signal_share"] > 0]
    assert found and all(row["gradients/noise_scale"] > 0 for row in found)


def test_decision_kl_does_not_depend_on_the_reduction():
    """The same weights before and after: sums, groups and the mean give one figure."""
    figures = []
    for reduction in ("chunk", "action", "dim", "mean"):
        loop = Loop(ChainSpec(2, reduction))
        buffer, _ = loop.rollout()
        data = loop.learner._flatten(buffer, WholeRollout.of(buffer, loop.learner._advantages(buffer)))
        with torch.no_grad():
            loop.policy.head.bias += 0.01
        figures.append(loop.learner._decision_kl(data))
    assert figures == pytest.approx([figures[0]] * 4, rel=1e-3) and figures[0] > 1e-3
