"""Films of the same seeds before and after training, side by side, as the page embeds them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from reinflow import ConfigError, UserError
from reinflow.checkpoint import stored_value
from reinflow.checksums import sha256
from reinflow.evaluate import EvaluationStopped
from reinflow.seeds import FIRST_REPORTING_SEED
from reinflow_so101.command_line import PATH_FIELDS, pick_device
from reinflow_so101.door import DoorSettings
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.report.episodes import choose, kind_of, kinds_of
from reinflow_so101.report.files import RunFiles
from reinflow_vla.directory import weights_file
from so101_sim.config import EnvConfig
from so101_sim.renderer import RenderError

if TYPE_CHECKING:
    from reinflow.env import Observation
    from reinflow.evaluate import Act
    from so101_sim.film import Film

POSTER_WIDTH = 560  # pixels, about what a laptop shows


@dataclass(frozen=True)
class Take:
    """A film as the page embeds it."""

    when: str  # before, after
    outcome: str
    mp4: str  # base64
    poster: str  # base64 jpeg of its end, which shows the outcome


@dataclass(frozen=True)
class ShownFilm:
    """One seed's films in the page."""

    seed: int
    kind: str  # what became of the seed
    takes: Sequence[Take]  # before and after, or after alone
    run: str  # its name
    remark: str = ""  # where the evaluations say otherwise

    @property
    def size(self) -> int:
        """Characters in the page."""
        return sum(len(take.mp4) + len(take.poster) for take in self.takes)


@dataclass(frozen=True)
class Films:
    """What could be filmed of a run, and what not, in words."""

    shown: Sequence[ShownFilm] = ()
    remark: str = ""


def played_env(config: Mapping[str, Any]) -> EnvConfig:
    """The arm's environment of a run's config.json, as its policy sees it."""
    blind = config.get("model_type") == "flow_mlp"
    names = {f.name for f in fields(EnvConfig)} & config.keys()
    values: dict[str, Any] = {name: tuple(v) if isinstance(v := config[name], list) else v for name in names}
    return EnvConfig(**values | {"joint_frame": "lerobot", "render_images": not blind, "environment_state": blind})


def named_start(run: RunFiles) -> str:
    """The policy that the run started from, as every command takes it: a directory or a hub id."""
    kind = str(run.config.get("model_type", "smolvla"))
    given = str(run.config.get(PATH_FIELDS[kind], "START"))
    return str(FAMILIES[kind].embedded_directory(given) or given)


def starting_policy(run: RunFiles) -> Path:
    """The directory of the policy that the run started from; raises UserError where it is gone or was changed."""
    kind, given = str(run.config["model_type"]), named_start(run)
    try:
        directory = FAMILIES[kind].directory(given)
        found = sha256(weights_file(directory))
    except OSError as error:
        raise UserError(f"the starting policy {given} is gone ({error})") from error
    policy = run.final_policy
    stored = str(stored_value(policy.parent, "start_weights") or "") if policy else ""
    if stored and found != stored:
        raise UserError(f"the starting policy {given} was changed since the run started from it")
    return directory


def actor(run: RunFiles, directory: Path, env: EnvConfig, own_door: bool, device: str) -> Act:
    """How the run's policy in ``directory`` acts without noise.

    Args:
        run: whose settings say how.
        directory: of the policy.
        env: that it acts in.
        own_door: take the run's cameras' names and statistics, which a checkpoint's own policy does not need.
        device: where it runs.
    """
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor

    config = run.config
    door = DoorSettings(**{f.name: config[f.name] for f in fields(DoorSettings) if own_door and f.name in config})
    acting = ActingSettings(
        device, int(config["num_denoising_steps"]), int(config["n_action_steps"]),
        str(config.get("pi0_tokenizer_path", "")), door, env.cameras, env.joint_frame,
    )  # fmt: skip
    with redirect_stdout(StringIO()):  # how the policy fits was said when the training started
        policy = FAMILIES[str(config["model_type"])].load(directory, acting)
    return noise_free_actor(policy, ChainSpec(policy.num_denoising_steps))


def seeds_to_film(run: RunFiles, most: int) -> list[int]:
    """Failures first; the first reporting seeds where there are no evaluations."""
    kinds = kinds_of(run.before, run.after) if run.before and run.after else {}
    if not kinds and (known := run.after or run.before):
        kinds = kinds_of(known)
    first = int(run.config.get("report_seed", FIRST_REPORTING_SEED))
    return list(choose(kinds, most)) or list(range(first, first + most))


