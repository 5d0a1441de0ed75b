"""The documents say what is so: every command is read by its own parser and run, every link and file is there.

By default all commands are parsed and a share of them is run, each in small, on directories that the others made; the
rest runs with ``-m slow``. What cannot run here is listed with its reason, and the list is held to the reason.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from so101_mujoco_utils import FRAMES, JOINT_NAMES, m100_frame
from tests.documented_commands import (
    SCRIPTS,
    Workspace,
    filled,
    flags_of,
    module_file,
    one_that_starts,
    read_flags,
    run,
    shape,
)
from tests.documents import HISTORY, ROOT, Command, documented, tracked

COMMANDS = documented()
PAGES = sorted({command.where.split(":")[0] for command in COMMANDS})
OTHERS = {"pip", "venv", "cat", "wandb", "pytest", "benchmarks/gpu.sh"}  # have no flags of ours

# Run by default: a command of each program that takes seconds, as a document writes it.
RUN_HERE = (
    "python train_reinflow.py --preset flow_mlp --no-wandb --report-episodes 0",
    "train_reinflow.py --resume --output-dir",
    "python train_reinflow.py --preset tiny --smoke",
    "python train_reinflow.py --preset finetune --pretrained-path runs/my_lift",
    "reinflow-eval --policy-path runs/mine-0",
    "reinflow-doctor RUN_DIR",
    "reinflow-export RUN",
    "reinflow-monitor runs --once",
    "reinflow-sweep --output-dir sweep --workers",
    "reinflow-demos --output-dir half",
    "reinflow-sft-mlp --dataset-root half",
    "reinflow-offline-rl --policy-dir bc",
    "reinflow-reflow --policy-dir P",
    "reinflow-materialize --policy-dir tiny ",
    "reinflow-check-arm my_policy",
    "reinflow-pretrain --policy-dir",
    "reinflow-build-tiny --output-dir",
    "reinflow-build-tiny-pi0 --output-dir",
)

# What cannot run in a test, by a property that the command must have.
CANNOT: dict[str, Callable[[Command], bool]] = {
    "is a test itself": lambda c: c.program == "pytest",
    "is several processes, as in tests/reinflow_so101/test_distributed_run.py": lambda c: c.launched > 0,
    "installs packages": lambda c: c.program in ("pip", "venv"),
    "needs an account": lambda c: c.program == "wandb",
    "needs CUDA": lambda c: "cuda" in c.words or "--gpus" in c.words or c.program == "benchmarks/gpu.sh",
    "needs an arm": lambda c: (
        "so101_follower" in c.text or c.program in ("lerobot-calibrate", "lerobot-record", "lerobot-teleoperate")
    ),
    "downloads from the hub, or has what was trained from that": lambda c: any(
        piece in c.text
        for piece in ("lerobot/smolvla_base", "lerobot/pi0", "images.camera1", "--policy.path=runs/base")
    ),
    "a model of the published size": lambda c: (
        "--size real" in c.text or "--policy smolvla" in c.text or c.program == "benchmarks/memory_plan.py"
    ),
    "goes on with a stage that was cut off": lambda c: c.program == "reinflow-collect" and "--resume" in c.words,
    "leaves out the policy of its environment, which another line names": lambda c: (
        "--preset paper-" in c.text and "--flow-mlp-pretrained-path" not in c.words
    ),
    "compiles for minutes": lambda c: "--compile" in c.words,
    "asks every few seconds without end": lambda c: c.program == "reinflow-monitor" and "--once" not in c.words,
}


def reason_not_to_run(command: Command) -> str:
    """Why the command is not run; "" where it is."""
    return next((reason for reason, holds in CANNOT.items() if holds(command)), "")


def is_bare(command: Command) -> bool:
    """A program that a sentence only names."""
    return not command.whole and not command.flags


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("documents"), COMMANDS)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a command writes where it stands does not land in the checkout."""
    monkeypatch.chdir(tmp_path)


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_read_by_its_own_parser(page: str, place: Workspace) -> None:
    wrong = []
    for command in COMMANDS:
        if command.where.split(":")[0] != page or command.program in OTHERS or is_bare(command):
            continue
        flags = filled(command, place, building=False)
        try:
            read_flags(command.program, flags)
        except SystemExit as end:
            if end.code not in (0, None):
                wrong.append(f"{command}\n    {' '.join(flags)}\n    {end.code}")
        except Exception as error:
            wrong.append(f"{command}\n    {' '.join(flags)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_parsers_refuse_what_does_not_exist(place: Workspace) -> None:
    for text in ("reinflow-eval --policy-path tiny --output-dir D --episode-count 3", "reinflow-evaluate D --x"):
        command = Command("here:1", text, tuple(text.split()), True)
        with pytest.raises((SystemExit, AssertionError)):
            read_flags(command.program, filled(command, place, building=False))


def test_every_program_is_there() -> None:
    lerobots = {f"lerobot-{p.stem.removeprefix('lerobot_').replace('_', '-')}" for p in lerobot_scripts()}
    for command in COMMANDS:
        program = command.program
        there = program in SCRIPTS or program in OTHERS or program in lerobots or (ROOT / program).is_file()
        there = there or module_file(program).is_file()
        assert there, command
    named = {command.program for command in COMMANDS}
    assert set(SCRIPTS) - named == {"reinflow-train"}  # train_reinflow.py by another name


def lerobot_scripts() -> Iterator[Path]:
    import lerobot.scripts

    return Path(lerobot.scripts.__path__[0]).glob("lerobot_*.py")


def test_commands_of_others_name_what_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in COMMANDS:
        words = command.flags
        if command.program == "pytest":
            assert all((ROOT / w).exists() for w in words if w.startswith("tests")), command
        if command.program == "pip":
            extras = [e for word in words for e in re.findall(r"\[(\w+)\]", word)]
            assert set(extras) <= set(project["optional-dependencies"]), command
            folders = [b for a, b in pairwise(words) if a == "-e"]
            assert all((ROOT / f.split("[")[0] / "pyproject.toml").is_file() for f in folders), command
        if command.launched:
            read_launcher(command.words[: command.launched + 1])
        if command.program == "wandb":
            source = Path(find_spec("wandb").submodule_search_locations[0], "cli/cli.py").read_text()
            assert not words or f"\ndef {words[0]}(" in source, command


def read_launcher(words: Sequence[str]) -> None:
    """By its own parser, which ends the program where it does not know a word."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if words[0].endswith("torchrun"):
        get_args_parser().parse_args(words[1:])
    else:
        launch_command_parser().parse_args(words[2:])


def test_flags_that_sentences_name_exist() -> None:
    """`--flag` alone in a sentence is a flag of some command of ours."""
    known = set().union(*(flags_of(p) for p in [*SCRIPTS, "train_reinflow.py", "examples/reacher.py", *benchmarks()]))
    known |= {"--version", "--preset"}
    unknown = [
        f"{page.relative_to(ROOT)}: {span}"
        for page in pages()
        for span in re.findall(r"(?<!`)`(--[a-z][^`]*)`(?!`)", page.read_text())
        if "." not in (flag := re.split(r"[ =,/]", span)[0]) and "_" not in flag and flag not in known
    ]
    assert not unknown, "\n".join(unknown)


def benchmarks() -> list[str]:
    return [f"benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("[!_]*.py")]


@pytest.mark.parametrize("start", RUN_HERE)
def test_documented_commands_run(start: str, place: Workspace) -> None:
    command = one_that_starts(COMMANDS, start)
    assert not reason_not_to_run(command)
    run(command, place)


def the_rest() -> list[Command]:
    """One of every shape of a documented command that is not run by default and can run."""
    done = {shape(one_that_starts(COMMANDS, start)) for start in RUN_HERE}
    rest = {shape(c): c for c in COMMANDS if not is_bare(c) and c.program != "cat" and not reason_not_to_run(c)}
    return [command for kind, command in rest.items() if kind not in done]


@pytest.mark.slow
@pytest.mark.parametrize("command", the_rest(), ids=str)
def test_all_other_documented_commands_run(command: Command, place: Workspace) -> None:
    gymnasiums = command.program == "reinflow-collect" or "hopper" in command.text.lower() or "paper-" in command.text
    if (gymnasiums or "--env-id" in command.words) and find_spec("stable_baselines3") is None:
        pytest.skip('its policies are trained by stable-baselines3: pip install "reinflow-so101[gym]"')
    run(command, place)


def test_what_is_not_run_is_little_and_real() -> None:
    """Every reason has a command, and most commands have none."""
    left_out = {c.words: reason_not_to_run(c) for c in COMMANDS if not is_bare(c) and reason_not_to_run(c)}
    assert set(left_out.values()) == set(CANNOT)
    assert len(left_out) < len(RUN_HERE) + len(the_rest())
    ours = {c.program for c in COMMANDS if c.words in left_out} & set(SCRIPTS)
    run_too = {c.program for c in the_rest()} | {one_that_starts(COMMANDS, s).program for s in RUN_HERE}
    assert ours <= run_too  # another form of each of our commands is run


# --- Links and files --------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    return [p for p in tracked(".md") if p.relative_to(ROOT).as_posix() not in HISTORY]


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings, and those that it gives itself."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [
        re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    ]
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_links_and_anchors_lead_somewhere() -> None:
    broken = []
    for page in tracked(".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if re.match(r"https?://|mailto:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (page.parent / name).resolve() if name else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_files_that_sentences_name_are_there() -> None:
    """`folder/file.ext` in code quotes names a file of the project, from its root or beside the page."""
    suffixes = [p.relative_to(ROOT).as_posix() for end in (".py", ".md", ".sh", ".csv", ".xml") for p in tracked(end)]
    elsewhere = {"lerobot/policies/__init__.py", "results.csv", "episodes.csv"}  # LeRobot's; written
    missing = []
    for page in pages():
        for span in re.findall(r"(?<!`)`([\w./-]+\.(?:py|md|sh|csv|xml))`(?!`)", page.read_text()):
            beside = (page.parent / span).exists()
            if (
                span not in elsewhere
                and not beside
                and not any(name == span or name.endswith("/" + span) for name in suffixes)
            ):
                missing.append(f"{page.relative_to(ROOT)}: {span}")
    assert not missing, "\n".join(missing)


def test_the_readme_is_short_and_has_its_test_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 220
    block = re.search(r"<!-- test command -->\n```bash\n(.*?)```\n<!-- end -->", text, re.DOTALL)
    assert block and "pytest" in block[1]


# --- Error messages ---------------------------------------------------------------------------------------------------

TROUBLE = ROOT / "docs/troubleshooting.md"
PACKAGES = ("reinflow", "so101_sim", "reinflow_vla", "reinflow_gym", "reinflow_so101")
ROOT_FILES = ("train_reinflow.py", "reinflow_smolvla.py", "pi0_adapter.py", "so101_gym_env.py", "so101_mujoco_utils.py")
GAP = "\0"  # where a message has a name or a number
# Errors whose text is put together before it is raised: a piece of it.
BUILT = {
    "RatioGuardError": "ratio is off 1 by",
    "UnstableSimulationError": "became unstable after control step",
    "WorkerError": "it died (exit code",
}
# What newcomers meet first: these must be there whatever else is.
MOST_MET = (
    "cannot render off screen", "is not available on this machine", "holds a run already", "resume needs the run",
    "a resumed run keeps its settings", "no such directory", "could not be taken from the Hugging Face hub",
    "hold no", "fit no joint frame", "--rename-map", "set chunk_size", "exceeds sigma_max", "needs ... decisions",
    "ratio is off 1 by", "no key is known", "holds an evaluation already", "no config.json", "do not run it yet",
    "of another baseline", "do not fit into the",
)  # fmt: skip


def template(node: ast.expr) -> str:
    """The text of a message, with gaps where it is filled; "" for what is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in parts)
        case ast.BinOp(left=left, right=right):
            return (template(left) or GAP) + (template(right) or GAP)
        case ast.IfExp(body=body, orelse=other):
            return template(body) or template(other)
    return ""


