"""Losses of flow matching and shortcut models against hand-computed ones."""

import pytest
import torch

from reinflow.flow_losses import action_weight, flow_matching_loss, interpolate, sample_shortcut_times, shortcut_loss


@pytest.fixture
def ends():
    """Actions and noise (6, 4, 3), flow times (6,)."""
    generator = torch.Generator().manual_seed(0)
    action, noise = torch.randn(2, 6, 4, 3, generator=generator)
    return action, noise, torch.linspace(0.25, 1.0, 6)


def test_the_straight_lines_velocity_costs_nothing(ends):
    action, noise, time = ends
    assert flow_matching_loss(lambda *_: noise - action, action, noise, time)[0] == 0
    loss, info = flow_matching_loss(lambda x_t, _: torch.zeros_like(x_t), action, noise, time)
    assert float(loss) == pytest.approx(float(((noise - action) ** 2).mean()))
    assert float(loss) in info.values()
    assert torch.allclose(interpolate(action, noise, torch.ones(6)), noise)
    assert torch.allclose(interpolate(action, noise, torch.zeros(6)), action)


def test_the_action_weight_makes_it_the_error_of_the_predicted_action(ends):
    action, noise, time = ends
    guess = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
    loss, _ = flow_matching_loss(
        lambda x_t, t: (x_t - guess) / t[:, None, None], action, noise, time, action_weight(time)
    )
    assert float(loss) == pytest.approx(float(((guess - action) ** 2).mean()), rel=1e-4)


def test_only_what_counts_has_an_error(ends):
    action, noise, time = ends
    counts = torch.ones(6, 4, 1, dtype=torch.bool)
    counts[0, 2:] = False  # beyond the episode
    wrong = noise - action
    wrong[0, 2:] += 100
    assert flow_matching_loss(lambda *_: wrong, action, noise, time, counts=counts)[0] == 0
    wrong[0, :2] += 1.0
    loss, _ = flow_matching_loss(lambda *_: wrong, action, noise, time, counts=counts)
    assert float(loss) == pytest.approx(1 / 6)  # a row's mean is over what counts of it


def test_a_long_step_does_what_two_halves_do(ends):
    action, noise, _ = ends
    time, step = torch.full((6,), 1.0), torch.full((6,), 0.5)

    def teacher(x, t, d):
        return torch.sin(3 * x) * t[:, None, None] + d[:, None, None] * x

    x_1 = interpolate(action, noise, time)
    middle = x_1 - 0.25 * teacher(x_1, time, step / 2)
    end = middle - 0.25 * teacher(middle, time - 0.25, step / 2)
    seen = []

    def velocity(x, t, d):
        seen.append((x, t, d))
        return (x_1 - end) / 0.5

    assert float(shortcut_loss(velocity, teacher, action, noise, time, step)[0]) < 1e-10
    assert torch.equal(seen[0][0], x_1) and torch.equal(seen[0][2], step)
    away, _ = shortcut_loss(
        lambda *a: velocity(*a) + 1, teacher, action, noise, time, step, weight=torch.tensor([1.0, 0, 0, 0, 0, 0])
    )
    assert float(away) == pytest.approx(1 / 6, rel=1e-4)


def test_no_gradient_goes_through_the_teacher(ends):
    action, noise, _ = ends
    scale = torch.nn.Parameter(torch.tensor(0.5))
    time, step = torch.ones(6), torch.ones(6)
    loss, _ = shortcut_loss(lambda x, t, d: x.detach() * 0.0, lambda x, t, d: scale * x, action, noise, time, step)
    assert not loss.requires_grad
    with pytest.raises(ValueError, match="beyond the action"):
        shortcut_loss(lambda *a: a[0], lambda *a: a[0], action, noise, time / 2, step)


def test_steps_stand_where_a_sampler_stands():
    time, step = sample_shortcut_times(4_000, 8, torch.Generator().manual_seed(0))
    assert set(step.tolist()) == {1.0, 0.5, 0.25}  # halves of the finest are no target: nothing is finer
    places = time / step
    assert torch.equal(places, places.round()) and float(places.min()) == 1 and float(time.max()) == 1.0
    for size in (1.0, 0.5, 0.25):
        assert float((step == size).float().mean()) == pytest.approx(1 / 3, abs=0.05)
        assert set(time[step == size].tolist()) == {size * n for n in range(1, round(1 / size) + 1)}
    for finest in (1, 6):
        with pytest.raises(ValueError, match="power of two"):
            sample_shortcut_times(4, finest)
