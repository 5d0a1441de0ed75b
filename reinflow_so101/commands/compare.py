"""The comparison behind reinflow-eval --compare: several policies on the same seeds, each against the first.

An episode's start and the policy's first noise follow from its seed, so what differs between two episodes of a seed is
the policy. It knows neither how a policy is loaded nor where it acts; commands/evaluate.py tells it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reinflow.paired import (
    ALPHA,
    POWER,
    Paired,
    PairedReturns,
    compare,
    compare_results,
    smallest_difference,
)
from reinflow.sequential import (
    A_BETTER,
    B_BETTER,
    GO_ON,
    NO_DIFFERENCE,
    SEQUENTIAL_ALPHA,
    SEQUENTIAL_POWER,
    Monitor,
    Sequential,
)

if TYPE_CHECKING:
    from reinflow.env import ChunkVectorEnv
    from reinflow.evaluate import Act, EvalResult

JSON_FILE, CSV_FILE = "compare.json", "compare.csv"
FEW_EPISODES = 200  # fewer show differences of more than 6 points only, where one pair in ten is discordant
SHARES = (0.05, 0.1, 0.2, 0.4)  # of discordant pairs, to say what N can show before anything is known
SEEDS_SHOWN = 12


@dataclass(frozen=True)
class Contender:
    """One of the policies, under the name it is shown by."""

    name: str
    load: Callable[[], Act]
    make_env: Callable[[int], ChunkVectorEnv]  # the task as this policy sees it


@dataclass(frozen=True)
class Contest:
    """What is played."""

    task: str  # in words, without why it is played
    seed: int  # the first
    episodes: int  # with ``until`` at most
    num_parallel_envs: int
    until: float = 0.0  # difference to show or to rule out; 0 plays all episodes


@dataclass(frozen=True)
class Comparison:
    """Results by the contenders' names, the first one's first, and how a sequential comparison ended."""

    contest: Contest
    results: Mapping[str, EvalResult]
    verdict: str = ""
    stopped: str = ""  # what somebody's Ctrl-C left out
    identities: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # which policies they are, by name

    @property
    def pairs(self) -> dict[str, Paired | PairedReturns]:
        """Every other contender against the first, by its name."""
        first, *others = self.results
        return {name: compare_results(self.results[first], self.results[name]) for name in others}


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that were there before."""
    seen: list[str] = []
    for name in names:
        number = next(n for n in range(1, len(names) + 1) if (name if n == 1 else f"{name} ({n})") not in seen)
        seen.append(name if number == 1 else f"{name} ({number})")
    return seen


# --- What the episodes can show ---------------------------------------------------------------------------------------


def what_can_be_shown(episodes: int) -> str:
    """Lines on the smallest difference that so many episodes show."""
    found = ((share, smallest_difference(episodes, share)) for share in SHARES)
    told = "; ".join(
        f"{100 * share:.0f} %: {f'{100 * least:.1f} points' if least else 'none'}" for share, least in found
    )
    line = (
        f"the smallest difference that {episodes:,} episodes show (p < {ALPHA:.2g} in {POWER:.0%} of comparisons), by "
        f"the share of seeds that one policy wins alone: {told}"
    )
    few = f"warning: fewer than {FEW_EPISODES} episodes show large differences only: --episodes 500 or more"
    return f"{line}\n{few}" if episodes < FEW_EPISODES else line


def what_stops(contest: Contest) -> str:
    """Lines on when a sequential comparison ends."""
    test = Sequential(contest.until)
    shares = [share for share in SHARES if share >= contest.until] or [contest.until]
    longest = "; ".join(f"{100 * share:.0f} %: {test.most_episodes(share):,}" for share in shares)
    line = (
        f"plays until a difference is shown or one of {100 * contest.until:.3g} points is ruled out (error rates "
        f"{SEQUENTIAL_ALPHA:.0%} and {1 - SEQUENTIAL_POWER:.0%}), {contest.episodes:,} episodes at most; the most that "
        f"it needs, by the share of seeds that one policy wins alone: {longest}"
    )
    if contest.episodes < test.most_episodes(shares[0]):
        line += "\nwarning: --episodes stops it before that, so it may end undecided"
    return line


