"""--auto-scale: the debugging notes' figures, what it refuses, and that a resumed run is not scaled twice."""

import dataclasses

import pytest

from reinflow import ConfigError
from reinflow_so101.auto_scale import auto_scale
from train_reinflow import PRESETS, TrainingConfig

PAPER = dataclasses.replace(TrainingConfig(), sigma_min=0.08, sigma_max=0.16, policy_lr=2e-5, target_kl=0.01)


def test_the_seed_system_gets_its_documented_values():
    scaled, report = auto_scale(dataclasses.replace(PAPER, auto_scale=True))
    assert PAPER.chain().noised_dimensions(50, 6) == 300
    assert scaled.sigma_min == pytest.approx(0.26, abs=0.005)
    assert scaled.sigma_max == pytest.approx(0.52, abs=0.005)
    assert scaled.policy_lr == pytest.approx(2e-5 * 28 / 300)
    assert scaled.target_kl == pytest.approx(0.01 * 300 / 28)
    assert "D = 300" in report and "0.08 -> 0.262" in report
    assert not scaled.auto_scale


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_action_steps": 10, "chunks_per_episode": 15}, 60),
        ({"num_denoising_steps": 4}, 1200),
        ({"noise_basis": "dct"}, 30),
        ({"num_denoising_steps": 4, "noise_last_step_only": True}, 300),
    ],
)
def test_dimensions_count_what_is_noised(changes, expected):
    config = dataclasses.replace(PAPER, **changes)
    assert config.chain().noised_dimensions(config.n_action_steps, 6) == expected


def test_a_ratio_per_part_is_refused():
    with pytest.raises(ConfigError, match="log_prob_reduction=dim"):
        auto_scale(dataclasses.replace(PRESETS["tiny"], auto_scale=True))
