"""What the commands of the documents need: directories for their placeholders, parsers, and small numbers.

A value is replaced where it stands behind a flag for a file or a folder and names nothing that is here: RUN_DIR,
runs/aw, data/hopper. What is built for that is built by documented commands too.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from unittest import mock

import tyro

from tests.documents import ROOT, Command
from tests.lerobot_commands import lerobot, plugin_folder

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODEL = ROOT / "model"
NAMES = {"tiny", "tiny-base", "tiny-pi0", "flow_mlp", "embedded"}  # of embedded policies
VALUES = {"S": "0", "K": "1", "E": "Hopper-v5", "LEVER": "baseline", "ARM": "natural", "N": "0"}
OUTPUTS = {
    "--output-dir", "--output_dir", "--output", "--csv", "--png", "--csv-dir", "--robot.calibration_dir",
    "--robot.report",
}  # fmt: skip
POLICIES = {
    "--pretrained-path", "--pi0-pretrained-path", "--flow-mlp-pretrained-path", "--policy-path", "--policy-dir",
    "--policy.path",
}  # fmt: skip
SEVERAL = {"--compare", "--policies"}  # policies beside each other
DATA = {"--dataset-root", "--dataset.root"}
POSITIONAL = {
    "reinflow-export", "reinflow-doctor", "reinflow-report", "reinflow-monitor", "reinflow-check-arm",
    "benchmarks/plot_runs.py",
}  # fmt: skip
# Flags that a command cannot do without, for fragments in sentences; a positional policy or run comes first.
REQUIRED = {
    "reinflow-eval": ["--policy-path", "DIR", "--output-dir", "D"],
    "reinflow-demos": ["--output-dir", "D"],
    "reinflow-sft": ["--policy-dir", "DIR", "--dataset-root", "D", "--output-dir", "D"],
    "reinflow-sft-mlp": ["--output-dir", "D"],
    "reinflow-shortcut": ["--output-dir", "D"],
    "reinflow-offline-rl": ["--policy-dir", "DIR", "--output-dir", "D"],
    "reinflow-reflow": ["--policy-dir", "DIR", "--output-dir", "D"],
    "reinflow-collect": ["--output-dir", "D"],
    "reinflow-pretrain": ["--policy-dir", "DIR", "--output-dir", "D"],
    "reinflow-sweep": ["--output-dir", "D"],
    "reinflow-export": ["--output-dir", "D"],
    "reinflow-materialize": ["--policy-dir", "DIR", "--output-dir", "D"],
    "reinflow-check-arm": ["--robot-config", "my_arm.yaml"],
}


class Parsed(BaseException):
    """A program's flags are read; it does not go on."""


