"""One PPO update over a rollout: targets, ratio guard, policy steps with KL control, critic steps.

On several ranks (reinflow/distributed.py) an update is the one that a single process would make of all their rollouts.
Every minibatch is one of the whole's: a rank scores the rows of it that are its own, weighted by their share, and
gradients are summed before an optimiser step. What decides something (statistics, norms, KL) is the same number on all.
An update exchanges, in messages that do not grow in number with the decisions: the rollout's small figures once; three
small ones to guard the ratio and compare weights; for a policy step three and the gradient (with K-FAC also the
covariances and the solved directions), and one for each KL measured; for a critic step one and its gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from reinflow import ConfigError, distributed, ppo, ratio_guard
from reinflow.credit import Advantages, advantages_by_control_step, advantages_by_decision
from reinflow.flow import ChainScore, ChainSpec, group_advantage, group_mask
from reinflow.gradient_noise import GradientMemory, noise_scale
from reinflow.natural import NaturalGradient
from reinflow.policy import FlowPolicy
from reinflow.ppo import full_batches
from reinflow.progress import tracked
from reinflow.rollout import CreditPer, RolloutBuffer
from reinflow.rollout_batch import RolloutBatch
from reinflow.training_state import load_optimizer
from reinflow.update_log import MeanLog, Probe
from reinflow.whole_rollout import WholeRollout

RATIO_TOLERANCE = 1e-4
RatioGuardError = ratio_guard.RatioGuardError
OVERSHOOT = 1.5  # a step whose KL exceeds this many target_kl is undone, if undo_overshoot
KL_SAMPLE = 128  # decisions on which the KL is measured after every optimiser step


@dataclass(frozen=True)
class LearnerSettings:
    """Everything the update needs; what each is for and where its default comes from: notes/hyperparameters.md."""

    policy_optimizer: Literal["adam", "natural"] = "adam"
    natural_damping: float = 0.1
    natural_momentum: float = 0.5
    policy_lr: float = 3e-6
    critic_lr: float = 1e-4
    clip_epsilon: float = 0.15
    target_kl: float = 0.1
    undo_overshoot: bool = False
    num_ppo_epochs: int = 5
    num_critic_epochs: int = 5
    minibatch_size: int = 8
    gradient_accumulation_steps: int = 15
    gamma: float = 0.999
    gae_lambda: float = 0.95
    credit: CreditPer = "decision"
    time_limit_is_terminal: bool = False
    value_clip_epsilon: float = 0.2
    entropy_coeff: float = 0.0
    anchor_coeff: float = 0.0
    grad_clip_norm: float = 0.25

    @property
    def batch_size(self) -> int:
        """Decisions that every optimiser step sees."""
        return self.minibatch_size * self.gradient_accumulation_steps


def make_policy_optimizer(policy: FlowPolicy, settings: LearnerSettings) -> torch.optim.Optimizer:
    """Adam, or K-FAC over the policy's linear layers."""
    parameters = policy.policy_parameters()
    if settings.policy_optimizer == "natural":
        return NaturalGradient(policy, parameters, settings.natural_damping, settings.natural_momentum)
    return torch.optim.Adam(parameters, lr=settings.policy_lr, eps=1e-5, fused=True)


