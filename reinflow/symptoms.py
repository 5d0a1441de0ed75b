"""What the doctor's rules look for: one pure function per symptom, over the rows of metrics.jsonl and the config.

A check wants several iterations of evidence, so that a healthy run stays silent, and says nothing when a metric that
it reads was not logged. What the symptoms mean and what helps is said in reinflow/doctor.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, Literal

from reinflow.metrics import REWARD_FAMILY

# --- Thresholds: every figure that decides whether a rule fires -------------------------------------------------------

RECENT = 5  # iterations that are averaged: one bad update is no finding
OFTEN = 0.6  # share of the recent iterations in which an event counts as "again and again"
RATIO_ERROR = 1e-4  # the learner's own guard; float32 rounding gives 1e-6
ENTROPY_GAP = 0.3  # nats; even a single decision with 30 coordinates has a standard error of only .13
PAPER_DIMENSIONS, PAPER_SIGMA = 28, 0.1  # the setting that the paper's clip and learning rates are tuned for
SUM_STIFFNESS = 2 * PAPER_DIMENSIONS / PAPER_SIGMA**2  # D / sigma^2 of a ratio: twice the paper's 2,800
CRITIC_WINDOW = 15  # iterations over which targets may swing; the recorded run took 10 from peak to trough
CRITIC_MIN = 8  # the first iterations of a critic move its targets anyway
CRITIC_SWING = 0.5  # of the spread of episode returns; .02 in the healthy run, .7 in the one that fed on itself
WEAK_START = 0.1  # below one success in ten most rollouts teach PPO nothing
WEAK_EPISODES = 50  # at a true success of 20 %, 50 episodes show less than 10 % in 1 run of 50
BOUND_MARGIN = 0.05  # of the range: noise starts in its middle, and tanh needs a large push to come this near
RATIO_LIMIT = 10.0  # a KL of .1 over 30,000 ratios still stays below 8
CLIP_FRACTION = 0.5  # the other half of the data still says where to go; healthy is .05 to .3
GRADIENT_EXCESS = 20.0  # times grad_clip_norm: 5 is usual with the seed's .25, 270 was recorded in the cascade
SURROGATE_LOSS = (
    2e-3  # a pass starts at 0 exactly and good steps go below; .010 and .014 were measured with undone work
)
SHIFT_EXCESS = 2.0  # times value_clip_epsilon, which bounds what one iteration can mend
EXPLAINED_VARIANCE = 0.05  # 0 is a constant; .12 to .3 was enough to learn
CAMPING_ITERATIONS = 15  # three windows of RECENT: a start, time to move, an end
CAMPING_SIGMAS = 3.0  # standard errors that the return must have risen by
CAMPING_RISE = 0.1  # of the spread of targets: significant is not yet relevant
FLAT_SUCCESS = 0.03  # about the noise of 192 episodes
SOLVED = 0.9  # above, a rising return is a faster success
SUCCESS_GAP = 0.3  # .2 is usual at the start of a healthy run, and shrinks
GAP_EVALUATIONS = 2  # evaluations are few
WEIGHTS_MOVED = (
    0.5  # a step in fp32 changes all but the largest weights (.99 and more); in bf16 .05 to .45 was measured
)
REACH = 1.0  # noise stds: whom a whole run cannot take that far is hardly told from where it began, by any decision
SETTLED_LR = 0.5  # of policy_lr: below, a schedule holds the steps back on purpose
FEW_EPISODES = 64  # a step; measured noise scales are 450 episodes and more, so that 7 of 8 parts of it are noise
SIGNAL_SHARE = 0.1  # of a step's squared gradient; means over some iterations are known to about .05
SIGNAL_WINDOW, SIGNAL_MIN = 10, 6  # single shares scatter by .1 and more
PENALTY_SHARE = 0.5  # of what failing safely earns more: less of it, and the penalty is not what makes it so
AGAINST_MIN = 6  # iterations: a third at the start against a third at the end
AGAINST_SIGMAS = 3.0  # standard errors by which the return must have risen and success fallen


# --- What rules read and return ---------------------------------------------------------------------------------------

Severity = Literal["error", "warning"]
Rows = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Symptom:
    """A rule's catch: the figures, and the values that its remedy template names."""

    evidence: str
    values: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity = "warning"


class MissingSetting(KeyError):
    """A rule reads a setting that the run does not have: another algorithm, or another version of this one."""


