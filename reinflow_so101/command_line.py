"""Where the flags of a training start from (a preset, or a run's own settings), and what a resumed run may change."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from reinflow import ConfigError
from reinflow.launch import launched
from reinflow.settings import CONFIG_FILE, config_from_json, config_to_json, read_config
from reinflow_so101.checks import WORKER_FIELDS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHANGEABLE_ON_RESUME = {
    "num_episodes", "total_timesteps", "max_minutes", "output_dir", "resume", "checkpoint_path", "save_interval",
    "keep_checkpoints",
    "log_interval", "wandb_enabled", "wandb_mode", "render", "headless", "num_threads", "report_episodes", "device",
    "prefix_cache", "prefix_cache_gb", "compile_expert", "rollout_backend", *WORKER_FIELDS,
}  # fmt: skip


# What a version without the field did, where that is not the field's default now.
IMPLIED: dict[str, Any] = {"joint_frame": "lerobot", "normalization": "policy"}
EPISODES = ("--episodes", "--num-episodes", "--num_episodes")
WAYS = {"resume", "output_dir", "checkpoint_path"}  # how a run is opened: not taken from another run's config.json

SMOKE = {  # the sizes of --smoke: every stage of a training once, of any preset
    "num_episodes": 4, "episodes_per_iteration": 2, "num_parallel_envs": 2, "minibatch_size": 2,
    "gradient_accumulation_steps": 1, "critic_warmup_iters": 1, "eval_interval": 2, "eval_episodes": 2,
    "report_episodes": 2, "total_timesteps": 0, "rollout_steps": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ThisStart:
    """What a start is for; not a setting of the run."""

    smoke: bool = False
    """Two iterations of two episodes, evaluated, saved and exported, whatever the preset: does it work here?"""
    check: bool = False
    """Everything up to the first step, then an end: does my policy fit? Nothing is written."""
    config: str = ""
    """Start from the fields in a file: the config.json of a run, or a YAML of some of them; flags override it."""


def resume_directory(checkpoint_path: str, output_dir: str) -> Path:
    """Run directory that --resume continues.

    Raises:
        ConfigError: neither checkpoint_path nor output_dir is one, one of them is not there, or they are of two runs.
    """
    if checkpoint_path and Path(checkpoint_path).is_file():
        raise ConfigError(
            f"checkpoint_path={checkpoint_path} is a file: pickled checkpoints are not loaded; "
            "name a run directory or a directory under its checkpoints/"
        )
    for field, value in (("checkpoint_path", checkpoint_path), ("output_dir", output_dir)):
        path = Path(value)
        if value and not path.exists():
            raise ConfigError(f"{field}={value} is not there: name a run, or a directory under its checkpoints/")
        for candidate in (path, *path.parents[:3]) if value else ():
            if (candidate / CONFIG_FILE).exists() and (candidate / "checkpoints").exists():
                if output_dir and not candidate.samefile(output_dir):
                    raise ConfigError(f"{field}={value} is of the run {candidate}, not of output_dir={output_dir}")
                return candidate
        if value and field == "output_dir":
            raise ConfigError(f"output_dir={value} holds no run to resume (no config.json with checkpoints/)")
    raise ConfigError("resume needs the run: give its directory as --output-dir (or --checkpoint-path)")


def flag_value(argv: Sequence[str], *names: str) -> str:
    """Value of the first of ``names`` among the flags, before the parser runs; "" without one."""
    for i, word in enumerate(argv):
        for name in names:
            if word == name and i + 1 < len(argv):
                return argv[i + 1]
            if word.startswith(name + "="):
                return word.split("=", 1)[1]
    return ""


def saved_config[C: DataclassInstance](run_dir: Path, config_type: type[C]) -> C:
    """The settings that a run was started with, ready to resume it."""
    saved = read_config(run_dir) | {"resume": True, "output_dir": str(run_dir)}
    lacking = {f.name: IMPLIED.get(f.name, f.default) for f in dataclasses.fields(config_type) if f.name not in saved}
    if lacking:
        implied = ", ".join(f"{name}={value}" for name, value in lacking.items())
        print(f"{run_dir / CONFIG_FILE} is of an older version, which implied {implied}")
    config = config_from_json(lacking | saved, config_type, str(run_dir / CONFIG_FILE))
    return dataclasses.replace(config, task=_task_played(config)) if "task" in lacking else config


def _task_played(config: Any) -> str:
    """The named task that a config's environment is nearest to."""
    from so101_sim.config import EnvConfig
    from so101_sim.tasks.registry import ASPECTS, nearest_task

    return nearest_task(EnvConfig(**{name: getattr(config, name) for name in ASPECTS if hasattr(config, name)}))


