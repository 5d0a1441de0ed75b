"""What the buffer keeps of the prefix: the same velocities whatever it is, and never encoded again."""

import dataclasses

import pytest
import torch

from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.policy import PolicyError
from reinflow_vla.prefix_cache import GIB, KEEPS, PrefixCache, plan_prefix_cache, prefix_bytes
from tests.policies import VLAS, explore, load, noise_for, observe

SIZES = {"kv": 4 * 2**20, "embeddings": 2**20, "none": 2**19}


@pytest.fixture(scope="module", params=VLAS)
def policy(request, policy_dirs):
    return load(request.param, policy_dirs[request.param])


@pytest.mark.parametrize("keep", KEEPS)
def test_buffer_gives_the_same_velocities_and_ratios(policy, keep):
    policy.prefix_cache = PrefixCache(keep)
    context = policy.encode(policy.preprocess(observe(policy)))
    spec = ChainSpec(3, "action")
    drawn = sample_chain(policy, context, spec, noise_for(policy), explore(policy, spec))
    kept = policy.to_buffer(context)
    assert ("kv" in kept) == (keep == "kv")
    rows = torch.tensor([2, 0])
    part = {name: tensor[rows] for name, tensor in kept.items()}
    x_t, time = noise_for(policy)[rows], torch.tensor([1.0, 0.4])
    acting = {name: tensor[rows] for name, tensor in context.items()}
    expected, got = policy.velocity(acting, x_t, time)[0], policy.velocity(policy.from_buffer(part), x_t, time)[0]
    assert (expected - got).abs().max() < 1e-5
    score = chain_log_prob(policy, part, drawn.chain[rows], spec)
    assert (score.log_prob - drawn.log_prob[rows]).exp().sub(1).abs().max() < 1e-4
    score.log_prob.sum().backward()
    assert all(p.grad is None for p in policy.vla.parameters() if not p.requires_grad)
    policy.zero_grad()


def test_sizes_are_those_of_the_kept_tensors(policy):
    plan = policy.plan_prefix_cache(observe(policy, batch=1), "auto", 10, 0.0)
    assert plan.keep == "kv" and not plan.offload
    kept = policy.to_buffer(policy.encode(policy.preprocess(observe(policy, batch=1))))
    assert plan.bytes_per_decision == kept["kv"].numel() * 4
    policy.prefix_cache = PrefixCache("embeddings")
    kept = policy.to_buffer(policy.encode(policy.preprocess(observe(policy, batch=1))))
    assert set(kept) - {"state"} == {"embeddings", "attention", "pad", "features"}
    everything = policy.encode_everything(policy.preprocess(observe(policy, batch=2)))
    assert prefix_bytes(everything)["embeddings"] == kept["embeddings"].numel() * 4 + kept["attention"].numel()


def test_auto_takes_the_fastest_that_fits():
    keeps = [plan_prefix_cache("auto", SIZES, 1024, "cpu", budget).keep for budget in (4.0, 3.9, 1.0, 0.9, 0.5)]
    assert keeps == ["kv", "embeddings", "embeddings", "none", "none"]


def test_too_small_a_budget_is_refused_with_the_remedy():
    with pytest.raises(PolicyError, match="episodes_per_iteration"):
        plan_prefix_cache("auto", SIZES, 1024, "cpu", 0.4)
    with pytest.raises(PolicyError, match=r"prefix_cache=kv needs 4\.0 GiB"):
        plan_prefix_cache("kv", SIZES, 1024, "cpu", 3.0)


def test_cuda_offloads_before_it_computes_again():
    plan = plan_prefix_cache("auto", SIZES, 1024, "cuda", free=lambda device: (2 if device == "cuda" else 20) * GIB)
    assert (plan.keep, plan.offload) == ("kv", True)
    plan = plan_prefix_cache("auto", SIZES, 1024, "cuda", free=lambda device: 3 * GIB)
    assert plan == PrefixCache("embeddings", False, SIZES["embeddings"])


def test_update_never_runs_the_prefix(tmp_path, monkeypatch):
    """The real policy and environment: after the rollout no vision tower, no language model, no prefix at all."""
    from train_reinflow import PRESETS, open_run, rollout, update

    config = dataclasses.replace(
        PRESETS["tiny"], num_parallel_envs=2, episodes_per_iteration=2, num_episodes=2, minibatch_size=3,
        gradient_accumulation_steps=2, critic_warmup_iters=0, wandb_enabled=False, output_dir=str(tmp_path / "run"),
        report_episodes=0, num_threads=1, eval_episodes=2,
    )  # fmt: skip
    config, run = open_run(config)
    with run:
        flow, calls = run.policy.vla.model, []
        model = flow.vlm_with_expert.get_vlm_model()
        for module in (model.vision_model, model.connector, model.text_model.layers[0].self_attn.q_proj):
            module.register_forward_pre_hook(lambda *_: calls.append("prefix"))
        next(run.iterations())
        buffer = rollout(run, config)
        assert len(calls) > 0
        calls.clear()
        update(run, config, buffer)
        assert run.metrics["ppo/optimizer_steps"] == 1
        assert calls == []
        run.policy.prefix_cache = PrefixCache("none")  # the counter counts
        kept = run.policy.to_buffer(run.policy.encode(run.policy.preprocess(observe(run.policy))))
        calls.clear()
        run.policy.from_buffer(kept)
        assert len(calls) > 0