class PPOLearner:
    """Owns both optimisers and the return normaliser; ``update`` turns a rollout into new weights."""

    def __init__(
        self, policy: FlowPolicy, spec: ChainSpec, settings: LearnerSettings, seed: int, rescore_log_probs: bool = False
    ):
        """With ``rescore_log_probs`` the rollout's log-probs are taken again, by the update's own minibatches."""
        self.policy, self.spec, self.settings, self.rescore_log_probs = policy, spec, settings, rescore_log_probs
        narrow = [p for p in (*policy.policy_parameters(), *policy.critic_parameters()) if p.dtype != torch.float32]
        if narrow:
            raise ConfigError(f"{len(narrow)} tensors that learn are {narrow[0].dtype}: small steps would round away")
        self.normalizer = ppo.ReturnNormalizer()
        self._scored: tuple[float, Tensor] | None = None  # KL and log-probs of its sample by the weights as they are
        self.gradients = GradientMemory(Probe(policy.policy_parameters()))
        self.policy_optimizer = make_policy_optimizer(policy, settings)
        # A group may be empty (no critic), the list of groups may not.
        critic = [{"params": policy.critic_parameters()}]
        self.critic_optimizer = torch.optim.Adam(critic, lr=settings.critic_lr, eps=1e-5, fused=True)
        self.starting_policy = self._snapshot() if settings.anchor_coeff > 0 else None
        self.generator = torch.Generator().manual_seed(seed)  # shuffling; on the CPU for every device
        self.lr_scale = 1.0  # halved by a step that had to be undone, recovers while KL stays below half of its target

    def update(self, buffer: RolloutBuffer, lr_factor: float = 1.0, critic_only: bool = False) -> dict[str, float]:
        """One iteration's update.

        Args:
            buffer: the rollout (this rank's), sampled by the current weights.
            lr_factor: of the schedule, on the policy's learning rate; with natural steps on ``target_kl``.
            critic_only: leave the policy as it is (critic warm-up, on the same targets).

        Returns:
            Metrics by the names of reinflow.metrics.METRICS.

        Raises:
            RatioGuardError: the weights do not reproduce the rollout's log-probs.
            ConfigError: one optimiser step asks for more decisions than the rollout has.
            UserError: the ranks' weights came apart.
        """
        start, waited = time.perf_counter(), distributed.TRAFFIC.seconds
        whole = WholeRollout.of(buffer, self._advantages(buffer))
        self._refuse_too_few(whole.figures.num_decisions)
        lr = 0.0 if critic_only else self.settings.policy_lr * lr_factor * self.lr_scale
        for group in self.policy_optimizer.param_groups:
            group["lr"] = lr
        data = self._flatten(buffer, whole)
        if len(data) == 0:
            return {"ppo/optimizer_steps": 0.0, "time/update": time.perf_counter() - start}
        metrics = _advantage_metrics(whole.figures, whole.advantages)
        normalized = replace(whole, advantages=self._normalize(whole.advantages))
        metrics["critic/target_shift"] = (normalized.advantages.target - normalized.advantages.value).mean().item()
        if self.rescore_log_probs:
            self._rescore(data)
        metrics |= self._guard_ratio(data) | {"lr/policy": lr, "lr/critic": self.settings.critic_lr}
        if not critic_only:
            if self.starting_policy is not None:
                self._anchor(data, self.starting_policy)
            metrics |= self._move_policy(data, lr_factor)
            metrics |= _noise_scale(whole.figures, metrics)
        metrics |= self._update_critic(normalized)
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            optimizer.zero_grad(set_to_none=True)  # memory that the next rollout can use
        distributed.refuse_other_weights(self.policy.trainable_state())
        if distributed.size() > 1:
            metrics["time/sync"] = distributed.TRAFFIC.seconds - waited
        return metrics | {"time/update": time.perf_counter() - start}

    def _refuse_too_few(self, decisions: int) -> None:
        if self.settings.batch_size > decisions:
            raise ConfigError(
                f"minibatch_size={self.settings.minibatch_size} x gradient_accumulation_steps="
                f"{self.settings.gradient_accumulation_steps} exceeds the {decisions} decisions of a rollout, so that "
                "no step would be made: lower one of them, or collect more"
            )

    def state_dict(self) -> dict[str, Any]:
        """What an update goes on from, besides the policy's weights; for ``pack_tree``."""
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "return_normalizer": self.normalizer.state_dict(),
            "lr_scale": self.lr_scale,
            "gradients": self.gradients.state_dict(),
            "shuffle_rng": self.generator.get_state(),
        }

    def state_size(self) -> int:
        """Bytes that ``state_dict`` holds once both optimisers have made a step."""
        policy, critic = self.policy.policy_parameters(), self.policy.critic_parameters()
        kept = 2 * sum(p.numel() for p in (*policy, *critic))  # Adam's moments
        if isinstance(self.policy_optimizer, NaturalGradient):
            shapes = [self.policy_optimizer.state_shapes(layer.weight) for layer in self.policy_optimizer.layers]
            kept = sum(math.prod(s) for kinds in shapes for s in kinds.values()) + 2 * sum(p.numel() for p in critic)
        return 4 * kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Raises CheckpointError for the optimisers of another policy."""
        load_optimizer(self.policy_optimizer, state["policy_optimizer"], "policy optimizer")
        load_optimizer(self.critic_optimizer, state["critic_optimizer"], "critic optimizer")
        self.normalizer.load_state_dict(state["return_normalizer"])
        self.lr_scale = state["lr_scale"]
        if "gradients" in state:  # a checkpoint of before begins to remember anew
            self.gradients.load_state_dict(state["gradients"])
        self.generator.set_state(state["shuffle_rng"])

    def _advantages(self, buffer: RolloutBuffer) -> Advantages:
        s = self.settings
        if s.credit == "decision":
            return advantages_by_decision(buffer, s.gae_lambda)
        return advantages_by_control_step(
            buffer, self.policy, self.normalizer,
            gamma=s.gamma, gae_lambda=s.gae_lambda, time_limit_is_terminal=s.time_limit_is_terminal,
        )  # fmt: skip

    def _normalize(self, advantages: Advantages) -> Advantages:
        """Values and targets by statistics that include this rollout's returns."""
        # What the network itself put out: the clip range around it must not move with the statistics.
        old_outputs = self.normalizer.normalize(advantages.value)
        self.normalizer.update(advantages.target)
        return advantages._replace(value=old_outputs, target=self.normalizer.normalize(advantages.target))

    def _flatten(self, buffer: RolloutBuffer, whole: WholeRollout) -> RolloutBatch:
        """Flatten the rollout; what broken episodes did is left out."""
        valid, action_dim = whole.figures.valid.flatten(), self.policy.action_dim
        mask = group_mask(whole.figures.active.flatten(0, 1), action_dim, self.spec)
        advantage = group_advantage(whole.advantages.advantage.flatten(0, 1), action_dim, self.spec)
        advantage = ppo.normalize_advantages(advantage, mask if advantage.dim() == 2 else valid)
        own = whole.decisions()
        if not bool(valid.all()):
            mask, advantage = mask[valid], advantage[valid]
        sound = buffer.valid.flatten()
        kept = None if bool(sound.all()) else sound.nonzero().flatten().cpu()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1) if kept is None else tensor.flatten(0, 1)[kept]

        chain = rows(buffer.chain)
        return RolloutBatch(
            context={name: rows(tensor) for name, tensor in buffer.context.items()},
            chain=chain,
            log_prob=rows(buffer.log_prob),
            mask=own.cut(mask),
            advantage=own.cut(advantage),
            anchor=chain.new_zeros(len(chain), 0),
            groups=mask.sum(1).cpu(),
            own=own,
            noisy=None if buffer.noisy is None else rows(buffer.noisy),
            head_inputs=None if buffer.head_inputs is None else rows(buffer.head_inputs),
        )

    def _guard_ratio(self, data: RolloutBatch) -> dict[str, float]:
        """Before the first optimiser step the ratio must be 1: the same kernel, weights and cached prefix.

        With gradients, though none is taken: so it goes the way of the updates, through a compiled expert too.
        """
        size = min(self.settings.minibatch_size, len(data))
        part = data[torch.linspace(0, len(data) - 1, size).long()]  # spread over the rollout
        score = None if part.empty else part.score(self.policy, self.spec)
        error = ratio_guard.check_ratio(self.policy, self.spec, part, score, RATIO_TOLERANCE)
        dims = part.log_prob.shape[1]
        coordinates = self.spec.noised_dimensions(self.policy.n_action_steps, self.policy.action_dim)
        first = torch.arange(size)
        log_prob = data.log_prob[data.own.places(first)].sum(1).mean()
        before = 0.0 if score is None else ppo.approx_kl(score.log_prob, part.log_prob, part.mask)
        kl, mean = distributed.total(
            distributed.part(before, part.group_share), distributed.part(log_prob, data.own.among(first).share)
        )
        return {
            "ppo/ratio_error_before_update": error,
            "ppo/kl_before_update": kl,
            "logprob/per_dimension": mean * self._undo_mean(coordinates) / coordinates,
            "logprob/groups": float(dims),
            "logprob/coordinates": coordinates / dims,
        }

    @torch.no_grad()
    def _rescore(self, data: RolloutBatch) -> None:
        """Old log-probs by the update's own minibatches: a sum in bf16 or TF32 rounds by the shape of its batch."""
        data.log_prob = self._log_probs(data, "scoring again")

    def _move_policy(self, data: RolloutBatch, lr_factor: float) -> dict[str, float]:
        """The policy's steps, and how far they took it."""
        before, self._scored = self.gradients.probe.weights(), None
        if isinstance(self.policy_optimizer, NaturalGradient):
            info, kl_data = self._natural_step(self.policy_optimizer, data, lr_factor)
        else:
            info, kl_data = self._update_policy(data)
        info["ppo/decision_kl"] = self._decision_kl(kl_data)
        moved = self.gradients.probe.moved_share(before)
        stayed = info["ppo/steps_undone"] or info.get("ppo/steps_refused") or not info["ppo/approx_kl"]
        return info if stayed or moved is None else info | {"ppo/weights_moved": moved}

    def _update_policy(self, data: RolloutBatch) -> tuple[dict[str, float], RolloutBatch]:
        """PPO epochs until done or until a step's KL exceeds ``target_kl``; metrics, and what it was measured on."""
        s, log = self.settings, MeanLog()
        kl_rows = torch.randperm(len(data), generator=self.generator)[:KL_SAMPLE]
        kl_data, kl, steps, stopped, undone = data[kl_rows], 0.0, 0, False, False
        norms: list[float] = []
        batch = min(s.batch_size, len(data))  # fewer are left where episodes broke
        for rows in tracked(list(full_batches(len(data), batch, s.num_ppo_epochs, self.generator)), "policy, steps"):
            snapshot = self._snapshot() if s.undo_overshoot else None
            step = self._policy_step(data, rows, first=steps == 0)
            log.add(step)
            norms.append(step["gradients/policy_norm"])
            kl, steps = self._measure_kl(kl_data), steps + 1
            stopped = s.target_kl > 0 and not kl <= s.target_kl
            undone = stopped and snapshot is not None and not kl <= OVERSHOOT * s.target_kl
            if undone and snapshot is not None:
                self._restore(snapshot)
                self._scored = None
            if stopped:
                break
        if undone:
            self.lr_scale *= 0.5
        elif kl < 0.5 * s.target_kl:
            self.lr_scale = min(1.0, self.lr_scale * 1.3)
        info = log.means() | {
            "gradients/policy_norm_first": norms[0] if norms else 0.0,
            "gradients/policy_norm_last": norms[-1] if norms else 0.0,
            "ppo/approx_kl": kl,
            "ppo/optimizer_steps": float(steps),
            "ppo/epochs_done": steps * batch / len(data),
            "ppo/early_stopped": float(stopped),
            "ppo/steps_undone": float(undone),
        }
        return info, kl_data

    def _natural_step(
        self, optimizer: NaturalGradient, data: RolloutBatch, kl_factor: float
    ) -> tuple[dict[str, float], RolloutBatch]:
        """One step along the natural gradient of the whole rollout, as far as ``target_kl`` (x warm-up) allows."""
        info = self._policy_gradient(data, torch.arange(len(data))) | self.gradients.remember()
        optimizer.add_up()
        kl_data = data[torch.randperm(len(data), generator=self.generator)[: 2 * KL_SAMPLE]]
        kl = optimizer.step_to_kl(self.settings.target_kl * kl_factor, lambda: self._measure_kl(kl_data))
        if self._scored and self._scored[0] != kl:  # an earlier length was taken instead of the last one tried
            self._scored = None
        info |= {
            "ppo/approx_kl": kl,
            "ppo/optimizer_steps": 1.0,
            "ppo/epochs_done": 1.0,
            "ppo/early_stopped": 0.0,
            "ppo/steps_undone": 0.0,
            "ppo/steps_refused": float(not math.isfinite(kl)),
        }
        return info, kl_data

    def _policy_step(self, data: RolloutBatch, rows: Tensor, first: bool) -> dict[str, float]:
        """One optimiser step on the whole batch ``rows``."""
        info = self._policy_gradient(data, rows) | (self.gradients.remember() if first else {})
        parameters, limit = self.policy.policy_parameters(), self.settings.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        if math.isfinite(norm):
            self.policy_optimizer.step()
        refused = float(not math.isfinite(norm))
        clipped = float(norm > limit)
        return info | {"gradients/policy_norm": norm, "gradients/policy_clipped": clipped, "ppo/steps_refused": refused}

    def _policy_gradient(self, data: RolloutBatch, rows: Tensor) -> dict[str, float]:
        """Gradient of the batch ``rows``, accumulated over minibatches."""
        s, log = self.settings, MeanLog()
        self.policy_optimizer.zero_grad(set_to_none=True)
        active_groups, parts = data.groups[rows].sum(), rows.split(s.minibatch_size)
        for part_rows in tracked(parts, "gradient, minibatches"):
            part = data[part_rows]
            if part.empty:
                continue
            weight = part.groups.sum() / active_groups  # parts then add up to the full batch's mean
            share, group_share = part.share, part.group_share  # of a part's two means, those of other ranks beside it
            score = part.score(self.policy, self.spec)
            loss, info = ppo.policy_loss(score.log_prob, part.log_prob, part.advantage, s.clip_epsilon, part.mask)
            entropy = score.entropy.mean()
            loss = group_share * loss - s.entropy_coeff * share * entropy
            if s.anchor_coeff > 0:
                loss = loss + s.anchor_coeff * share * ((score.mean - part.anchor) ** 2).mean()
            (loss * weight).backward()
            log.add({
                "loss/policy": loss.item(),
                "loss/entropy": share * entropy.item(),
                "logprob/new_mean": share * score.log_prob.detach().mean().item(),
                "noise/std_mean": share * score.noise_std.mean().item(),
                "training/clip_fraction": group_share * float(info["clip_fraction"]),
                "ppo/ratio_mean": group_share * float(info["ratio_mean"]),
                "ppo/ratio_min": float(info["ratio_min"]),
                "ppo/ratio_max": float(info["ratio_max"]),
            })  # fmt: skip
        distributed.add_gradients(self.policy.policy_parameters())
        log.join(len(parts))
        return log.means()

    @torch.no_grad()
    def _anchor(self, data: RolloutBatch, weights: list[Tensor]) -> None:
        """Note where the policy with ``weights`` would have gone from every stored denoising state."""
        now = self._snapshot()
        self._restore(weights)
        if means := [score.mean for score in self._scores(data, "anchor")]:
            data.anchor = torch.cat(means)
        self._restore(now)

    def _scores(self, data: RolloutBatch, what: str) -> Iterator[ChainScore]:
        """Of its minibatches, with a bar."""
        for rows in tracked(torch.arange(len(data)).split(self.settings.minibatch_size), f"{what}, minibatches"):
            part = data[rows]
            if not part.empty:
                yield part.score(self.policy, self.spec)

    @torch.no_grad()
    def _log_probs(self, data: RolloutBatch, what: str) -> Tensor:
        """(b, G) under the current weights, by minibatches."""
        scores = [score.log_prob for score in self._scores(data, what)]
        return torch.cat(scores) if scores else data.log_prob

    @torch.no_grad()
    def _measure_kl(self, data: RolloutBatch) -> float:
        """approx_kl of the current weights against the acting ones."""
        log_prob = self._log_probs(data, "KL")
        kl = distributed.part(ppo.approx_kl(log_prob, data.log_prob, data.mask), data.group_share)
        (kl,) = distributed.total(kl)
        self._scored = kl, log_prob
        return kl

    @torch.no_grad()
    def _decision_kl(self, data: RolloutBatch) -> float:
        """KL of whole decisions from the acting weights to the current ones.

        All coordinates of a decision are summed, however the log-probs are reduced, so that one scale serves all runs:
        2 KL is the squared distance of the two means in noise stds. Half the mean square of the log-ratio is precise
        for small moves, the mean of its negative right for large ones.
        """
        if self._scored is None:
            self._measure_kl(data)
        assert self._scored
        (_, scores), self._scored = self._scored, None
        log_ratio = torch.where(data.mask, scores - data.log_prob, 0.0).sum(1)
        coordinates = self.spec.noised_dimensions(self.policy.n_action_steps, self.policy.action_dim)
        log_ratio = log_ratio * self._undo_mean(coordinates)
        small, mean = distributed.total(
            distributed.part(0.5 * (log_ratio**2).mean(), data.share), distributed.part(log_ratio.mean(), data.share)
        )
        return small if small < 1 else max(-mean, 0.0)

    def _undo_mean(self, coordinates: int) -> float:
        """What the reduction ``mean`` divided a decision's log-prob by; 1 for the others, which sum."""
        if self.spec.reduction != "mean":
            return 1.0
        return (self.spec.num_denoising_steps + 1) * coordinates / self.spec.num_noisy_steps

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.policy.policy_parameters()]

    @torch.no_grad()
    def _restore(self, snapshot: list[Tensor]) -> None:
        """Weights only. Adam's moments are kept: a first step moves every weight by the full rate, coherently, and
        with fresh moments the next try would be such a first step again."""
        for parameter, saved in zip(self.policy.policy_parameters(), snapshot, strict=True):
            parameter.copy_(saved)

    def _update_critic(self, normalized: WholeRollout) -> dict[str, float]:
        """Regression of normalised values; it shares no parameter with the policy and needs no KL stop."""
        s, log, norms, steps = self.settings, MeanLog(), MeanLog(), 0
        parameters = self.policy.critic_parameters()
        if not parameters:
            return {}
        name, own = self.policy.critic_input, normalized.critic_rows()
        rows_of = normalized.advantages.context[name]
        value, target = own.cut(normalized.advantages.value), own.cut(normalized.advantages.target)
        self.policy.observe({name: rows_of})
        batch = min(s.batch_size, len(own))
        for rows in tracked(list(full_batches(len(own), batch, s.num_critic_epochs, self.generator)), "critic, steps"):
            here, share, steps = own.places(rows), own.among(rows).share, steps + 1
            self.critic_optimizer.zero_grad(set_to_none=True)
            if len(here):
                values = self.policy.value({name: rows_of[here]})
                loss, _ = ppo.value_loss(values, value[here], target[here], s.value_clip_epsilon)
                (loss * share).backward()
                log.add({"loss/value": share * loss.item()})
            distributed.add_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip_norm).item()
            if math.isfinite(norm):
                self.critic_optimizer.step()
            norms.add({"gradients/critic_norm": norm, "gradients/critic_clipped": float(norm > s.grad_clip_norm)})
        log.join(steps)
        return log.means() | norms.means()


