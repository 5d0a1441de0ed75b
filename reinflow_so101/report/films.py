"""Films of the same seeds before and after training, side by side, as the page embeds them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from reinflow import UserError
from reinflow.checkpoint import stored_value
from reinflow.checksums import sha256
from reinflow_so101.command_line import PATH_FIELDS, pick_device
from reinflow_so101.door import DoorSettings
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.report.episodes import choose, pairs_of
from reinflow_so101.report.files import RunFiles
from reinflow_vla.directory import weights_file
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
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


def seeds_to_film(run: RunFiles, most: int) -> dict[int, str]:
    """Seed -> what became of it, failures first; the first reporting seeds where there are no two evaluations."""
    if run.before and run.after and (pairs := pairs_of(run.before, run.after)):
        return {pair.after.seed: pair.kind for pair in choose(pairs, most)}
    first = int(run.config.get("report_seed", 10_000))
    return {first + number: "" for number in range(most)}


def make_films(run: RunFiles, most: int) -> Films:
    """Films of at most so many seeds; without any, the remark says why."""
    if run.is_gym:
        return Films(remark="a Gymnasium run has no films: only the arm's scene is filmed.")
    if run.final_policy is None:
        return Films(remark="no films: the run has no checkpoint yet.")
    try:
        return _play(run, most)
    except (UserError, OSError, ValueError, RuntimeError) as error:  # no OpenGL, no memory, a policy that is gone
        return Films(remark=f"no films: {' '.join(str(error).split())}")


def _play(run: RunFiles, most: int) -> Films:
    from reinflow_so101.films import film_episodes

    chosen = seeds_to_film(run, most)
    seeds, env = list(chosen), played_env(run.config)
    device = pick_device("auto")
    remark, befores = "", []
    try:
        befores = film_episodes(actor(run, starting_policy(run), env, True, device), env, seeds, "before")
    except UserError as error:
        remark = f"after training only: {error}."
    assert run.final_policy
    afters = film_episodes(actor(run, run.final_policy, env, False, device), env, seeds, "after")
    shown = []
    for index, (seed, after) in enumerate(zip(seeds, afters, strict=True)):
        takes = [("before", befores[index])] if befores else []
        takes.append(("after", after))
        encoded = [_take(when, film) for when, film in takes]
        shown.append(ShownFilm(seed, chosen[seed] or _kind(takes[0][1], after), encoded, run.name))
    return Films(shown, remark)


def _take(when: str, film: Film) -> Take:
    from reinflow_so101.films import mp4_bytes

    ended = film.outcome or ("success" if film.success else "failure")
    picture = Image.fromarray(film.frames[-1])
    picture.thumbnail((POSTER_WIDTH, POSTER_WIDTH))
    poster = BytesIO()
    picture.save(poster, "JPEG", quality=75)
    encoded = (base64.b64encode(content).decode() for content in (mp4_bytes(film), poster.getvalue()))
    return Take(when, ended.replace("_", " "), *encoded)


def _kind(before: Film, after: Film) -> str:
    """What became of a seed that no evaluation played; the same film twice where there is none before."""
    if before is after:
        return "succeeds" if after.success else "fails"
    words = {(False, False): "still failing", (True, False): "lost", (False, True): "won", (True, True): "kept"}
    return words[before.success, after.success]


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