# --- Playing ----------------------------------------------------------------------------------------------------------


def play(contenders: Sequence[Contender], contest: Contest) -> Comparison:
    """All episodes of every contender, one contender after the other; or with ``until`` batches of both.

    Ctrl-C ends it with what was finished until then, and says so in ``stopped``.

    Raises:
        KeyboardInterrupt: nothing was finished.
    """
    if contest.until:
        return _play_until(contenders, contest)
    from reinflow.evaluate import evaluate_seeds

    results: dict[str, EvalResult] = {}
    try:
        for contender in contenders:
            results[contender.name] = evaluate_seeds(
                contender.load(), contender.make_env, contest.seed, contest.episodes, contest.num_parallel_envs,
                label=f"{contender.name}, episodes",
            )  # fmt: skip
    except KeyboardInterrupt:
        if not results:
            raise
        missing = ", ".join(contender.name for contender in contenders if contender.name not in results)
        return Comparison(contest, results, stopped=f"stopped by hand: {missing} not finished, so left out")
    return Comparison(contest, results)


def _play_until(contenders: Sequence[Contender], contest: Contest) -> Comparison:
    import torch

    from reinflow.evaluate import EvalResult, evaluate
    from reinflow.progress import progress_bar

    monitor, results, verdict = Monitor(Sequential(contest.until)), dict[str, EvalResult](), GO_ON
    known, stopped = 0.0, ""
    size = min(contest.num_parallel_envs, contest.episodes)
    with ExitStack() as stack, torch.no_grad():
        sides = [(c.name, c.load(), stack.enter_context(c.make_env(size))) for c in contenders]
        advance = stack.enter_context(progress_bar("comparison, % of the longest", 100))
        for first in range(0, contest.episodes, size):
            seeds = range(contest.seed + first, contest.seed + min(first + size, contest.episodes))
            try:
                batches = {name: evaluate(act, env, seeds, label=f"{name}, episodes") for name, act, env in sides}
            except KeyboardInterrupt:
                if not results:
                    raise
                stopped = "stopped by hand: a batch that was not finished is left out"
                break
            results = {name: joined(results[name], new) if results else new for name, new in batches.items()}
            paired = compare(*(result.episodes for result in results.values()))
            verdict = monitor.look(paired.episodes, paired.only_b, paired.only_a)
            known, before = monitor.information, known
            advance(100 * (known - before), f"{paired.episodes:,} seeds, won {paired.only_b}, lost {paired.only_a}")
            if verdict != GO_ON:
                break
    if stopped:
        played = len(next(iter(results.values())).episodes)
        said = f"undecided, stopped: {played:,} episodes neither show a difference nor rule out one of {_size(contest)}"
        return Comparison(contest, results, said, stopped)
    return Comparison(contest, results, _say_verdict(verdict, [c.name for c in contenders], contest))


def joined(a: EvalResult, b: EvalResult) -> EvalResult:
    """The episodes of both, of one policy in one environment."""
    return replace(
        a, episodes=a.episodes + b.episodes, elapsed_s=a.elapsed_s + b.elapsed_s,
        broken_seeds=a.broken_seeds + b.broken_seeds,
    )  # fmt: skip


def _size(contest: Contest) -> str:
    return f"{100 * contest.until:.3g} points"


def _say_verdict(verdict: int, names: Sequence[str], contest: Contest) -> str:
    size, found = _size(contest), f"{SEQUENTIAL_POWER * 10:.0f} of 10 comparisons"
    return {
        B_BETTER: f"stopped: {names[1]} is better than {names[0]}",
        A_BETTER: f"stopped: {names[0]} is better than {names[1]}",
        NO_DIFFERENCE: f"stopped: a difference of {size} is ruled out, it would have been shown in {found}",
        GO_ON: f"undecided: {contest.episodes:,} episodes neither show a difference nor rule out one of {size}",
    }[verdict]


