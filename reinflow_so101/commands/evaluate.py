"""reinflow-eval: noise-free success of a policy on fixed seeds, or of several on the same ones.

    reinflow-eval --policy-path model/tiny_smolvla --episodes 200 --seed 10000 --output-dir outputs/eval
    reinflow-eval --compare tiny RUN --episodes 500 --output-dir outputs/compared

Works on a run directory or a checkpoint of train_reinflow.py (its best checkpoint, else its last) and on any stock
LeRobot policy directory whose cameras and joints match. A SmolVLA, a Pi0 or Pi0.5 and a flow_mlp (the small MLP on
simulator state) go through the same policy object as in training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from reinflow import ConfigError, UserError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED
from reinflow.settings import SEED, Range, check_ranges, cut
from reinflow_so101.command_line import flag_value, pick_device
from reinflow_so101.door import DoorSettings
from reinflow_so101.policies import EMBEDDED, ActingSettings, family_of
from reinflow_so101.policy_card import TASK_GROUP, env_of_task, known_env, stored_env
from reinflow_so101.worlds import World, gym_world, make_world, say_world
from reinflow_vla.directory import CONFIG_FILE, check_trusted, read_json, weights_file
from reinflow_vla.trust import no_remote_code
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import TASKS, describe, how_to_choose, named, shows_one_scene

if TYPE_CHECKING:
    from rich.console import Console

    from reinflow.env import Observation
    from reinflow.evaluate import Act, EvalResult
    from reinflow_so101.commands.compare import Comparison

MOST_UNTIL = 20_000  # episodes of a sequential comparison: enough for 3 points where the two always differ


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy noise-free on fixed seeds."""

    policy_path: str
    """Run directory, checkpoint, or policy directory; "tiny", "tiny-pi0" and "flow_mlp" name the embedded policies."""
    output_dir: str
    """Where eval_info.json (LeRobot's shape), episodes.csv and the video go, or compare.json and compare.csv; refused
    if it holds an evaluation."""
    compare: tuple[str, ...] = ()
    """Instead of policy_path: two policies or more, each against the first on the same seeds."""
    until: Annotated[float, Range(0.005, 0.2, or_zero=True)] = 0.0
    """Of a comparison of two: stop as soon as a difference is shown, or one of this share (.03: 3 points) is ruled out;
    episodes is then the most, 20,000 if it is not given. 0 plays all episodes."""
    episodes: Annotated[int, Range(1, 1_000_000)] = 200
    """Episodes; episode i uses seed + i."""
    seed: Annotated[int, SEED] = FIRST_REPORTING_SEED
    """First seed. From 10,000 up they are for reporting, 5,000 to 9,999 for tuning."""
    num_parallel_envs: Annotated[int, Range(1, 65_536)] = 32
    """Environments that act at once."""
    num_denoising_steps: Annotated[int, Range(0, 1_000)] = 0
    """K; 0 takes what is stored with the policy."""
    n_action_steps: Annotated[int, Range(0, 1_000)] = 0
    """Executed actions per chunk; 0 takes what is stored with the policy."""
    video: bool = False
    """Write video.mp4: some of these episodes, failures first, the scene beside what the policy sees."""
    gif: bool = False
    """With video: write it as video.gif too, for a README."""
    video_episodes: Annotated[int, Range(1, 32)] = 4
    """Episodes in the video, below each other; H.264 ends at 16,384 pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Where the policy runs; auto takes cuda, then mps, then cpu."""
    pi0_tokenizer_path: str = ""
    """Folder with PaliGemma's tokenizer, for a Pi0 whose stored tokenizer cannot be had."""
    rename_map: str = ""
    """Which camera of the scene is which of the policy's; this and the next three as in a training."""
    normalization: str = "auto"
    """Statistics of joints and actions: policy, the name of a data set, or dataset:PATH."""
    joint_frame: Literal["auto", "lerobot", "lerobot_m100_100", "so100_legacy"] = "auto"
    """Units of those statistics."""
    calibration: str = ""
    """LeRobot's calibration file of one's own arm, for lerobot_m100_100."""
    task: str = ""
    """Named task to play, such as lift or lift_wide; empty takes the one that the policy was made for."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment: the task's, as the policy sees it; these flags override it. Not read where the policy acts in a
    Gymnasium environment, which its reinflow.json names."""

    @property
    def acting(self) -> ActingSettings:
        """How the policy acts."""
        return ActingSettings(
            pick_device(self.device), self.num_denoising_steps, self.n_action_steps, self.pi0_tokenizer_path,
            cut(self, DoorSettings), self.env.cameras, self.env.joint_frame,
        )  # fmt: skip