class Settings(dict[str, Any]):
    """A run's config.json; remembers what rules asked for and it does not have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.absent: set[str] = set()

    def __missing__(self, name: str) -> Any:
        self.absent.add(name)
        raise MissingSetting(name)


class History:
    """Rows and config, with the few questions that rules ask. A value that is null or absent is not there."""

    def __init__(self, rows: Rows, config: Mapping[str, Any]):
        self.rows, self.config = list(rows), Settings(config)
        self.starved = False  # whether some rule asked for more iterations or metrics than there are
        self.updates = [row for row in self.rows if row.get("ppo/optimizer_steps") is not None]

    def last(self, count: int, minimum: int, *names: str, updates: bool = False) -> list[Any]:
        """The newest ``count`` rows that hold all of ``names``; none if fewer than ``minimum`` do.

        With ``updates`` only iterations that moved the policy count (no critic warm-up).
        """
        rows = self.updates if updates else self.rows
        complete = [row for row in rows if all(row.get(name) is not None for name in names)]
        if len(complete) < minimum:
            self.starved = True
            return []
        return complete[-count:]


def span(rows: Sequence[Mapping[str, float]]) -> str:
    """Which iterations the evidence is from."""
    first, last = rows[0]["progress/iteration"], rows[-1]["progress/iteration"]
    return f"iteration {first:.0f}" if first == last else f"iterations {first:.0f}-{last:.0f}"


def values_of(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """One metric's column."""
    return [row[name] for row in rows]


# --- The rules, causes first ------------------------------------------------------------------------------------------


def ratio_off_one(h: History) -> Symptom | None:
    name = "ppo/ratio_error_before_update"
    rows = h.last(RECENT, 1, name)
    worst = max(values_of(rows, name), default=0.0)
    if worst <= RATIO_ERROR:
        return None
    return Symptom(f"{span(rows)}: |ratio - 1| up to {worst:.1e}, allowed {RATIO_ERROR:.0e}", severity="error")


def log_prob_off_entropy(h: History) -> Symptom | None:
    rows = h.last(RECENT, 3, "logprob/per_dimension", "loss/entropy", updates=True)
    gap = fmean(r["logprob/per_dimension"] + r["loss/entropy"] for r in rows) if rows else 0.0
    if abs(gap) <= ENTROPY_GAP:
        return None
    got, entropy = (fmean(values_of(rows, name)) for name in ("logprob/per_dimension", "loss/entropy"))
    evidence = f"{span(rows)}: log-prob of own samples {got:+.2f} per coordinate, -entropy is {-entropy:+.2f}"
    return Symptom(evidence, severity="error")


def weights_stay(h: History) -> Symptom | None:
    rows = h.last(RECENT, 2, "ppo/weights_moved", updates=True)
    if not rows or fmean(values_of(rows, "ppo/weights_moved")) >= WEIGHTS_MOVED:
        return None
    share = fmean(values_of(rows, "ppo/weights_moved"))
    return Symptom(
        f"{span(rows)}: {share:.1%} of the weights that have a gradient changed in an update", severity="error"
    )


def summed_log_prob(h: History) -> Symptom | None:
    rows = h.last(RECENT, 3, "logprob/per_dimension", "logprob/coordinates", "noise/std_mean", updates=True)
    reduction = h.config.get("log_prob_reduction", "chunk")
    if not rows or reduction == "mean":
        return None
    per_dim, dims, sigma = (
        fmean(values_of(rows, n)) for n in ("logprob/per_dimension", "logprob/coordinates", "noise/std_mean")
    )
    if per_dim <= 0 or dims / sigma**2 <= SUM_STIFFNESS:
        return None
    factor = math.sqrt(dims / PAPER_DIMENSIONS)
    bounds = {name: rows[-1].get(f"noise/{name}", sigma) * factor for name in ("sigma_min", "sigma_max")}
    values = {**bounds, "reduction": reduction}
    evidence = (
        f"{span(rows)}: log-prob {per_dim:+.2f} per coordinate at sigma {sigma:.3f}, {dims:.0f} coordinates in one "
        f"ratio: the sum is {per_dim * dims:+.0f}, and D / sigma^2 = {dims / sigma**2:,.0f} against "
        f"{PAPER_DIMENSIONS / PAPER_SIGMA**2:,.0f} in the paper"
    )
    suffers = any(rule(h) for rule in (kl_stop_at_once, steps_undone, ratio_extremes, clip_fraction, gradient_excess))
    return Symptom(evidence, values, "error" if suffers else "warning")