class Workspace:
    """A folder where documented commands run, and what they find there. Each part is built when it is first asked for.

    Args:
        folder: an empty folder.
        commands: of the documents, by which the parts are built.
    """

    def __init__(self, folder: Path, commands: Sequence[Command]) -> None:
        self.folder, self.commands, self.count = folder, commands, 0

    def fresh(self, suffix: str = "") -> Path:
        """A path that does not exist yet."""
        self.count += 1
        return self.folder / f"out{self.count}{suffix}"

    def build(self, start: str) -> Path:
        """Run the first documented command that starts so, in small; the folder that it writes."""
        return run(one_that_starts(self.commands, start), self)

    @cached_property
    def run(self) -> Path:
        """A run of a state-based policy."""
        return self.build("python train_reinflow.py --preset flow_mlp --no-wandb --report-episodes 0")

    @cached_property
    def state_data(self) -> Path:
        """Demonstrations with states and rewards, no images."""
        return self.build("reinflow-demos --output-dir half")

    @cached_property
    def image_data(self) -> Path:
        """Demonstrations with images."""
        return self.build("reinflow-demos --output-dir D --episodes 200")

    @cached_property
    def gym_data(self) -> Path:
        return self.build("reinflow-collect --env-id Hopper-v5 --output-dir hopper")

    @cached_property
    def gym_policy(self) -> Path:
        return self.build("reinflow-sft-mlp --dataset-root hopper")

    @cached_property
    def shortcut(self) -> Path:
        """A policy with a step-size embedding beside it, for any number of denoising steps."""
        return self.build("reinflow-shortcut --num-steps 4")

    @cached_property
    def video_data(self) -> Path:
        """Demonstrations as lerobot-train takes them."""
        return self.build("reinflow-demos --output-dir runs/demos --episodes 200 --video")

    @cached_property
    def stock(self) -> Path:
        """A policy that plain LeRobot loads from anywhere."""
        return self.build("reinflow-materialize --policy-dir tiny --output-dir")

    @cached_property
    def sweep(self) -> Path:
        """A sweep of one training."""
        return self.build("reinflow-sweep --output-dir grid")

    @cached_property
    def arm(self) -> Path:
        """An arm's config, as docs/real_arm.md writes it."""
        text = one_that_starts(self.commands, "cat > my_arm.yaml").text
        path = self.folder / "my_arm.yaml"
        path.write_text(re.search(r"<<'YAML'\n(.*?)\nYAML", text, re.DOTALL)[1])
        return path

    @cached_property
    def config(self) -> Path:
        """Settings in a file."""
        path = self.folder / "settings.yaml"
        path.write_text("preset: flow_mlp\nclip_epsilon: 0.1\n")
        return path

    @cached_property
    def plugins(self) -> Path:
        """LeRobot's plugins of this project as installed ones."""
        (self.folder / "plugins").mkdir()
        return plugin_folder(self.folder / "plugins")

    def policy(self, command: Command, flag: str, building: bool) -> Path:
        """One of the kind that the command takes."""
        of_flag = {"--pi0-pretrained-path": MODEL / "tiny_pi0", "--flow-mlp-pretrained-path": MODEL / "flow_mlp"}
        gym = "paper-state" in command.words or "paper-walker2d" in command.words
        if gym and building:
            return self.gym_policy
        if flag in of_flag:
            return of_flag[flag]
        if command.program.startswith("lerobot-"):
            return self.stock if building else MODEL / "tiny_smolvla"
        if command.program in ("reinflow-offline-rl", "reinflow-reflow", "reinflow-sweep"):
            return MODEL / "flow_mlp"
        if command.program == "reinflow-eval" and building and "--num-denoising-steps" in command.words:
            return self.shortcut
        if command.program in ("reinflow-sft", "reinflow-shortcut", "reinflow-pretrain"):
            return MODEL / "tiny_smolvla_base"
        return self.run if command.program in ("reinflow-eval", "reinflow-export") else MODEL / "tiny_smolvla"

    def data(self, command: Command) -> Path:
        """A data set of the kind that the command takes."""
        if command.program.startswith("lerobot-"):
            return self.video_data
        of_gym = command.program == "reinflow-sft-mlp" and "--every-frame" in command.words
        if of_gym or any("hopper" in word for word in command.words):
            return self.gym_data
        images = command.program == "reinflow-sft" or (
            command.program in ("reinflow-shortcut", "reinflow-reflow") and "--policy-dir" in command.words
        )
        return self.image_data if images else self.state_data

    def positional(self, command: Command) -> Path:
        """What stands for RUN and the like."""
        program = command.program
        if program == "reinflow-check-arm" or "--fp32-backbone" in command.words:
            return MODEL / "tiny_smolvla"
        return self.run.parent if program == "reinflow-monitor" else self.run


def one_that_starts(commands: Sequence[Command], start: str) -> Command:
    """The first command whose words start so. Raises LookupError: the documents name none."""
    words = tuple(start.split())
    for command in commands:
        if command.words[: len(words)] == words or command.text.startswith(start):
            return command
    raise LookupError(f"no document has a command {start!r}")


def is_here(value: str) -> bool:
    """Whether it names an embedded policy or something in the checkout, and is no placeholder."""
    return value in NAMES or (not value.isupper() and not value.startswith("runs") and (ROOT / value).exists())