def check_config(config: EvalConfig) -> None:
    """Raise a ConfigError for what cannot work."""
    if config.task:
        named(config.task)
    check_ranges(config)
    if bool(config.policy_path) == bool(config.compare):
        given = "both are given" if config.compare else "neither is given"
        raise ConfigError(f"policy_path, compare: {given}; name one policy by --policy-path, or several by --compare")
    if len(config.compare) == 1:
        raise ConfigError(f"compare={config.compare[0]} is one policy: name the others behind it, or use --policy-path")
    if config.until and len(config.compare) != 2:
        raise ConfigError(f"until={config.until} stops a comparison of two policies: give it with --compare A B")
    if config.compare and (config.video or config.gif):
        raise ConfigError("video shows one policy: leave it out of a comparison, and film each by --policy-path")
    out = Path(config.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir={out} is a file: choose a directory")
    if (out / "eval_info.json").exists() or (out / "compare.json").exists():
        raise ConfigError(f"output_dir={out} holds an evaluation already: choose another directory")


def find_policy(path: str, field: str = "policy_path") -> Path:
    """Policy directory behind a run, a checkpoint or a policy directory; raises ConfigError, which names ``field``."""
    from reinflow.checkpoint import BEST, CHECKPOINTS, PRETRAINED, resolve_checkpoint

    if path in EMBEDDED:
        return EMBEDDED[path].embedded
    root = Path(path)
    best = root / CHECKPOINTS / BEST
    if (root / CHECKPOINTS).is_dir() or (root / PRETRAINED).is_dir():
        if (supervised := sorted(root.glob(f"{CHECKPOINTS}/[0-9]*/{CONFIG_FILE}"))) and not best.exists():
            return supervised[-1].parent  # of reinflow-sft, whose checkpoints are policies
        return resolve_checkpoint(best if best.exists() else root) / PRETRAINED
    if not (root / CONFIG_FILE).is_file():
        raise ConfigError(f"{field}={path} is no run, checkpoint or policy directory (no config.json)")
    return root


def make_actor(config: EvalConfig, policy_dir: Path) -> Act:
    """Observation -> actions: the acting policy of training with zero noise, or any other LeRobot policy."""
    return load_actor(config, policy_dir)[0]


def load_actor(config: EvalConfig, policy_dir: Path) -> tuple[Act, dict[str, Any]]:
    """The same, and which policy it is: directory, sha256 of its weights, K (not of stock policies), n_action_steps."""
    from reinflow.checksums import sha256
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor

    family, kind = family_of(policy_dir), read_json(policy_dir / CONFIG_FILE).get("type")
    if config.pi0_tokenizer_path and (family is None or "pi0" not in family.types):
        given = f"pi0_tokenizer_path={config.pi0_tokenizer_path}"
        raise ConfigError(f"{given} is not read by a {kind} policy: leave it out")
    if family is None or "flow_mlp" in family.types:
        unread = [f.name for f in fields(DoorSettings) if getattr(config, f.name, f.default) != f.default]
        if unread:
            raise ConfigError(f"{', '.join(unread)} not read by a {kind} policy, which is taken as it is: leave it out")
    sizes: dict[str, int] = {}
    if family is None:
        act, sizes["n_action_steps"] = stock_actor(config, policy_dir)
    else:
        policy = family.load(policy_dir, config.acting)
        sizes |= {name: getattr(policy, name) for name in ("num_denoising_steps", "n_action_steps")}
        act = noise_free_actor(policy, ChainSpec(policy.num_denoising_steps))
    return act, {"directory": str(policy_dir.resolve()), "sha256": sha256(weights_file(policy_dir)), **sizes}


def stock_actor(config: EvalConfig, policy_dir: Path) -> tuple[Act, int]:
    """Any other LeRobot policy that predicts chunks, by LeRobot's own loading and processors; its n_action_steps.

    One that draws noise (a diffusion policy) gives the same episodes again with the same number of environments only.
    """
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from reinflow_vla.base import lerobot_batch

    check_trusted(policy_dir)
    settings = PreTrainedConfig.from_pretrained(policy_dir, cli_overrides=[f"--device={config.acting.device}"])
    with no_remote_code():
        policy = get_policy_class(settings.type).from_pretrained(policy_dir, config=settings, strict=True).eval()
        before, after = make_pre_post_processors(settings, pretrained_path=str(policy_dir))
    steps = config.n_action_steps or settings.n_action_steps

    @torch.no_grad()
    def act(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
        torch.manual_seed(seeds[0] + decision)  # LeRobot draws one batch's noise from the global generator
        batch = before(lerobot_batch(observation, observation.get("pixels", {})))
        return after(policy.predict_action_chunk(batch))[:, :steps].double().numpy()

    return act, steps


def say_policy(identity: Mapping[str, Any]) -> str:
    """``DIRECTORY, weights 1a2b3c4d5e6f, K 4, 50 actions a chunk``."""
    k = f", K {identity['num_denoising_steps']}" if "num_denoising_steps" in identity else ""
    executed = f"{identity['n_action_steps']} actions a chunk"
    return f"{identity['directory']}, weights {identity['sha256'][:12]}{k}, {executed}"


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate one policy, print what came out, write eval_info.json, episodes.csv (and video.mp4)."""
    from rich.console import Console

    from reinflow.evaluate import evaluate_seeds, write_eval_info, write_rows

    check_config(config)
    policy_dir, out = find_policy(config.policy_path), Path(config.output_dir)
    if config.video and gym_world(policy_dir):
        raise ConfigError("video shows the arm; the policy acts in a Gymnasium environment: leave it out")
    refuse_task_of_the_arm(config, policy_dir)
    elsewhere = gym_world(policy_dir)
    make_env = partial(make_world, elsewhere or config.env)
    with made(out):
        print(f"task: {say_world(elsewhere)}" if elsewhere else which_task(config, policy_dir))
        act, identity = load_actor(config, policy_dir)
        print(f"policy: {say_policy(identity)}")
        result = evaluate_seeds(act, make_env, config.seed, config.episodes, config.num_parallel_envs)
        group = elsewhere.env_id if elsewhere else TASK_GROUP
        played = {"policy": identity, "task": say_world(elsewhere or config.env)}
        written = [
            write_eval_info(out / "eval_info.json", result.to_lerobot_info(group) | played),
            write_rows(out / "episodes.csv", result),
        ]
    show(result, Console(), 0.0 if elsewhere else config.env.control_hz or 50.0)
    for path in written:
        print(f"wrote {path}")
    if config.video:
        # Episodes depend on their seeds alone, so the video shows those that were counted.
        try:
            for path in record_video(config, act, result):
                print(f"wrote {path}")
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, it takes no result with it
            why = "stopped by hand" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
            raise UserError(
                f"the evaluation is kept in {out}, its video failed ({why or type(error).__name__}): go on without it, "
                "or film again by python -m reinflow_so101.commands.film"
            ) from error
        finally:
            write_eval_info(out / "eval_info.json", result.to_lerobot_info(group) | played)
    return result


def show(result: EvalResult, console: Console, control_hz: float) -> None:
    """What came out: the summary, how the failures ended, where they happened, and, with a rate, how fast it is."""
    from reinflow.regions import success_by_region, worst_region

    result.print(console)
    lines = []
    if result.objective == "success" and (worst := worst_region(result)):
        number = len(success_by_region(result))
        lines.append(
            f"worst region: {worst.describe(result.facts)}; the worst of {number}, chosen by these episodes, so it "
            "looks worse than it is"
        )
    lines += [result.pace(control_hz)] if control_hz else []
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def refuse_task_of_the_arm(config: EvalConfig, policy_dir: Path) -> None:
    """Raise ConfigError where --task is given to a policy that acts in a Gymnasium environment."""
    if config.task and gym_world(policy_dir):
        raise ConfigError(f"task={config.task} is of the arm; the policy acts in a Gymnasium environment: leave it out")


@contextlib.contextmanager
def made(directory: Path) -> Iterator[None]:
    """Make a directory first, so that nothing is played where nothing can be written; if nothing was, what had to be
    made is gone again."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()  # if it is empty
        raise


# --- A comparison -----------------------------------------------------------------------------------------------------


def run_compare(config: EvalConfig) -> Comparison:
    """Play several policies on the same seeds, print who won, write compare.json and compare.csv."""
    from rich.console import Console

    from reinflow_so101.commands import compare as contest

    check_config(config)
    out, directories = Path(config.output_dir), [find_policy(path, "compare") for path in config.compare]
    worlds = worlds_of(config, directories)
    with made(out):
        print(say_task(config, directories, worlds))
        settings = contest.Contest(
            say_world(worlds[0]), config.seed, config.episodes, config.num_parallel_envs, config.until
        )
        if isinstance(worlds[0], EnvConfig):
            print(contest.what_stops(settings) if config.until else contest.what_can_be_shown(config.episodes))
        names = contest.unique_names(config.compare)
        identities: dict[str, dict[str, Any]] = {}

        def load(name: str, path: Path, world: World) -> Act:
            act, identities[name] = load_actor(acting_in(config, world), path)
            print(f"{name}: {say_policy(identities[name])}")
            return act

        contenders = [
            contest.Contender(name, partial(load, name, path, world), partial(make_world, world))
            for name, path, world in zip(names, directories, worlds, strict=True)
        ]
        comparison = replace(contest.play(contenders, settings), identities=identities)
        written = contest.write(comparison, out)
    contest.show(comparison, Console())
    for path in written:
        print(f"wrote {path}")
    return comparison


def acting_in(config: EvalConfig, world: World) -> EvalConfig:
    """The settings of one of the policies, in its own environment."""
    return replace(config, env=world) if isinstance(world, EnvConfig) else config


def worlds_of(config: EvalConfig, directories: Sequence[Path]) -> list[World]:
    """The environment of each policy: one task, as each of them sees it.

    Raises:
        ConfigError: they were made for different tasks and no --task says which one is played, or one is of the arm
            and another is not.
    """
    gyms = [gym_world(directory) for directory in directories]
    for directory in directories:
        refuse_task_of_the_arm(config, directory)
    if any(gyms):
        if len(set(gyms)) > 1:
            acts = ", ".join(
                f"{name} in {say_world(gym) if gym else 'the arm'}"
                for name, gym in zip(config.compare, gyms, strict=True)
            )
            raise ConfigError(f"compare: the policies act in different environments ({acts}): name policies of one")
        if config.until:
            raise ConfigError("until counts successes, and this environment is judged by its return: leave it out")
        return [gym for gym in gyms if gym]
    own = [task_env_of(directory, config.task) for directory in directories]
    # What the flags say differs from the first policy's environment, which is what they were parsed over.
    said = {f.name: getattr(config.env, f.name) for f in fields(EnvConfig)}
    said = {name: value for name, value in said.items() if value != getattr(own[0], name)}
    envs = [replace(env, **said) for env in own]
    if len({describe(env) for env in envs}) > 1:
        tasks = "; ".join(
            f"{name}: {describe(env) if known_env(directory) else 'says of none'}"
            for name, env, directory in zip(config.compare, envs, directories, strict=True)
        )
        raise ConfigError(
            f"compare: the policies were made for different tasks ({tasks}): say which one all play by "
            f"--task {' | '.join(TASKS)}"
        )
    return [*envs]


def task_env_of(policy_dir: Path, task: str) -> EnvConfig:
    """The named task as a policy sees it; the policy's own without a name."""
    return env_of_task(policy_dir, task) if task else stored_env(policy_dir)


def say_task(config: EvalConfig, directories: Sequence[Path], worlds: Sequence[World]) -> str:
    """What all of them play, and at which rates where those differ."""
    first = worlds[0]
    if not isinstance(first, EnvConfig):
        return f"task: {say_world(first)}"
    lines = [which_task(replace(config, env=first), directories[0])]
    rates = [world.control_hz or 50.0 for world in worlds if isinstance(world, EnvConfig)]
    if len(set(rates)) > 1:
        each = ", ".join(f"{name} {rate:g}" for name, rate in zip(config.compare, rates, strict=True))
        lines.append(f"control steps a second, as each policy was made: {each}")
    return "\n".join(lines)


def which_task(config: EvalConfig, policy_dir: Path) -> str:
    """What is played and why, and a warning where it shows one scene only."""
    known = known_env(policy_dir)
    if config.task or known is None:
        why = "as --task says" if config.task else f"{policy_dir} says of no task; {how_to_choose()}"
    else:
        why = f"as {known[1]} says; {how_to_choose()}"
    lines = [f"task: {describe(config.env)}; {why}"]
    own = (known[0].control_hz or 50) if known else None
    if own and own != (config.env.control_hz or 50):
        lines.append(
            f"driven at {config.env.control_hz or 50:g} control steps a second; the policy was made for {own:g}"
        )
    if shows_one_scene(config.env) and config.episodes > 1:
        lines.append(
            f"warning: all {config.episodes} seeds show the same scene, so this is the success in one scene; "
            f"--task lift draws the block's place, --env.start-noise-deg the arm's pose"
        )
    return "\n".join(lines)


def record_video(config: EvalConfig, act: Act, result: EvalResult) -> list[Path]:
    """Play some of the episodes again for video.mp4 (and video.gif), failures first; the paths, the first of which the
    result gets too."""
    from reinflow.video import write_gif
    from reinflow_so101.films import film_episodes, mp4_bytes, stack

    ordered = sorted(result.episodes, key=lambda row: row.success)[: config.video_episodes]
    shown = sum(not row.success for row in ordered)
    failed = len(result.episodes) - result.num_successes
    print(
        f"video: {shown} of {failed} failures, {len(ordered) - shown} successes; seeds "
        f"{', '.join(str(row.seed) for row in ordered)}"
    )
    film = stack(film_episodes(act, config.env, [row.seed for row in ordered]))
    paths = [Path(config.output_dir) / "video.mp4"]
    paths[0].write_bytes(mp4_bytes(film))
    result.video_paths.append(str(paths[0]))
    if config.gif:
        rate = max(1, film.fps // 2)
        paths.append(write_gif(Path(config.output_dir) / "video.gif", film.frames[::2], fps=rate))
    return paths


def parse_args(argv: Sequence[str]) -> EvalConfig:
    """Flags; the environment's defaults come from the policy that --policy-path names, or --compare first."""
    path = flag_value(argv, "--policy-path", "--policy_path") or flag_value(argv, "--compare")
    task, env = flag_value(argv, "--task"), EnvConfig()
    if path and not gym_world(find_policy(path)):
        env = task_env_of(find_policy(path), task)
    default = EvalConfig(policy_path="", output_dir=tyro.MISSING, env=env)
    config = tyro.cli(EvalConfig, args=list(argv), default=default, description=__doc__, prog="reinflow-eval")
    return replace(config, episodes=MOST_UNTIL) if config.until and not flag_value(argv, "--episodes") else config


def run(config: EvalConfig) -> None:
    """Evaluate or compare.

    Raises:
        UserError: somebody stopped it before anything was finished, or before everything was.
    """
    try:
        if not config.compare:
            run_eval(config)
        elif run_compare(config).stopped:
            raise UserError(f"stopped by hand: what was finished is in {config.output_dir}")
    except KeyboardInterrupt as error:
        raise UserError("stopped by hand before anything was finished: nothing was written") from error


def main() -> None:
    """Console entry point."""
    run_command("reinflow-eval", lambda: run(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