def _noise_scale(buffer: RolloutBuffer, info: dict[str, float]) -> dict[str, float]:
    """In episodes, by the signal in a step's gradient; nothing where it was not measured or no signal was there."""
    signal, episodes = info.get("gradients/signal_share"), int((buffer.terminated | buffer.truncated).sum())
    if signal is None or signal <= 0 or not episodes:
        return {}
    in_a_step = episodes * info["ppo/epochs_done"] / info["ppo/optimizer_steps"]
    return {"gradients/noise_scale": noise_scale(signal, in_a_step)}


def _advantage_metrics(buffer: RolloutBuffer, advantages: Advantages) -> dict[str, float]:
    """How well the critic foresaw the returns, and how large these are."""
    metrics = {
        "ppo/explained_variance": float(ppo.explained_variance(advantages.value, advantages.target)),
        "critic/return_mean": advantages.target.mean().item(),
        "critic/return_std": advantages.target.std().item(),
        "critic/reward_to_go_mean": _reward_to_go(buffer).mean().item(),
        "critic/advantage_std": (advantages.target - advantages.value).std().item(),
    }
    if bool(buffer.truncated.any()):
        metrics["critic/bootstrap_mean"] = buffer.next_value[buffer.truncated].mean().item()
    return metrics


def _reward_to_go(buffer: RolloutBuffer) -> Tensor:
    """(T, N) discounted rewards from each decision to its episode's end; no value takes part."""
    zeros = torch.zeros_like(buffer.value)
    return ppo.compute_gae(buffer.reward, zeros, zeros, buffer.terminated, buffer.truncated, buffer.discount, 1.0)[1]