def sources() -> list[Path]:
    return [p for p in tracked(".py") if p.relative_to(ROOT).parts[0] in (*PACKAGES, *ROOT_FILES)]


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sources()}


def user_errors(modules: dict[Path, ast.Module]) -> set[str]:
    """UserError and all that descends from it."""
    found, before = {"UserError"}, 0
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while len(found) > before:
        before = len(found)
        found |= {c.name for c in classes if any(ast.unparse(base).split(".")[-1] in found for base in c.bases)}
    return found


@dataclass(frozen=True)
class Message:
    module: str
    text: str  # with gaps
    error: str  # the class that is raised with it; "" for a text on the way to one


@cache
def messages() -> list[Message]:
    """Every text in the packages that could reach a user, docstrings not among them."""
    modules = trees()
    errors, found = user_errors(modules), []
    for path, tree in modules.items():
        name = path.relative_to(ROOT).as_posix()
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        raised = {
            id(argument): ast.unparse(node.exc.func).split(".")[-1]
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
            for argument in node.exc.args
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp) and id(node) not in docs:
                error = raised.get(id(node), "")
                if text := template(node):
                    found.append(Message(name, text, error if error in errors else ""))
    return found


def entries() -> list[str]:
    """The quoted messages of docs/troubleshooting.md."""
    rows = re.findall(r"^\| (`.*?`) \| ", TROUBLE.read_text(), re.MULTILINE)
    return [row.strip("`") for row in rows]


