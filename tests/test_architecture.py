"""The design's laws that a machine can check: import direction and size."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("reinflow/*.py"), *ROOT.glob("benchmarks/*.py")])]
ADAPTERS = sorted(p for glob in ("*smolvla*.py", "reinflow_vla.py", "pi0_*.py") for p in ROOT.glob(glob))
ENTRY_POINTS = {
    "train_reinflow",
    "training_run",
    "training_checks",
    "reinflow_eval",
    "reinflow_doctor",
    "reinflow_memory",
}


def imports_of(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("reinflow/*.py")), ids=lambda p: p.name)
def test_rooms_know_no_robot_and_no_vla(path):
    own = {p.stem for p in ROOT.glob("*.py")}
    assert not imports_of(path) & ({"mujoco", "lerobot", "transformers", "gymnasium"} | own)


@pytest.mark.parametrize("path", sorted(ROOT.glob("so101_*.py")), ids=lambda p: p.name)
def test_environment_knows_no_policy_and_no_trainer(path):
    assert not imports_of(path) & (ENTRY_POINTS | {p.stem for p in ADAPTERS})


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: p.name)
def test_adapters_know_no_trainer(path):
    assert not imports_of(path) & ENTRY_POINTS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, node.name


def test_rooms_import_without_mujoco_and_lerobot():
    code = (
        "import sys, pkgutil, importlib, reinflow\n"
        "for m in pkgutil.iter_modules(reinflow.__path__): importlib.import_module('reinflow.' + m.name)\n"
        "bad = {'mujoco', 'lerobot', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
