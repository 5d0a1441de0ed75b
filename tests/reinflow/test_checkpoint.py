# ruff: noqa: NPY002 (numpy's global generator is among the things restored)
"""Checkpoints: exact round trips, crashes that lose nothing, and errors that name what is wrong."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reinflow import checkpoint as ck
from reinflow import training_state as ts


def write_policy(directory):
    (directory / "config.json").write_text("{}")


def save(run_dir, step, state=None, tensors=None, policy=write_policy):
    return ck.save_checkpoint(run_dir, step, policy, tensors or {}, state or {"iteration": step})


def assert_same(left, right):
    """Equal trees: types, dtypes, bits."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)
    else:
        assert left == right


def test_any_tree_comes_back_exactly(tmp_path):
    generator = np.random.default_rng(3)
    generator.normal(size=5)
    state = {
        "counters": {"episodes": 12, "best": float("-inf"), "ids": None, "flag": True},
        "env": [{"qpos": np.linspace(0, 1, 7), "rng": generator.bit_generator.state}, {"empty": {}}],
        "scalars": (np.float32(0.1), np.int64(2**60), np.bool_(True)),
        "zero_dim": np.array(1.5),
        "int keys": {0: torch.arange(3), 1: "x"},
        "dtypes": [torch.ones(2, dtype=torch.bfloat16), np.arange(4, dtype=np.uint32), torch.tensor(3)],
    }
    save(tmp_path, 1, state)
    assert_same(ck.load_training_state(tmp_path)[1], state)
    restored = np.random.default_rng()
    restored.bit_generator.state = ck.load_training_state(tmp_path)[1]["env"][0]["rng"]
    assert restored.normal() == generator.normal()


@pytest.mark.parametrize(
    ("state", "path"),
    [({"a": [1, object()]}, r"state\.a\.1"), ({"s": np.array(["x"])}, r"state\.s"), ({"k": {1.5: 0}}, r"state\.k")],
)
def test_what_cannot_be_stored_is_named(tmp_path, state, path):
    with pytest.raises(ck.CheckpointError, match=path):
        save(tmp_path, 1, state)
    assert not ck.list_checkpoints(tmp_path)


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = model(torch.randn(4, 3)).square().mean() + np.random.rand() + random.random()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_training_goes_on_bitwise(tmp_path, kind):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = kind(model.named_parameters(), lr=1e-2, betas=(0.8, 0.99))
    train(model, optimizer, 3)
    save(tmp_path, 3, {"optimizer": optimizer.state_dict(), "rng": ts.rng_state()}, {"model": model.state_dict()})
    train(model, optimizer, 3)
    expected = [p.clone() for p in model.parameters()], torch.randn(2), np.random.rand(), random.random()

    other = nn.Linear(3, 2)
    other_optimizer = kind(other.named_parameters(), lr=1.0)
    tensors, state = ck.load_training_state(tmp_path)
    ts.strict_load(other.state_dict(), tensors["model"], "model")
    ts.load_optimizer(other_optimizer, state["optimizer"], "optimizer")
    ts.set_rng_state(state["rng"])
    train(other, other_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], other.parameters(), strict=True))
    assert torch.equal(expected[1], torch.randn(2))
    assert expected[2:] == (np.random.rand(), random.random())
    assert other_optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_only_safetensors_and_json_are_written(tmp_path):
    model = nn.Linear(2, 2)
    checkpoint = save(tmp_path, 1, {"rng": ts.rng_state()}, {"model": model.state_dict()})
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_tensors_that_share_memory_are_stored(tmp_path):
    base = torch.arange(6.0)
    save(tmp_path, 1, tensors={"g": {"base": base, "view": base[2:4], "tied": base}})
    loaded = ck.load_training_state(tmp_path)[0]["g"]
    assert torch.equal(loaded["view"], base[2:4])
    assert torch.equal(loaded["tied"], base)


def test_a_crash_while_writing_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)

    def crash(directory):
        (directory / "half.bin").write_text("half")
        raise KeyboardInterrupt

    for step in (2, 1):  # a new step, and the replacement of an existing one
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, step, {"iteration": 99}, policy=crash)
        assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["000001"]
        assert ck.load_training_state(tmp_path)[1] == {"iteration": 1}
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000001", "last"]