def make_films(run: RunFiles, most: int, stopped: Callable[[], bool] = lambda: False) -> Films:
    """Films of at most so many seeds; without any, the remark says why.

    Args:
        run: is filmed.
        most: seeds.
        stopped: whether somebody asked to stop.
    """
    if run.is_gym:
        return Films(remark="a Gymnasium run has no films: only the arm's scene is filmed.")
    if run.final_policy is None:
        return Films(remark="no films: the run has no checkpoint yet.")
    try:
        return _play(run, most, stopped)
    except EvaluationStopped:
        return Films(remark="no films: a signal stopped them; reinflow-report makes them.")
    except (UserError, OSError, ValueError, RuntimeError) as error:  # no OpenGL, no memory, a policy that is gone
        return Films(remark=f"no films: {' '.join(str(error).split())}")


def run_device(config: Mapping[str, Any]) -> tuple[str, str]:
    """Where the run's policy acts: on the run's own device, else on what there is, with a remark that says so."""
    wanted = str(config.get("device", "auto"))
    try:
        return pick_device(wanted), ""
    except ConfigError:
        found = pick_device("auto")
        return found, f"filmed on {found}, as the run's device ({wanted}) is not here: last digits differ."


def _play(run: RunFiles, most: int, stopped: Callable[[], bool]) -> Films:
    from reinflow_so101.films import film_episodes

    def film(directory: Callable[[], Path], when: str) -> list[Film]:
        if stopped():
            raise EvaluationStopped
        act = actor(run, directory(), env, when == "before", device)

        def act_or_stop(observation: Observation, seeds: Sequence[int], decision: int) -> Any:
            if stopped():
                raise EvaluationStopped
            return act(observation, seeds, decision)

        return film_episodes(act_or_stop, env, seeds, when)

    final = run.final_policy
    assert final
    seeds, env = seeds_to_film(run, most), played_env(run.config)
    device, remark = run_device(run.config)
    films: dict[str, list[Film]] = {}
    try:
        films["before"] = film(lambda: starting_policy(run), "before")
    except RenderError:  # what cannot be drawn before cannot be after
        raise
    except UserError as error:
        remark = "; ".join(filter(None, (f"after training only: {error}", remark)))
    films["after"] = film(lambda: final, "after")
    shown = [_shown(run, {when: of[index] for when, of in films.items()}) for index in range(len(seeds))]
    return Films(shown, remark)


def _shown(run: RunFiles, films: Mapping[str, Film]) -> ShownFilm:
    """A seed's films for the page: what they show, and where the evaluations have it otherwise."""
    after, before = films["after"], films.get("before")
    differing = []
    for when, film in films.items():
        result = run.before if when == "before" else run.after
        row = next((row for row in result.episodes if row.seed == film.seed), None) if result else None
        if row and (row.success, row.outcome or film.outcome) != (film.success, film.outcome):
            differing.append(f"{when}: {_ended(row.outcome, row.success)}")
    remark = f"the evaluation has it otherwise, {'; '.join(differing)}" if differing else ""
    kind = kind_of(before.success if before else None, after.success)
    return ShownFilm(after.seed, kind, [_take(when, film) for when, film in films.items()], run.name, remark)


def _ended(outcome: str, success: bool) -> str:
    """How an episode ended, in words."""
    return (outcome or ("success" if success else "failure")).replace("_", " ")


def _take(when: str, film: Film) -> Take:
    from reinflow_so101.films import mp4_bytes

    picture = Image.fromarray(film.frames[-1])
    picture.thumbnail((POSTER_WIDTH, POSTER_WIDTH))
    poster = BytesIO()
    picture.save(poster, "JPEG", quality=75)
    encoded = (base64.b64encode(content).decode() for content in (mp4_bytes(film), poster.getvalue()))
    return Take(when, _ended(film.outcome, film.success), *encoded)


def within(films: Sequence[ShownFilm], room: int) -> tuple[list[ShownFilm], str]:
    """The films that fit into so many characters, in their order, and a remark on those that do not."""
    kept, used = [], 0
    for film in films:
        if used + film.size <= room:
            kept.append(film)
            used += film.size
    if len(kept) == len(films):
        return kept, ""
    seeds = ", ".join(str(film.seed) for film in films if film not in kept)
    return kept, f"left out, since this file may have 10 MB at most: the films of seeds {seeds}."