def critic_feeds_on_itself(h: History) -> Symptom | None:
    if h.config.get("time_limit_is_terminal", False):
        return None
    names = ("critic/return_mean", "critic/return_std", "rollout/return_mean")
    rows = h.last(CRITIC_WINDOW, CRITIC_MIN, *names, updates=True)
    if not rows:
        return None
    targets, returns = (values_of(rows, n) for n in (names[0], names[2]))
    measured = all(row.get("critic/reward_to_go_mean") is not None for row in rows)
    explained = values_of(rows, "critic/reward_to_go_mean") if measured else explained_by(returns, targets)
    gaps = [t - e for t, e in zip(targets, explained, strict=True)]
    smooth = [median(gaps[i : i + 3]) for i in range(len(gaps) - 2)]
    swing = max(smooth) - min(smooth)
    spread = [row.get("rollout/return_std") or row["critic/return_std"] for row in rows]
    scale = max(median(spread), 0.25 * abs(fmean(returns)))
    if swing <= CRITIC_SWING * scale:
        return None
    evidence = (
        f"{span(rows)}: mean target between {min(targets):.2f} and {max(targets):.2f} while episodes returned "
        f"{min(returns):.2f} to {max(returns):.2f}; {swing:.2f} of that swing is not in the rewards "
        f"(spread of returns {scale:.2f})"
    )
    bootstraps = [row["critic/bootstrap_mean"] for row in rows if row.get("critic/bootstrap_mean") is not None]
    if bootstraps:
        evidence += f"; V(final observation) averaged {min(bootstraps):.2f} to {max(bootstraps):.2f}"
    return Symptom(evidence, severity="error")


def explained_by(returns: Sequence[float], targets: Sequence[float]) -> list[float]:
    """The part of the mean targets that moves with the episodes' mean return: a straight line.

    Its slope is kept in [0, 1]: a decision's reward-to-go is a discounted part of its episode's return.
    """
    x, y = fmean(returns), fmean(targets)
    variance = sum((r - x) ** 2 for r in returns)
    covariance = sum((r - x) * (t - y) for r, t in zip(returns, targets, strict=True))
    slope = min(max(covariance / variance, 0.0), 1.0) if variance else 0.0
    return [y + slope * (r - x) for r in returns]


def weak_start(h: History) -> Symptom | None:
    name = "rollout/success_rate"
    done = [(row["progress/iteration"], row["progress/episodes"]) for row in h.last(1, 1, "progress/episodes")]
    per_iteration = max(done[0][1] / max(done[0][0], 1), 1) if done else WEAK_EPISODES
    count = max(3, math.ceil(WEAK_EPISODES / per_iteration))
    rows = h.last(len(h.rows), 2 * count, name)
    first, last = rows[:count], rows[-count:]
    # Rollouts up to the first update show the start alone; a run that collapses afterwards had a better one.
    untouched = [
        row for row in rows if not h.updates or row["progress/iteration"] <= h.updates[0]["progress/iteration"]
    ] or first
    if not rows or max(fmean(values_of(part, name)) for part in (untouched, first, last)) >= WEAK_START:
        return None
    evaluated = [rate for row in h.rows if (rate := row.get("eval/success_rate")) is not None]
    if max(evaluated, default=0.0) >= WEAK_START:
        return None
    noise_free = f", noise-free {evaluated[0]:.1%} at first" if evaluated else ""
    evidence = (
        f"{fmean(values_of(first, name)):.1%} of the episodes succeeded in {span(first)}, "
        f"{fmean(values_of(last, name)):.1%} in {span(last)}{noise_free}"
    )
    return Symptom(evidence, severity="error")


def too_few_episodes(h: History) -> Symptom | None:
    names = ("gradients/signal_share", "progress/episodes", "progress/iteration")
    rows = h.last(SIGNAL_WINDOW, SIGNAL_MIN, *names, updates=True)
    if not rows:
        return None
    episodes, signal = rows[-1][names[1]] / max(rows[-1][names[2]], 1), fmean(values_of(rows, names[0]))
    if episodes >= FEW_EPISODES or signal >= SIGNAL_SHARE:
        return None
    evidence = (
        f"{span(rows)}: {episodes:.0f} episodes an iteration, {max(signal, 0):.1%} of a step's squared gradient is "
        "signal"
    )
    return Symptom(evidence, {"episodes": FEW_EPISODES * math.ceil(4 * episodes / FEW_EPISODES)})


