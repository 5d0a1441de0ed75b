"""The wheel, installed elsewhere, finds its scene and its policy; generated notes are up to date."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from reinflow.metrics import metrics_markdown
from so101_sim.episode import EXTRAS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's content, unpacked far from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True)
    (wheel,) = out.glob("*.whl")
    target = out / "site"
    zipfile.ZipFile(wheel).extractall(target)
    return target


SHIPPED = """
import so101_mujoco_utils as u; d = u.model_dir(); print(d)
from reinflow_vla.smolvla_directory import load_smolvla
p, _, _ = load_smolvla(d / 'tiny_smolvla'); print(p.config.chunk_size)
from reinflow.flow_mlp import FlowMLP; FlowMLP.from_pretrained(d / 'flow_mlp')
from train_reinflow import PRESETS
u.load_model(PRESETS['tiny'].env().model_path); print(u.scene_path(PRESETS['tiny'].env().model_path))
"""
COMMANDS = """
from importlib import import_module
for target in {targets!r}:
    module, function = target.split(':')
    getattr(import_module(module), function)
    print('command', target)
"""


@pytest.fixture(scope="module")
def said_there(installed) -> list[str]:
    """Lines of one process that finds the scene, the policies and then every command, with the wheel alone."""
    code = SHIPPED + COMMANDS.format(targets=list(scripts().values()))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def scripts() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_wheel_finds_scene_and_policy(installed, said_there):
    lines = [word for line in said_there if not line.startswith("command ") for word in line.split()]
    assert lines[0] == str(installed / "so101_sim/model") and lines[-2] == "50"
    assert lines[-1].startswith(str(installed))


def test_wheel_holds_the_reports_page(installed):
    page = installed / "reinflow_so101/report"
    assert {"page.html", "page.css", "page.js"} <= {path.name for path in page.iterdir()}


def test_wheel_holds_every_command(said_there):
    found = [line.removeprefix("command ") for line in said_there if line.startswith("command ")]
    assert found == list(scripts().values()) and len(found) > 15


def test_wheel_holds_the_packages_and_the_five_files_and_nothing_else(installed):
    packages = {"reinflow", "so101_sim", "reinflow_vla", "reinflow_gym", "reinflow_so101"}
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == packages | {p.name for p in ROOT.glob("*.py")}
    for package in packages:
        modules = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        assert modules == {p.relative_to(installed) for p in (installed / package).rglob("*.py")}


def test_metrics_page_is_the_table():
    assert metrics_markdown(EXTRAS) in (ROOT / "notes/metrics.md").read_text()


@pytest.mark.slow
def test_a_fresh_environment_trains_and_evaluates_from_another_folder(tmp_path):
    """The wheel with its dependencies and nothing else: minutes, and gigabytes, of installation."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "fresh")
    commands = tmp_path / "fresh/bin"
    run(str(commands / "pip"), "install", "-q", str(wheel))
    small = ["--parallel-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "6", "--episodes", "4"]
    small += ["--gradient-accumulation-steps", "1", "--eval-interval", "1", "--eval-episodes", "2"]
    small += ["--report-episodes", "2", "--num-critic-epochs", "1", "--no-wandb", "--output-dir", "run"]
    assert "after training" in run(str(commands / "reinflow-train"), "--preset", "tiny", *small)
    evaluation = ["--policy-path", "run", "--episodes", "2", "--output-dir", "evaluation"]
    assert "95 % interval" in run(str(commands / "reinflow-eval"), *evaluation)
    assert "run: 2 iterations, healthy" in run(str(commands / "reinflow-doctor"), "run")
