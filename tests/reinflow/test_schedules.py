"""Schedules: their values at the corners and the bounds they never leave."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinflow.schedules import NoiseSchedule, in_critic_warmup, linear_decay, noise_bounds, warmup_lr


def test_warmup_is_linear_and_never_zero():
    assert [warmup_lr(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_lr(0, 0) == 1.0


def test_critic_warmup():
    assert [in_critic_warmup(i, 2) for i in range(4)] == [True, True, False, False]
    assert not in_critic_warmup(0, 0)


def sigma_max(progress, schedule="hold_cosine", decay_start=0.35, decay_ratio=0.7):
    return noise_bounds(progress, 0.25, 0.5, schedule, decay_start, decay_ratio)[1]


def test_hold_cosine_ends_at_the_ratio_of_the_hyperparameter_reference():
    assert sigma_max(0.0) == sigma_max(0.35) == 0.5
    assert sigma_max(0.675) == pytest.approx((0.5 + 0.35) / 2)
    assert sigma_max(1.0) == pytest.approx(0.35)
    assert sigma_max(2.0) == sigma_max(1.0)


def test_hold_cosine_of_the_seed_defaults_never_decays():
    assert [sigma_max(p, decay_start=1.0) for p in (0.0, 0.5, 1.0)] == [0.5] * 3


def test_floor_is_sigma_min():
    assert sigma_max(1.0, decay_ratio=0.1) == 0.25


def test_other_schedules():
    assert sigma_max(0.9, "constant") == 0.5
    assert sigma_max(0.5, "linear") == pytest.approx(0.375)
    assert sigma_max(1.0, "linear") == pytest.approx(0.25)
    assert sigma_max(0.5, "exponential") == pytest.approx(0.25 + 0.25 * math.exp(-1.5))


@given(
    st.sampled_from(get_args(NoiseSchedule)), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1.5),
    st.floats(1e-3, 1), st.floats(0, 1),
)  # fmt: skip
def test_bounds_hold_and_noise_never_grows(schedule, first, second, start, ratio, low, width):
    early, late = sorted((first, second))
    bounds = [noise_bounds(p, low, low + width, schedule, start, ratio) for p in (early, late)]
    assert all(minimum == low and low <= maximum <= low + width for minimum, maximum in bounds)
    assert bounds[1][1] <= bounds[0][1] + 1e-12


def test_bad_input():
    with pytest.raises(ValueError, match="hold_cosine, constant"):
        noise_bounds(0.0, 0.1, 0.2, "cosine", 0.0, 0.7)
    with pytest.raises(ValueError, match="sigma_min <= sigma_max"):
        noise_bounds(0.0, 0.3, 0.2, "constant", 0.0, 0.7)


def test_linear_decay_reaches_its_end_and_stays():
    assert linear_decay(0.0, 0.2) == 1.0
    assert linear_decay(0.5, 0.2) == pytest.approx(0.6)
    assert linear_decay(1.0, 0.2) == linear_decay(1.5, 0.2) == pytest.approx(0.2)
    assert linear_decay(0.7, 1.0) == 1.0