def noise_at_bound(h: History) -> Symptom | None:
    names = ("noise/std_mean", "noise/sigma_min", "noise/sigma_max")
    rows = h.last(RECENT, RECENT, *names, updates=True)
    if not rows or not h.config.get("train_noise_head", True):
        return None
    places = [(r[names[0]] - r[names[1]]) / max(r[names[2]] - r[names[1]], 1e-9) for r in rows]
    if any(r[names[1]] == r[names[2]] for r in rows):
        return None
    upper = min(places) > 1 - BOUND_MARGIN
    if not upper and max(places) >= BOUND_MARGIN:
        return None
    low, high = rows[-1][names[1]], rows[-1][names[2]]
    bound, value = ("sigma_max", 1.5 * high) if upper else ("sigma_min", low / 1.5)
    evidence = f"{span(rows)}: std {rows[-1][names[0]]:.3f} in [{low:.3f}, {high:.3f}], at {bound}"
    return Symptom(evidence, {"bound": bound, "value": value})


def nothing_moves(h: History) -> Symptom | None:
    names = ("ppo/decision_kl", "ppo/steps_undone", "lr/policy", "progress/iteration")
    rows = [r for r in h.last(RECENT, 3, *names, updates=True) if not r[names[1]]]
    rows = [r for r in rows if r[names[2]] >= SETTLED_LR * h.config["policy_lr"]]
    counted, budget = (
        ("timesteps", "total_timesteps") if h.config.get("total_timesteps") else ("episodes", "num_episodes")
    )
    done = h.rows[-1].get(f"progress/{counted}") if h.rows else None
    if len(rows) < 3 or not done:
        h.starved |= not done
        return None
    step = math.sqrt(2 * max(median(values_of(rows, names[0])), 0.0))
    iterations = h.config[budget] * h.rows[-1]["progress/iteration"] / done
    if step * iterations >= REACH:
        return None
    evidence = (
        f"{span(rows)}: an iteration moves a decision by {step:.1e} noise stds, all {iterations:.0f} of the run by "
        f"{step * iterations:.2f} at most"
    )
    return Symptom(evidence, {"lr": h.config["policy_lr"] * min(0.3 / max(step, 1e-9), 100.0)}, "error")


def kl_stop_at_once(h: History) -> Symptom | None:
    names = ("ppo/early_stopped", "ppo/optimizer_steps", "ppo/epochs_done", "ppo/approx_kl")
    rows = h.last(RECENT, RECENT, *names, updates=True)
    # A config that plans one step per rollout stops after it anyway.
    planned = [h.config["num_ppo_epochs"] * r[names[1]] / r[names[2]] for r in rows]
    stops = [r[names[0]] == 1 and r[names[1]] == 1 and p > 1.5 for r, p in zip(rows, planned, strict=True)]
    if not rows or fmean(stops) < OFTEN:
        return None
    kl, target = median(values_of(rows, names[3])), h.config["target_kl"]
    lr = h.config["policy_lr"] * math.sqrt(target / kl)  # KL grows with the square of the step
    evidence = (
        f"{span(rows)}: {sum(stops)} of {len(rows)} updates stopped after step 1 of {planned[-1]:.0f}, median KL "
        f"{kl:.2g}, target_kl {target}"
    )
    return Symptom(evidence, {"lr": lr})


def steps_undone(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "ppo/steps_undone", "lr/policy", updates=True)
    if not rows or fmean(values_of(rows, "ppo/steps_undone")) < OFTEN:
        return None
    undone, lr = sum(values_of(rows, "ppo/steps_undone")), rows[-1]["lr/policy"]
    evidence = f"{span(rows)}: {undone:.0f} of {len(rows)} iterations took a step back; the rate is down to {lr:.1e}"
    return Symptom(evidence, {"lr": lr / 2})


def ratio_extremes(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "ppo/ratio_min", "ppo/ratio_max", updates=True)
    # Those near 0 do no harm: their share of the loss is small, and beyond the clip they have no gradient.
    wild = [r["ppo/ratio_max"] > RATIO_LIMIT for r in rows]
    if not rows or fmean(wild) < OFTEN:
        return None
    low, high = min(values_of(rows, "ppo/ratio_min")), max(values_of(rows, "ppo/ratio_max"))
    return Symptom(f"{span(rows)}: ratios from {low:.2g} to {high:.3g}", {"lr": h.config["policy_lr"] / 3})