def config_of_file[C: DataclassInstance](path: str, presets: Mapping[str, C], preset: str) -> C:
    """The fields in a JSON or YAML file over those of a preset: the one named, else the file's own, else the default.

    Raises:
        ConfigError: it cannot be read, or holds what is no field or no value of its field.
    """
    import yaml

    from so101_sim.tasks.registry import task_env

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config={path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={path} holds no fields: write lines such as policy_lr: 1.0e-5")
    given = {name: value for name, value in content.items() if name not in WAYS}
    start = preset_of(presets, preset or str(given.get("preset", "")))
    base = config_to_json(start)
    kind = type(next(iter(presets.values())))
    unknown = sorted(str(name) for name in given if name not in base)
    if unknown:
        close = [match for name in unknown for match in difflib.get_close_matches(name, base, 1)]
        hint = f": is {', '.join(close)} meant?" if close else ": see --help"
        raise ConfigError(f"config={path} has {', '.join(unknown)}, which is no setting{hint}")
    if "task" in given:
        task = task_env(str(given["task"]))
        base |= config_to_json(dataclasses.replace(start, **_fields_of(task, dataclasses.fields(start), False)))
    hints = get_type_hints(kind)
    for name, value in given.items():
        if hints[name] is float and isinstance(value, str):  # YAML reads 1e-4 as text
            with contextlib.suppress(ValueError):
                given[name] = float(value)
    return config_from_json(base | given | ({"preset": preset} if preset else {}), kind, f"config={path}")


def preset_of[C](presets: Mapping[str, C], name: str) -> C:
    """The preset of that name; the first one without a name."""
    if name and name not in presets:
        raise ConfigError(f"preset={name} is unknown: choose one of {sorted(presets)}")
    return presets[name] if name else next(iter(presets.values()))


def starting_point[C: DataclassInstance](argv: Sequence[str], presets: Mapping[str, C]) -> C:
    """The config whose fields the flags override: a preset's or a file's (in small with --smoke), or the run's own
    (--resume)."""
    preset, file = flag_value(argv, "--preset"), flag_value(argv, "--config")
    if "--resume" in argv:
        if "--smoke" in argv:
            raise ConfigError("--smoke starts a small run of its own: leave out --resume")
        if file:
            raise ConfigError(f"--config {file} starts a run of its own, --resume goes on with a run's: leave one out")
        run = resume_directory(
            flag_value(argv, "--checkpoint-path", "--checkpoint_path"),
            flag_value(argv, "--output-dir", "--output_dir"),
        )
        saved: Any = saved_config(run, type(next(iter(presets.values()))))
        if flag_value(argv, *EPISODES) and saved.total_timesteps:
            raise ConfigError(
                f"num_episodes: the run in {run} counts control steps (total_timesteps={saved.total_timesteps:,}): "
                "give --total-timesteps"
            )
        shown: dict[str, Any] = {"render": False} if "--headless" in argv else {}
        if flag_value(argv, "--rollout-backend", "--rollout_backend") == "local":
            unset = {f.name: f.default for f in dataclasses.fields(saved)}
            shown |= {"rollout_backend": "local"} | {name: unset[name] for name in WORKER_FIELDS}
        return dataclasses.replace(saved, **shown)
    start = config_of_file(file, presets, preset) if file else preset_of(presets, preset)
    start = dataclasses.replace(start, **_task(argv, start, bool(file)))
    if flag_value(argv, *EPISODES):  # it says how long, whatever the preset counts
        start = dataclasses.replace(start, total_timesteps=0)
    return dataclasses.replace(start, **(SMOKE if "--smoke" in argv else {}))


PATH_FIELDS = {
    "smolvla": "pretrained_path", "pi0": "pi0_pretrained_path", "flow_mlp": "flow_mlp_pretrained_path",
}  # fmt: skip


def _task(argv: Sequence[str], start: Any, of_file: bool) -> dict[str, Any]:
    """The settings of the environment: of the task that --task names, else of the one that a named policy was made for,
    else the preset's or the file's own."""
    from reinflow_so101.policy_card import env_of_task, known_env
    from reinflow_so101.worlds import gym_world
    from so101_sim.tasks.registry import describe, how_to_choose, nearest_task, task_env

    task = flag_value(argv, "--task")
    directory = None if of_file and not task else _named_policy(argv, start)
    if directory and (world := gym_world(directory)):
        return {"env_id": world.env_id, "max_steps_per_episode": world.max_steps_per_episode, "chunks_per_episode": 0}
    known = known_env(directory) if directory else None
    if task:
        env = env_of_task(directory, task) if directory else task_env(task)
    elif known:
        env = known[0]
        print(f"task as {known[1]} has it: {describe(env)}; flags override it")
    else:
        if directory is None and start.preset == "finetune" and not of_file:
            print(
                f"as far as this machine knows the policy says of no task that it was made for: {start.task} is "
                f"played; {how_to_choose()}"
            )
        return {}
    values = _fields_of(env, dataclasses.fields(start), with_cameras=directory is not None)
    if known and known[0].control_hz:
        values["control_hz"] = known[0].control_hz
    if env.max_steps_per_episode != start.max_steps_per_episode:
        values["chunks_per_episode"] = 0  # as many as it takes
    return values | {"task": task or nearest_task(env)}


def _fields_of(env: Any, fields: Sequence[dataclasses.Field[Any]], with_cameras: bool) -> dict[str, Any]:
    """What of a config's fields a task sets; cameras are the policy's, so only where that has been looked at."""
    from so101_sim.tasks.registry import aspects

    names = {f.name for f in fields} - (set() if with_cameras else {"cameras"})
    return {name: value for name, value in aspects(env).items() if name in names}


def _named_policy(argv: Sequence[str], start: Any) -> Path | None:
    """The directory on this machine of the policy that a flag names; None without one. Nothing is downloaded."""
    from reinflow_so101.policies import FAMILIES

    family = flag_value(argv, "--model-type", "--model_type") or start.model_type
    field = PATH_FIELDS.get(family, "")
    path = flag_value(argv, "--" + field.replace("_", "-"), "--" + field)
    if not path or family not in FAMILIES:
        return None
    directory = FAMILIES[family].embedded_directory(path) or Path(path)
    return directory if (directory / "config.json").is_file() else None


def this_command(script: str) -> str:
    """How this program was started: the console script of that name, or a file."""
    return script if Path(sys.argv[0]).name == script else f"python {sys.argv[0]}"


def fresh_directory(path: str) -> Path:
    """A new directory of that name, or of the name with a number behind it: two runs never share one."""
    for number in itertools.count(1):
        directory = Path(path if number == 1 else f"{path}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise AssertionError("unreachable")


def named_checkpoint(checkpoint_path: str) -> Path | None:
    """The checkpoint that --checkpoint-path names; None where it names the whole run, or was not given."""
    path = Path(checkpoint_path)
    inside = path if (path / "training_state").is_dir() else path.parent
    return inside if (inside / "training_state").is_dir() else None


def pick_device(name: str, or_any: bool = False) -> str:
    """Resolve "auto"; an accelerator that is not there is a ConfigError, or with ``or_any`` replaced and said."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name] and or_any:
        found = pick_device("auto")
        print(f"device={name} is not here: the run goes on with {found}, not bit for bit as it would have there")
        return found
    if not available[name]:
        raise ConfigError(f"device={name} is not available on this machine: use --device auto")
    return name


# --- Flags in groups --------------------------------------------------------------------------------------------------


def sections(config_type: type) -> dict[str, list[str]]:
    """Fields of a config class by the section comments (``# --- Title ---``) that they stand under."""
    found: dict[str, list[str]] = {}
    names = {f.name for f in dataclasses.fields(config_type)}
    for line in inspect.getsource(config_type).splitlines():
        if title := re.fullmatch(r"    # --- (.+?) -+", line):
            found[title[1]] = []
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in names:
            found[next(reversed(found))].append(field[1])
    return found


def field_docs(config_type: type) -> dict[str, str]:
    """The string under every field of a config class, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(config_type)).body if isinstance(node, ast.ClassDef))
    docs = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """tyro prints what is wrong with flags before it exits: as one of a launch's processes it becomes the exit's own
    words, which the first of them has."""
    if not launched():
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise SystemExit(said.getvalue().rstrip()) from None


def parse_flags[C: DataclassInstance, X](
    argv: Sequence[str], default: C, description: str | None, also: X, prog: str | None = None
) -> tuple[C, X]:
    """The config that the flags make of ``default``; --help shows its fields by section.

    Args:
        argv: the flags.
        default: what they override.
        description: above the help.
        also: a dataclass of further flags, which come first; None adds nothing.
        prog: the command's name in usage and errors.

    Raises:
        ConfigError: the config does not hold together.
    """
    import tyro

    kind = type(default)
    hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    parts: dict[str, Any] = {} if also is None else {"this_command": also}
    for title, names in sections(kind).items():
        part = dataclasses.make_dataclass(title, [(name, hints[name]) for name in names], frozen=True)
        lines = "\n".join(f"    {name}: {docs[name]}" for name in names)
        part.__doc__ = f"{title}.\n\nAttributes:\n{lines}"
        parts[re.sub(r"\W+", "_", title.lower())] = part(*(getattr(default, name) for name in names))
    whole = dataclasses.make_dataclass(
        "Flags", [(name, Annotated[type(part), tyro.conf.OmitArgPrefixes]) for name, part in parts.items()]
    )
    with _said_once():
        flags = tyro.cli(whole, args=list(argv), default=whole(**parts), description=description, prog=prog)
    values = {name: vars(part) for name, part in vars(flags).items() if name != "this_command"}
    return dataclasses.replace(default, **{k: v for part in values.values() for k, v in part.items()}), getattr(
        flags, "this_command", also
    )