def replaced(command: Command, flag: str, value: str, place: Workspace, building: bool) -> str:
    """The value, or what stands for it here."""
    if flag in OUTPUTS:
        return str(place.fresh(Path(value).suffix if "." in value else ""))
    if is_here(value):
        return str(ROOT / value) if flag in POLICIES and value not in NAMES else value
    if flag in DATA:
        return str(place.data(command)) if building else value
    if flag in POLICIES:
        hub = value.startswith("lerobot/") and not building
        return value if hub else str(place.policy(command, flag, building))
    special = {"--robot-config": lambda: place.arm, "--config": lambda: place.config}
    if flag in special:
        return str(special[flag]())
    return VALUES.get(value, value)


def filled(command: Command, place: Workspace, building: bool = True) -> list[str]:
    """The command's flags with real values; without ``building`` what takes long to make keeps its name."""
    flags, out, flag = command.flags, [], ""
    missing = list(REQUIRED.get(command.program, [])) if not command.whole else []
    if "--compare" in flags:  # names its policies itself
        missing = ["--output-dir", "D"]
    if missing and "--every-frame" in flags:  # of a data set
        missing += ["--dataset-root", "D"]
    flags = [w for f, v in zip(missing[::2], missing[1::2], strict=True) if f not in flags for w in (f, v)] + flags
    if command.program in ("lerobot-train", "lerobot-record") and not command.whole:
        flags = one_that_starts(place.commands, command.program + " --").flags + flags
    if command.program in POSITIONAL and (not flags or flags[0].startswith("-")):
        flags.insert(0, "RUN")
    resume = "--resume" in flags
    for i, word in enumerate(flags):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flag = name
            out.append(f"{name}={replaced(command, name, value, place, building)}" if equals else word)
        elif not flag and command.program in POSITIONAL:
            first = str(place.positional(command))
            out.append(str(copy_of(Path(first), place)) if i and building else first)  # no run is named twice
        elif flag in SEVERAL and not is_here(word):
            out.append(str(MODEL / "flow_mlp" if flags[i - 1] == flag else place.run))
        elif command.program == "reinflow-sweep" and "--report" in flags and flag == "--output-dir" and building:
            out.append(str(place.sweep))
        elif resume and flag in ("--output-dir", "--checkpoint-path"):
            out.append(str(copy_of(place.run, place)))
        else:
            out.append(replaced(command, flag, word, place, building))
    return out


def copy_of(folder: Path, place: Workspace) -> Path:
    """Something to go on with, without touching what others read."""
    target = place.fresh()
    shutil.copytree(folder, target, symlinks=True)
    return target


# --- Parsing ----------------------------------------------------------------------------------------------------------


@contextmanager
def started_as(program: str, flags: Sequence[str]) -> Iterator[None]:
    """sys.argv as the shell would have it."""
    with mock.patch.object(sys, "argv", [program, *flags]):
        yield


def read_flags(program: str, flags: Sequence[str]) -> None:
    """Have the program's own parser read the flags, and stop there.

    Raises:
        AssertionError: the program is unknown. SystemExit, UserError: the parser refuses.
    """
    if program in ("train_reinflow.py", "reinflow-train", "reinflow-sweep", "reinflow-memory"):
        return _read_training(program, flags)
    if program.startswith("lerobot-"):
        return _read_lerobot(program, flags)
    real_tyro, real_argparse = tyro.cli, argparse.ArgumentParser.parse_args

    def stop(read: object) -> object:
        def parse(*args: object, **kwargs: object) -> object:
            raise Parsed(read(*args, **kwargs))  # type: ignore[operator]

        return parse

    with (
        started_as(program, flags),
        mock.patch.object(tyro, "cli", stop(real_tyro)),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop(real_argparse)),
    ):
        try:
            start(program)
        except Parsed:
            return None
    raise AssertionError(f"{program} read no flags")


def _read_training(program: str, flags: Sequence[str]) -> None:
    from reinflow_so101.commands import sweep
    from reinflow_so101.memory_planner import plan
    from train_reinflow import PRESETS, parse_args

    if program == "reinflow-memory":
        plan.parse_args(flags, PRESETS)
    elif program == "reinflow-sweep":
        config, rest = sweep.parse_args(flags)
        parse_args(["--preset", config.preset, *rest])
    else:
        parse_args(flags)