def clip_fraction(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "training/clip_fraction", updates=True)
    if not rows or fmean(values_of(rows, "training/clip_fraction")) <= CLIP_FRACTION:
        return None
    share = fmean(values_of(rows, "training/clip_fraction"))
    return Symptom(f"{span(rows)}: {share:.0%} of the ratios clipped", {"lr": h.config["policy_lr"] / 3})


def later_steps_undo(h: History) -> Symptom | None:
    names = (
        "loss/policy", "gradients/policy_norm_first", "gradients/policy_norm_last", "ppo/optimizer_steps",
        "ppo/epochs_done", "loss/entropy",
    )  # fmt: skip
    # Over whole passes the advantages of the minibatches cancel; the loss of a part of one is their luck.
    rows = [r for r in h.last(RECENT, RECENT, *names, updates=True) if r[names[3]] > 1 and r[names[4]] >= 1]
    if len(rows) < OFTEN * RECENT or h.config.get("anchor_coeff"):
        return None
    loss, first, last = (fmean(values_of(rows, n)) for n in names[:3])
    loss += h.config.get("entropy_coeff", 0.0) * fmean(values_of(rows, names[5]))
    if loss <= SURROGATE_LOSS:
        return None
    evidence = (
        f"{span(rows)}: mean surrogate loss {loss:+.4f}, gradient norm {first:.2f} at the first step, {last:.2f} at "
        "the last"
    )
    return Symptom(evidence, {"lr": h.config["policy_lr"] / 3})


def gradient_excess(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "gradients/policy_norm", updates=True)
    limit = h.config["grad_clip_norm"]
    norms = values_of(rows, "gradients/policy_norm")
    if not rows or fmean(n > GRADIENT_EXCESS * limit for n in norms) < OFTEN:
        return None
    return Symptom(f"{span(rows)}: policy gradient norm {median(norms):.3g}, grad_clip_norm {limit}")


def targets_beyond_value_clip(h: History) -> Symptom | None:
    rows, clip = h.last(RECENT, RECENT, "critic/target_shift", updates=True), h.config["value_clip_epsilon"]
    shifts = values_of(rows, "critic/target_shift")
    if not rows or clip == 0 or min(abs(s) for s in shifts) <= SHIFT_EXCESS * clip or min(shifts) * max(shifts) < 0:
        return None
    evidence = (
        f"{span(rows)}: targets lie {median(shifts):+.2f} std from the values, which may move by {clip} an iteration"
    )
    return Symptom(evidence, {"clip": 2 * max(abs(s) for s in shifts)})


def blind_critic(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "ppo/explained_variance", updates=True)
    if not rows or fmean(values_of(rows, "ppo/explained_variance")) >= EXPLAINED_VARIANCE:
        return None
    share = fmean(values_of(rows, "ppo/explained_variance"))
    epochs, lr = 2 * h.config["num_critic_epochs"], 3 * h.config["critic_lr"]
    return Symptom(f"{span(rows)}: explained variance {share:.2f} on average", {"epochs": epochs, "lr": lr})


def failing_pays(h: History) -> Symptom | None:
    names = ("rollout/failure_return_median", "rollout/return_mean", "rollout/return_std", "rollout/success_rate")
    rows = h.last(RECENT, 3, *names, "progress/episodes")
    if not rows:
        return None
    episodes = rows[-1]["progress/episodes"] / max(rows[-1]["progress/iteration"], 1)
    safe, mean, spread, success = (fmean(values_of(rows, n)) for n in names)
    error = spread / math.sqrt(len(rows) * episodes)
    if safe - mean <= AGAINST_SIGMAS * error or not 0 < success < SOLVED:
        return None
    terms = {name: fmean(values_of(rows, name)) for name in reward_terms(rows)}
    costly = min(terms, key=lambda name: terms[name], default="")
    if not costly or -terms[costly] < PENALTY_SHARE * (safe - mean):  # shaping alone can be skewed like that
        return None
    evidence = (
        f"{span(rows)}: half of the failed episodes return {safe:.2f} or more, the mean of all is {mean:.2f} with "
        f"{success:.1%} of successes; {costly} costs {-terms[costly]:.2f} an episode"
    )
    return Symptom(evidence, {"term": costly.removeprefix(REWARD_FAMILY)}, "error")