class DyingFileSystem:
    """Lets ``budget`` changes pass and dies at each later one: a killed process cleans nothing up."""

    def __init__(self, patch, budget):
        self.budget = budget
        for module, name in ((os, "replace"), (os, "link"), (os, "symlink"), (ck.shutil, "rmtree")):
            patch.setattr(module, name, self.dying(getattr(module, name)))

    def dying(self, function):
        def wrapper(*args, **kwargs):
            self.budget -= 1
            if self.budget < 0:
                raise SystemExit
            return function(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("next_step", [1, 2])
def test_a_crash_anywhere_in_a_replacement_leaves_valid_links(tmp_path, monkeypatch, next_step):
    def versions(run_dir):
        return {ck.load_training_state(ck.resolve_checkpoint(run_dir, link))[1]["version"] for link in ("last", "best")}

    completed = 0
    for budget in range(25):
        run_dir = tmp_path / str(budget)
        save(run_dir, 1, {"version": "old"})
        ck.mark_best(run_dir, 1)
        with monkeypatch.context() as patch:
            DyingFileSystem(patch, budget)
            try:
                save(run_dir, 1, {"version": "new"})
                completed += 1
            except SystemExit:
                pass
        assert versions(run_dir) <= {"old", "new"}
        save(run_dir, next_step, {"version": "next"})  # the next process goes on whatever was left behind
        assert ck.load_training_state(run_dir)[1] == {"version": "next"}
        assert versions(run_dir) <= {"old", "new", "next"}
    assert 5 < completed < 20


def test_links_are_relative_and_survive_moving_the_run(tmp_path):
    run_dir = tmp_path / "run"
    save(run_dir, 1)
    save(run_dir, 2)
    ck.mark_best(run_dir, 1)
    assert os.readlink(run_dir / "checkpoints/last") == "000002"
    run_dir.rename(tmp_path / "moved")
    assert ck.checkpoint_step(ck.resolve_checkpoint(tmp_path / "moved")) == 2
    assert ck.checkpoint_step(ck.resolve_checkpoint(tmp_path / "moved", "best")) == 1
    with pytest.raises(ck.CheckpointError, match="step 7"):
        ck.mark_best(tmp_path / "moved", 7)


def test_resolve_accepts_run_checkpoint_and_policy_directory(tmp_path):
    checkpoint = save(tmp_path, 4)
    for path in (tmp_path, checkpoint, checkpoint / "pretrained_model", tmp_path / "checkpoints/last"):
        assert ck.resolve_checkpoint(path) == checkpoint.resolve()
    with pytest.raises(ck.CheckpointError, match=r"checkpoints/best.*000004"):
        ck.resolve_checkpoint(tmp_path, "best")
    with pytest.raises(ck.CheckpointError, match="does not exist"):
        ck.resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ck.CheckpointError, match="none"):
        ck.resolve_checkpoint(tmp_path / "empty")


def test_prune_keeps_the_newest_and_the_linked(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    ck.mark_best(tmp_path, 2)
    removed = ck.prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in removed] == ["000001", "000003", "000004"]
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["000002", "000005", "000006"]
    with pytest.raises(ValueError, match="at least 1"):
        ck.prune_checkpoints(tmp_path, keep=0)


def test_module_loading_is_strict(tmp_path):
    model = nn.Linear(3, 2)
    good = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for bad, message in (
        ({"weight": good["weight"]}, r"critic does not fit.*missing \['bias'\]"),
        ({**good, "extra": torch.zeros(1)}, r"unexpected \['extra'\]"),
        ({**good, "bias": torch.zeros(3)}, r"other shape \['bias'\]"),
        ({**good, "bias": good["bias"].double()}, r"other dtype \['bias'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ts.strict_load(model.state_dict(), bad, "critic")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_optimizer_of_other_parameters_is_refused():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.named_parameters())
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    with pytest.raises(ck.CheckpointError, match=r"\[2\].*\[1\].*train_"):
        ts.load_optimizer(torch.optim.Adam([model.weight]), state, "policy optimizer")
    renamed = [("other", model.weight), ("bias", model.bias)]
    with pytest.raises(ck.CheckpointError, match="missing other"):
        ts.load_optimizer(torch.optim.Adam(renamed), state, "policy optimizer")
    with pytest.raises(ck.CheckpointError, match="exp_avg of parameter 0"):
        ts.load_optimizer(torch.optim.Adam(nn.Linear(4, 2).named_parameters()), state, "policy optimizer")


def test_damaged_files_are_named(tmp_path):
    directory = save(tmp_path, 1, tensors={"critic": {"a": torch.ones(2), "b": torch.ones(1)}}) / "training_state"
    critic = directory / "critic.safetensors"
    content, text = load_file(critic), (directory / "state.json").read_text()
    save_file({"a": content["a"]}, critic)
    with pytest.raises(ck.CheckpointError, match=r"critic.safetensors: missing b"):
        ck.load_training_state(tmp_path)
    critic.write_bytes(b"rubbish")
    with pytest.raises(ck.CheckpointError, match=r"critic.safetensors cannot be read"):
        ck.load_training_state(tmp_path)
    critic.unlink()
    with pytest.raises(ck.CheckpointError, match="missing critic"):
        ck.load_training_state(tmp_path)
    save_file(content, critic)
    save_file(content, directory / "stray.safetensors")
    with pytest.raises(ck.CheckpointError, match="unexpected stray"):
        ck.load_training_state(tmp_path)
    (directory / "state.json").write_text(text[:40])
    with pytest.raises(ck.CheckpointError, match=r"state.json cannot be read"):
        ck.load_training_state(tmp_path)
    (directory / "state.json").write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(ck.CheckpointError, match="format 99"):
        ck.load_training_state(tmp_path)


def test_cuda_state_without_cuda_is_a_warning(monkeypatch):
    state = ts.rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="not be bitwise"):
        ts.set_rng_state(state)
    with pytest.raises(ck.CheckpointError, match="numpy"):
        ts.set_rng_state({"torch": state["torch"], "cuda": [], "python": state["python"]})