# --- Telling ----------------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Every policy's result, every pair's table, and which seeds changed."""
    first = next(iter(comparison.results))
    for name, result in comparison.results.items():
        console.print(f"{name}: {result.summary()}", highlight=False, markup=False, soft_wrap=True)
    for name, paired in comparison.pairs.items():
        if isinstance(paired, Paired):
            _show_pair(paired, first, name, console)
        console.print(paired.summary(first, name), highlight=False, markup=False, soft_wrap=True)
        if isinstance(paired, Paired):
            for line in _hindsight(paired, bool(comparison.verdict)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(comparison.pairs) > 1:
        console.print(
            f"{len(comparison.pairs)} comparisons with {first}: their p are not corrected for their number; multiply "
            "the smallest by it", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    for line in filter(None, (comparison.stopped, comparison.verdict)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_pair(paired: Paired, a: str, b: str, console: Console) -> None:
    a, b = escape(a), escape(b)
    table = Table("", f"{b} succeeds", f"{b} fails", title=f"the same {paired.episodes} seeds")
    table.add_row(f"{a} succeeds", str(paired.both), str(paired.only_a))
    table.add_row(f"{a} fails", str(paired.only_b), str(paired.neither))
    console.print(table)


def _hindsight(paired: Paired, stopped_early: bool) -> list[str]:
    """Which seeds changed, and what so many episodes can show now that the discordant share is known."""
    lines = [
        f"  {what} {len(seeds)}: {' '.join(map(str, seeds[:SEEDS_SHOWN]))}{' ...' if len(seeds) > SEEDS_SHOWN else ''}"
        for what, seeds in (("won", paired.won), ("lost", paired.lost))
        if seeds
    ]
    if stopped_early:
        return [
            *lines,
            "  interval and p are those of a fixed number; stopping early makes a shown difference look large",
        ]
    if paired.discordant:
        least = smallest_difference(paired.episodes, paired.discordant)
        shown = f"{100 * least:.1f} points" if least else "nothing"
        lines.append(
            f"  {100 * paired.discordant:.1f} % of the pairs are won by one alone: with that, {paired.episodes:,} "
            f"episodes show {shown} in {POWER:.0%} of comparisons"
        )
    return lines


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Write compare.json and compare.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = directory / JSON_FILE, directory / CSV_FILE
    as_json.write_text(json.dumps(_content(comparison), indent=2) + "\n", encoding="utf-8")
    by_return = any(result.objective == "return" for result in comparison.results.values())
    columns = [
        [row.return_ if by_return else int(row.success) for row in result.episodes]
        for result in comparison.results.values()
    ]
    seeds = [row.seed for row in next(iter(comparison.results.values())).episodes]
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", *comparison.results])
        writer.writerows(zip(seeds, *columns, strict=True))
    return [as_json, as_csv]


def _content(comparison: Comparison) -> dict[str, Any]:
    first = next(iter(comparison.results))
    rows = comparison.results[first].episodes
    policies = [
        {
            "name": name, "n_episodes": len(result.episodes), "pc_success": 100 * result.success_rate,
            "pc_success_ci95": [100 * end for end in result.interval], "avg_sum_reward": result.return_mean,
            "broken_seeds": list(result.broken_seeds), **comparison.identities.get(name, {}),
        }
        for name, result in comparison.results.items()
    ]  # fmt: skip
    return {
        **asdict(comparison.contest),
        "seeds": [rows[0].seed, rows[-1].seed],  # the first and the last that were played
        "policies": policies,
        "pairs": [{"a": first, "b": name, **_pair(paired)} for name, paired in comparison.pairs.items()],
        **({"verdict": comparison.verdict} if comparison.verdict else {}),
        **({"stopped": comparison.stopped} if comparison.stopped else {}),
    }


def _pair(paired: Paired | PairedReturns) -> dict[str, Any]:
    common = {"difference": paired.difference, "difference_ci95": list(paired.interval), "p_value": paired.p_value}
    if isinstance(paired, PairedReturns):
        return common
    counts = {name: getattr(paired, name) for name in ("both", "only_a", "only_b", "neither")}
    return counts | common | {"won_seeds": list(paired.won), "lost_seeds": list(paired.lost)}
