"""The design's laws that a machine can check: import directions, names that stay out of reinflow/, and sizes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "lerobot", "transformers", "mujoco", "gymnasium"}
FACES = {"reinflow_smolvla", "pi0_adapter", "so101_gym_env"}
FRONT = {"train_reinflow"}

# Floor by floor, from the ground up: what each may not import, besides everything on the floors above it.
FLOORS: tuple[dict[str, set[str]], ...] = (
    {
        "reinflow": {"lerobot", "transformers", "mujoco", "gymnasium"},
        "so101_mujoco_utils": {"torch", "lerobot", "transformers", "gymnasium"},
    },
    {
        "so101_sim": {"torch", "lerobot", "transformers"},
        "reinflow_vla": {"mujoco", "gymnasium", "so101_mujoco_utils"},
        "reinflow_gym": {"lerobot", "transformers", "so101_mujoco_utils"},
    },
    {
        "reinflow_smolvla": {"mujoco", "so101_sim", "so101_mujoco_utils"},
        "pi0_adapter": {"mujoco", "so101_sim", "so101_mujoco_utils"},
        "so101_gym_env": {"torch", "lerobot", "transformers", "reinflow_vla"},
    },
    {"reinflow_so101": set(), "lerobot_env_so101_reinflow": {"torch", "reinflow", "reinflow_vla"}},
    {"train_reinflow": set()},
)
PLACES = {place: floor for floor, places in enumerate(FLOORS) for place in places}
ALLOWED_OF_REINFLOW = {"so101_sim": {"reinflow", "reinflow.env"}}  # its errors and the environment's contract
TENSORS = {"so101_sim/vector/warp.py": {"torch"}}  # its images stay where torch takes them; imported when it is used


def files_of(place: str) -> list[Path]:
    module = ROOT / f"{place}.py"
    return [module] if module.exists() else sorted((ROOT / place).rglob("*.py"))


SOURCES = [path for place in PLACES for path in files_of(place)]
OTHERS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])


def imports_of(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside functions and for types too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("place", PLACES)
def test_imports_run_downwards(place):
    """No import upwards or across, type-only ones included, so there is no circle of places either."""
    above = {other for other, floor in PLACES.items() if floor >= PLACES[place] and other != place}
    forbidden = FLOORS[PLACES[place]][place] | above
    for path in files_of(place):
        imported = imports_of(path)
        bad = {name for name in imported if name.split(".")[0] in forbidden - TENSORS.get(show(path), set())}
        if place in ALLOWED_OF_REINFLOW:
            bad |= {n for n in imported if n.split(".")[0] == "reinflow"} - ALLOWED_OF_REINFLOW[place]
        assert not bad, f"{show(path)} imports {sorted(bad)}"


def test_no_circle_of_files():
    modules = {show(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in SOURCES}
    graph = {}
    for name, path in modules.items():
        imported = imports_of(path)
        from_package = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        graph[name] = ((imported | from_package) & modules.keys()) - {name}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for below in graph[name]:
                visit(below, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_room_below_names_the_flat_config():
    for path in [path for place in PLACES if place not in FRONT for path in files_of(place)]:
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"TrainingConfig", "PRESETS"}, show(path)


def test_the_memory_planner_stays_behind_its_wall():
    for path in SOURCES:
        if "memory_planner" not in show(path) and path.stem not in FRONT:
            assert not [name for name in imports_of(path) if "memory_planner" in name], show(path)


def test_reinflow_knows_no_robot():
    """Neither this arm nor its task: no block, no joint's or camera's name, no project's word for them."""
    from so101_mujoco_utils import CAMERA_NAMES, JOINT_NAMES

    names = "|".join((*JOINT_NAMES, *CAMERA_NAMES))
    task = re.compile(rf"\b(block|so-?101\w*|{names})\b|clipped_targets|max_height", re.IGNORECASE)
    project = re.compile(r"smolvla|reinflow-[a-z]+|TrainingConfig")  # SmolVLA may be spoken of, not used
    for path in files_of("reinflow"):
        found = {match[0] for words in (task, project) for match in words.finditer(path.read_text())}
        assert not found, f"{show(path)}: {sorted(found)}"


@pytest.mark.parametrize(
    ("package", "without"),
    [
        ("so101_sim", {"torch", "lerobot", "transformers"}),
        ("reinflow", {"mujoco", "lerobot", "transformers", "gymnasium"}),
    ],
)
def test_a_package_loads_without(package, without):
    code = (
        f"import sys, pkgutil, importlib, {package} as p\n"
        "for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'): importlib.import_module(m.name)\n"
        f"bad = {without!r} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_flags_are_checked_before_anything_heavy_is_loaded():
    code = f"import sys, train_reinflow as t; t.parse_args(['--preset', 'tiny']); print({HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=show)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= (600 if path.stem in FRONT else 500)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_the_root_holds_the_five_files():
    assert {path.stem for path in ROOT.glob("*.py")} == FRONT | FACES | {"so101_mujoco_utils"}


def test_print_the_table(capsys):
    """What the architecture is; `pytest tests/test_architecture.py -s` shows it."""
    with capsys.disabled():
        print("\nfloor | place | may not import")
        for floor in reversed(range(len(FLOORS))):
            for place, forbidden in FLOORS[floor].items():
                print(f"{floor} | {place} | {', '.join(sorted(forbidden)) or '-'}, and what is above")