def return_against_success(h: History) -> Symptom | None:
    names = ("rollout/return_mean", "rollout/success_rate", "rollout/return_std", "progress/episodes")
    rows = h.last(len(h.rows), AGAINST_MIN, *names)
    if not rows:
        return None
    third = max(len(rows) // 3, 2)
    start, end = rows[:third], rows[-third:]
    episodes = third * rows[-1][names[3]] / max(rows[-1]["progress/iteration"], 1)
    (before, after), (old, new) = ([fmean(values_of(part, n)) for part in (start, end)] for n in names[:2])
    spread = fmean(values_of(start + end, names[2]))
    mean = (old + new) / 2
    rise_error, fall_error = (math.sqrt(2 * v / episodes) for v in (spread**2, mean * (1 - mean)))
    if after - before <= AGAINST_SIGMAS * rise_error or old - new <= max(AGAINST_SIGMAS * fall_error, FLAT_SUCCESS):
        return None
    term, grew = risen_term(start, end)
    evidence = (
        f"return {before:.2f} -> {after:.2f} while success {old:.1%} -> {new:.1%} from {span(start)} to "
        f"{span(end)}{grew}"
    )
    return Symptom(evidence, {"term": term}, "error")


def reward_terms(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Names of the reward terms that all rows have."""
    names = [name for name in rows[-1] if name.startswith(REWARD_FAMILY)]
    return [name for name in names if all(row.get(name) is not None for row in rows)]


def risen_term(start: Sequence[Mapping[str, float]], end: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """The reward term that rose most between two groups of rows, and that in words."""
    terms = reward_terms([*start, *end])
    changes = {name: fmean(values_of(end, name)) - fmean(values_of(start, name)) for name in terms}
    if not changes:
        return "unknown", ""
    culprit = max(changes, key=lambda name: changes[name])
    return culprit.removeprefix(REWARD_FAMILY), f"; {culprit} rose most, by {changes[culprit]:+.2f}"


def reward_without_success(h: History) -> Symptom | None:
    names = ("rollout/return_mean", "rollout/success_rate", "critic/return_std")
    rows = h.last(len(h.rows), CAMPING_ITERATIONS, *names)
    if not rows:
        return None
    start, end = rows[:RECENT], rows[-RECENT:]
    before, after = ([fmean(values_of(part, n)) for n in names[:2]] for part in (start, end))
    rise = after[0] - before[0]
    error = math.sqrt(sum(stdev(values_of(part, names[0])) ** 2 / len(part) for part in (start, end)))
    spread = fmean(values_of(end, names[2]))
    flat = after[1] - before[1] < FLAT_SUCCESS and after[1] < SOLVED
    if not flat or rise <= CAMPING_SIGMAS * error or rise <= CAMPING_RISE * spread:
        return None
    term, grew = risen_term(start, end)
    evidence = (
        f"return {before[0]:.2f} -> {after[0]:.2f}, success {before[1]:.1%} -> {after[1]:.1%} from {span(start)} to "
        f"{span(end)}{grew}"
    )
    return Symptom(evidence, {"term": term})


def evaluated_on_training(h: History) -> Symptom | None:
    rows = h.last(1, 1, "eval/trained_share")
    share = max(values_of(rows, "eval/trained_share"), default=0.0)
    return Symptom(f"{span(rows)}: {share:.0%} of the evaluation's seeds were trained on") if share > 0 else None


def sampling_far_from_noise_free(h: History) -> Symptom | None:
    names = ("eval/success_rate", "rollout/success_rate")
    rows = h.last(3, GAP_EVALUATIONS, *names)
    free, sampled = (fmean(values_of(rows, n)) if rows else 0.0 for n in names)
    if abs(free - sampled) <= SUCCESS_GAP:
        return None
    factor = 0.7 if free > sampled else 1.4
    direction = "lower" if free > sampled else "raise"
    evidence = f"{span(rows)}: {free:.1%} noise-free against {sampled:.1%} with exploration noise"
    sigma = next((row["noise/sigma_max"] for row in reversed(rows) if row.get("noise/sigma_max") is not None), 0.0)
    return Symptom(evidence, {"direction": direction, "factor": factor, "sigma": sigma * factor})