def says(message: Message, quoted: str) -> bool:
    """Whether the message is the quoted one; ``...`` stands for anything."""
    position = 0
    for piece in (p.strip() for p in quoted.split("...")):
        if (position := message.text.find(piece, position)) < 0:
            return False
    return True


def test_troubleshooting_quotes_what_the_code_says() -> None:
    known = messages()
    silent = [entry for entry in entries() if not any(says(message, entry) for message in known)]
    assert len(entries()) > 100
    assert not any(says(message, "... is what nobody says") for message in known)
    assert not silent, "\n".join(silent)


def test_every_error_class_and_every_module_that_raises_one_has_an_entry() -> None:
    raised, quoted = [m for m in messages() if m.error], entries()
    covered = [m for m in raised if any(says(m, entry) for entry in quoted)]
    assert {m.module for m in raised} == {m.module for m in covered}
    by_helpers = user_errors(trees()) - {m.error for m in covered}
    assert by_helpers == set(BUILT)
    assert all(any(piece in entry for entry in quoted) for piece in BUILT.values())


def test_the_messages_most_met_have_entries() -> None:
    text = "\n".join(entries())
    assert [piece for piece in MOST_MET if piece not in text] == []


# --- Figures that code computes ---------------------------------------------------------------------------------------


def test_one_pose_in_all_units() -> None:
    """The table of notes/frames.md, computed again."""
    rows = re.findall(r"^\| (\w+) \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \|$", frames_page(), re.MULTILINE)
    assert tuple(row[0] for row in rows) == JOINT_NAMES
    pose_rad, *written = np.array([[float(x) for x in row[1:]] for row in rows]).T
    for values, frame in zip(written, (FRAMES["lerobot"], m100_frame(), FRAMES["so100_legacy"]), strict=True):
        np.testing.assert_allclose(values, frame.from_rad(pose_rad), atol=0.005)


def frames_page() -> str:
    return (ROOT / "notes/frames.md").read_text()