def _read_lerobot(program: str, flags: Sequence[str]) -> None:
    """By LeRobot's own reader of the command's own config class; ``.path`` flags it reads later, from the disk."""
    import inspect

    from lerobot.configs import parser

    for plugin in ("lerobot_env_so101_reinflow", "tests.plugins.lerobot_robot_so101_simulated"):
        import_module(plugin)  # registers its types, as LeRobot does with what is installed
    module = import_module(f"lerobot.scripts.{program.replace('-', '_')}")
    name = program.removeprefix("lerobot-")
    entry = getattr(module, {"eval": "eval_main"}.get(name, name))
    config = next(iter(inspect.signature(inspect.unwrap(entry)).parameters.values())).annotation
    kind = getattr(module, config) if isinstance(config, str) else config

    def got(cfg: object) -> object:
        return cfg

    got.__annotations__["cfg"] = kind
    with started_as(program, flags):
        parser.wrap()(got)()


def start(program: str) -> None:
    """The program's main, as a console script or ``python FILE`` would start it, with sys.argv as it is."""
    if program in SCRIPTS:
        module, function = SCRIPTS[program].split(":")
        getattr(import_module(module), function)()
    elif module_file(program).is_file():
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif program.endswith(".py") and (ROOT / program).is_file():
        folder = str((ROOT / program).parent)
        with mock.patch.object(sys, "path", [folder, *sys.path]):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        raise AssertionError(f"{program} is no program of this project")


def module_file(program: str) -> Path:
    """Where the module of ``python -m program`` would be."""
    return ROOT / (program.replace(".", "/") + ".py")


