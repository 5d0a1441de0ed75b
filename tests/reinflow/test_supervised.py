"""The one supervised loop: what a killed stage goes on from, and the directory it works in."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from reinflow import ConfigError
from reinflow import progress as bars
from reinflow.stage import StageDirectory
from reinflow.supervised import FitError, FitSettings, Progress, fit
from reinflow.training_state import CheckpointError

SETTINGS = FitSettings(steps=12, lr=1e-2, weight_decay=1e-4, warmup_steps=4)


def parts():
    torch.manual_seed(0)
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    return model, average, torch.Generator().manual_seed(1), np.random.default_rng(2)


def descend(directory, stop_after=99):
    """Fit a line by batches of three kinds of random numbers; ``stop_after`` steps the process dies."""
    model, average, ours, numpys = parts()
    progress = Progress(directory, {"model": model, "average": average}, {"ours": ours, "numpys": numpys}, every=5)
    started = progress.done

    def loss():
        x = torch.randn(8, 3, generator=ours) + float(numpys.normal()) + torch.rand(8, 3)
        return ((model(x) - x[:, :2]) ** 2).mean(), {"rows": 8.0}

    rows = []
    for step, info in fit(list(model.parameters()), loss, SETTINGS, progress):
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.1)
        rows.append((step, info["loss"], info["lr"]))
        if step == stop_after:
            break
    return model, average, rows, started


@pytest.mark.parametrize("died", [5, 6, 7, 11])
def test_a_killed_fit_goes_on_as_if_nothing_had_happened(tmp_path, died):
    whole, average, rows, _ = descend(tmp_path / "whole")
    descend(tmp_path / "cut", stop_after=died)
    resumed, resumed_average, rest, started = descend(tmp_path / "cut")
    assert started == (died - 1) // 5 * 5  # the loop's body of step 5 must have come to its end
    assert rest == rows[started:]
    for one, other in ((whole, resumed), (average, resumed_average)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_fit_says_how_far_it_is_from_where_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bars, "LINE_EVERY_S", -1.0)  # every move becomes a line
    descend(tmp_path, stop_after=7)
    capsys.readouterr()
    descend(tmp_path)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("training, steps: 6 of 12, loss ") and last.startswith("training, steps: 11 of 12, loss ")


def test_progress_of_another_model_is_refused(tmp_path):
    descend(tmp_path, stop_after=6)
    with pytest.raises(CheckpointError, match="model"):
        Progress(tmp_path, {"model": nn.Linear(4, 2), "average": nn.Linear(3, 2)})


def test_damaged_progress_is_refused(tmp_path):
    descend(tmp_path, stop_after=6)
    file = next(tmp_path.glob("checkpoints/*/training_state/model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksums"):
        Progress(tmp_path, {"model": nn.Linear(3, 2), "average": nn.Linear(3, 2)})


def test_a_loss_that_is_not_finite_leaves_the_weights():
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(FitError, match="lower lr"):
        list(fit(list(model.parameters()), lambda: (model(torch.ones(1, 1)).sum() * torch.inf, {}), SETTINGS))
    assert torch.equal(model.weight, before)


def opened(directory, resume=False, **settings):
    return StageDirectory.open(directory, {"lr": 0.1} | settings, resume, "stage")


def test_a_stage_is_finished_or_goes_on(tmp_path):
    folder = tmp_path / "out"
    with opened(folder) as stage:  # the process is killed at its end
        for step in (1, 2, 3):
            stage.log(step, {"loss": 1.0 / step})
        Progress(stage.progress_dir, {}, every=2).save(2, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(ConfigError, match="exists"):
        opened(folder)
    with pytest.raises(ConfigError, match=r"lr \(0.1 -> 0.2\)"):
        opened(folder, resume=True, lr=0.2)
    with opened(folder, resume=True) as stage:
        progress = Progress(stage.progress_dir, {})
        stage.resumed_at(progress.done)
        assert progress.done == 2 and [row["step"] for row in stage.metrics] == [1, 2]
        with pytest.raises(ConfigError, match="in use"):
            opened(folder, resume=True)
        stage.finish({"success": 0.5})
    assert not stage.progress_dir.exists()
    assert json.loads((folder / "stage.json").read_text())["record"] == {"success": 0.5}
    with pytest.raises(ConfigError, match="finished"):
        opened(folder, resume=True)


def test_a_stage_that_did_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), opened(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no stage to resume"):
        opened(tmp_path / "out", resume=True)


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    with opened(tmp_path / "out") as stage:
        stage.log(1, {"loss": 1.0})
        with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        stage.resumed_at(5)
        assert stage.metrics == [{"step": 1, "loss": 1.0}]
        stage.finish({})