@cache
def flags_of(program: str) -> frozenset[str]:
    """All flags that a program's --help names."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit), started_as(program, ["--help"]):
        start(program)
    return frozenset(re.findall(r"--[a-z][a-z0-9_.-]*", text.getvalue()))


# --- Running ----------------------------------------------------------------------------------------------------------

FEW = ["--episodes", "2", "--num-parallel-envs", "2"]
STEPS = ["--steps", "2", "--batch-size", "4", "--eval-episodes", "0"]
SMALL_TRAINING = [
    "--smoke", "--num-episodes", "4", "--total-timesteps", "0", "--episodes-per-iteration", "2", "--rollout-steps", "0",
    "--num-parallel-envs", "2", "--minibatch-size", "2", "--gradient-accumulation-steps", "1", "--eval-interval", "2",
    "--eval-episodes", "2", "--report-episodes", "2", "--num-threads", "1", "--no-wandb", "--device", "cpu",
]  # fmt: skip
# Appended to a command: the last value of a flag counts.
IN_SMALL = {
    "reinflow-eval": FEW,
    "reinflow-demos": ["--episodes", "3"],
    "reinflow-sft": [*STEPS, "--held-out", "1", "--num-steps", "1"],
    "reinflow-sft-mlp": [*STEPS, "--hidden-size", "16"],
    "reinflow-shortcut": STEPS,
    "reinflow-offline-rl": [*STEPS, "--critic-steps", "2"],
    "reinflow-reflow": [
        *STEPS, "--warmup-steps", "1", "--num-pairs", "24", "--num-held-out", "4", "--episodes", "2",
        "--num-parallel-envs", "2", "--measure-every", "2", "--eval-steps-k", "1", "--sweep-steps", "2",
        "--teacher-steps", "2", "--num-threads", "1",
    ],
    "reinflow-collect": [
        "--max-steps", "256", "--control-steps", "200", "--eval-episodes", "1", "--max-steps-per-episode", "50",
    ],
    "reinflow-pretrain": ["--samples", "16", "--held-out", "4", "--steps", "2", "--batch-size", "4"],
    "reinflow-build": ["--smoke", "--num-threads", "1"],
    "reinflow-monitor": ["--once"],
    "benchmarks/plot_runs.py": [],
    "reinflow-report": ["--films", "1"],
    "reinflow_so101.commands.film": ["--seeds", "10005"],
    "benchmarks/memory_plan.py": ["--rows", "2"],
    "examples/reacher.py": ["--episodes", "384"],
    "lerobot-eval": ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false"],
    "lerobot-train": [
        "--steps=2", "--batch_size=2", "--num_workers=0", "--save_freq=2", "--policy.device=cpu", "--env_eval_freq=0",
        "--wandb.enable=false", "--policy.push_to_hub=false",
    ],
    "lerobot-rollout": ["--duration=1"],
}  # fmt: skip


def small(command: Command, flags: list[str], place: Workspace) -> list[str]:
    """The same command with small numbers, and an output folder of its own where it would choose one here."""
    if "--help" in flags:
        return flags
    program = command.program
    if program.startswith("lerobot-"):
        own = [] if program == "lerobot-rollout" else [f"--output_dir={place.fresh()}"]
        return [*flags, *IN_SMALL[program], *own]
    if program == "train_reinflow.py":
        if "--resume" in flags:
            return [*flags, "--episodes", "6"]
        where = [] if "--output-dir" in flags else ["--output-dir", str(place.fresh())]
        if "--check" in flags:
            return [*flags, "--device", "cpu"]
        return [*flags, *SMALL_TRAINING, *where]
    if program == "reinflow-sweep":
        return sweep_in_small(flags)
    if program == "reinflow-offline-rl" and "--dataset-root" not in flags:  # makes 300 episodes of its own otherwise
        flags = [*flags, "--dataset-root", str(place.state_data)]
    if program == "examples/reacher.py":
        return [*flags, *IN_SMALL[program], "--output-dir", str(place.fresh())]
    quick = [] if program in IN_SMALL or not program.startswith("benchmarks/") or "--quick" in flags else ["--quick"]
    small = IN_SMALL.get(program, [])
    return [*flags, *(f for f in small if program != "reinflow-monitor" or f not in flags), *quick]


def sweep_in_small(flags: list[str]) -> list[str]:
    """One training, or a plan of all of them."""
    cut = flags.index("--") if "--" in flags else len(flags)
    own, rest = flags[:cut], flags[cut + 1 :]
    if "--report" in own:
        return [*own, "--preset", "flow_mlp", "--grid", "target_kl=.01", "--", *SMALL_TRAINING[1:]]
    if "--grid" not in own:
        return [*own, "--dry-run", "--", *rest]
    return [*own, "--workers", "1", "--preset", "flow_mlp", "--grid", "target_kl=.01", "--", *rest, *SMALL_TRAINING[1:]]


ALIASES = {
    "--episodes": "--num-episodes",
    "--parallel-envs": "--num-parallel-envs",
    "--num-envs": "--num-parallel-envs",
}


def shape(command: Command) -> tuple[str, ...]:
    """What is left of a command when it is small: two of one shape would run the same thing."""
    if command.program.startswith("benchmarks/") and command.program not in IN_SMALL:
        return (command.program,)  # --quick says all
    training = command.program == "train_reinflow.py"
    fixed = {w.partition("=")[0] for w in (SMALL_TRAINING if training else IN_SMALL.get(command.program, []))}
    kept, flag = [command.program], ""
    for word in command.flags:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            name = ALIASES.get(flag, flag) if training else flag
            if name not in fixed | OUTPUTS | {"--seed"}:
                kept.append(flag if flag in POLICIES | DATA else word)
        elif (ALIASES.get(flag, flag) if training else flag) not in fixed | OUTPUTS | POLICIES | DATA | {"--seed", ""}:
            kept.append(word)
    return (kept[0], *sorted(kept[1:]))


def run(command: Command, place: Workspace) -> Path:
    """Run it here in small, by its own main or, where it is LeRobot's, as a process; the folder that it writes.

    Raises:
        AssertionError: it ended with another exit code than 0.
    """
    flags = small(command, filled(command, place), place)
    print("$", command.program, *flags)
    if command.program.startswith("lerobot-"):
        lerobot(command.program.removeprefix("lerobot-"), place.plugins, *flags)
    else:
        with started_as(command.program, flags):
            try:
                start(command.program)
            except SystemExit as end:
                if end.code:
                    raise AssertionError(f"{command}\n$ {command.program} {' '.join(flags)}\n{end.code}") from end
    outputs = [after for flag, after in pairwise(flags) if flag == "--output-dir"]
    return Path(outputs[-1]) if outputs else place.folder
