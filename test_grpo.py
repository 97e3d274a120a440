# SPDX-License-Identifier: MIT
"""Tests of grpo_sort.py. Run with `python -m pytest test_grpo.py`.

Each test says which mistake it guards against. What is expected is worked out by hand, by plain
Python loops, by enumeration of all responses or by finite differences, not by the code under test.
Tests named test_erratum_N prove row N of the errata table in README.md.
"""

import ast
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo_sort as gs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sort"
PROMPTS = torch.tensor(gs.CLASSIC_PROMPTS)  # [batch pos]
SORT_SOURCE = (HERE / "grpo_sort.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")


def make_model(num_runs=None, seed=0, init_scale=1.0, double=False):
    generator = torch.Generator().manual_seed(seed)
    model = gs.Model(5, 4, 3, 3, init_scale, num_runs, generator)
    return model.double() if double else model


def sample(model, num_responses=6, seed=0):
    return gs.generate_responses(
        PROMPTS, model, num_responses, torch.Generator().manual_seed(seed)
    )


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


# --------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("prompt", [(3, 1, 0), (1, 1, 2), (4, 4, 4), (0, 3, 0)])
def test_rewards_agree_with_plain_python_on_every_response(prompt):
    everything = list(itertools.product(range(5), repeat=3))
    prompts, responses = torch.tensor([prompt]), torch.tensor([everything])
    target = sorted(prompt)
    distance = [sum(x == y for x, y in zip(r, target)) for r in everything]
    inclusion = [
        sum(x in r for x in prompt) + sum(x <= y for x, y in zip(r, r[1:])) for r in everything
    ]
    exact = [float(list(r) == target) for r in everything]
    assert gs.sort_distance_reward(prompts, responses)[0].tolist() == distance
    assert gs.sort_inclusion_ordering_reward(prompts, responses)[0].tolist() == inclusion
    assert gs.exact_sort_reward(prompts, responses)[0].tolist() == exact
    steps = gs.sort_step_rewards(prompts, responses)
    assert steps.shape == (1, 125, 3) and steps.sum(-1)[0].tolist() == distance


@pytest.mark.parametrize("reward", gs.REWARDS.values())
def test_rewards_take_a_run_axis(reward):
    responses = torch.randint(5, (7, 3, 4, 3), generator=torch.Generator().manual_seed(0))
    together = gs.compute_reward(PROMPTS, responses, reward)
    assert together.shape == (7, 3, 4) and together.dtype == torch.float32
    for run in range(7):
        assert torch.equal(together[run], gs.compute_reward(PROMPTS, responses[run], reward))


def test_erratum_5_a_wrong_answer_gets_the_full_inclusion_ordering_reward():
    prompts, responses = torch.tensor([[1, 1, 2]]), torch.tensor([[[1, 1, 2], [1, 2, 2]]])
    assert gs.sort_inclusion_ordering_reward(prompts, responses).tolist() == [[5.0, 5.0]]
    assert gs.exact_sort_reward(prompts, responses).tolist() == [[1.0, 0.0]]


# --------------------------------------------------------------------------------------------------
# Model, sampling, log-probabilities


def test_the_model_is_the_formula_in_its_comment():
    model = make_model(double=True)
    logits = model(PROMPTS)
    E, A, B = model.embedding, model.encode_weights, model.decode_weights
    for b, prompt in enumerate(PROMPTS.tolist()):
        h = sum(E[token] @ A[p] for p, token in enumerate(prompt))
        for q in range(3):
            assert torch.allclose(logits[b, q], h @ B[q] @ E.T, atol=1e-12)


def test_a_run_of_a_batch_has_the_logits_and_the_gradient_that_it_has_alone():
    # A loss averaged over runs, or a norm taken over all of them, would couple the trainings.
    many = make_model(num_runs=4)
    responses = sample(many)
    deltas = gs.compute_deltas(gs.sort_distance_reward(PROMPTS, responses), "normalized_rewards")
    log_probs = gs.compute_log_probs(PROMPTS, responses, many)
    old = log_probs.detach() - 0.1
    loss = gs.compute_loss(log_probs, deltas, "clipped", old)
    kl = gs.compute_kl_penalty(log_probs, old)
    assert loss.shape == kl.shape == (4,)
    (loss + 0.1 * kl - 0.1 * gs.compute_entropy(PROMPTS, many)).sum().backward()
    for run in range(4):
        one = make_model()
        one.load_state_dict({name: p[run] for name, p in many.state_dict().items()})
        assert torch.allclose(one(PROMPTS), many(PROMPTS)[run], atol=1e-6)
        log_probs = gs.compute_log_probs(PROMPTS, responses[run], one)
        alone = gs.compute_loss(log_probs, deltas[run], "clipped", old[run])
        alone = alone + 0.1 * gs.compute_kl_penalty(log_probs, old[run])
        assert alone.shape == ()
        (alone - 0.1 * gs.compute_entropy(PROMPTS, one)).backward()
        for p, q in zip(one.parameters(), many.parameters()):
            assert torch.allclose(p.grad, q.grad[run], atol=1e-7)


def test_samples_come_from_the_softmax_of_the_logits():
    model = make_model(seed=3, init_scale=0.7)
    responses = sample(model, 40_000)  # [batch trial pos]
    logits = model(PROMPTS).tolist()
    for b, q in itertools.product(range(3), range(3)):
        wanted = torch.tensor(softmax(logits[b][q]))
        seen = torch.bincount(responses[b, :, q], minlength=5) / 40_000
        assert (seen - wanted).abs().max() < 4 * 0.5 / math.sqrt(40_000)  # 4 standard errors
    # Positions are drawn independently: joint frequencies are products.
    joint = ((responses[0, :, 0] == 1) & (responses[0, :, 1] == 1)).float().mean()
    product = softmax(logits[0][0])[1] * softmax(logits[0][1])[1]
    assert abs(joint - product) < 0.01


def test_log_probs_are_those_of_the_chosen_tokens_and_sum_to_one():
    model = make_model(num_runs=2, double=True)
    everything = gs.enumerate_responses(5, 3)
    assert everything.shape == (125, 3)
    log_probs = gs.compute_log_probs(PROMPTS, everything.expand(3, -1, -1), model)
    assert log_probs.shape == (2, 3, 125, 3)
    assert torch.allclose(log_probs.sum(-1).exp().sum(-1), torch.ones(2, 3).double())
    probs = softmax(model(PROMPTS)[1, 2, 0].tolist())  # run 1, prompt 2, position 0
    i = everything.tolist().index([4, 0, 2])
    assert log_probs[1, 2, i, 0].item() == pytest.approx(math.log(probs[4]))


def test_log_probs_broadcast_runs_from_either_side():
    one, responses = make_model(), torch.randint(5, (6, 3, 4, 3))
    spread = gs.compute_log_probs(PROMPTS, responses, one)
    assert spread.shape == responses.shape
    assert torch.equal(spread[2], gs.compute_log_probs(PROMPTS, responses[2], one))


# --------------------------------------------------------------------------------------------------
# Deltas


def plain_delta(batch, b, i, mode):
    """δ of response i to prompt b, with the statistics module and loops."""
    group, r = batch[b], batch[b][i]
    others = group[:i] + group[i + 1 :]
    everything = [x for g in batch for x in g]
    return {
        "rewards": lambda: r,
        "centered_rewards": lambda: r - statistics.mean(group),
        "normalized_rewards": lambda: (r - statistics.mean(group)) / (statistics.stdev(group) + 1e-5),
        "max_rewards": lambda: r if r == max(group) else 0.0,
        "leave_one_out": lambda: r - statistics.mean(others),
        "batch_normalized": lambda: (r - statistics.mean(group)) / (statistics.stdev(everything) + 1e-5),
    }[mode]()  # fmt: skip


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_deltas_agree_with_plain_python(mode):
    rng = random.Random(1)
    runs = [[[float(rng.randint(0, 4)) for _ in range(5)] for _ in range(3)] for _ in range(4)]
    deltas = gs.compute_deltas(torch.tensor(runs, dtype=torch.float64), mode)
    for run, b, i in itertools.product(range(4), range(3), range(5)):
        wanted = plain_delta(runs[run], b, i, mode)
        assert deltas[run, b, i].item() == pytest.approx(wanted, abs=1e-9)
    one = gs.compute_deltas(torch.tensor(runs[0], dtype=torch.float64), mode)
    assert torch.allclose(one, deltas[0])  # batch statistics are those of the run alone


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_a_group_of_equal_rewards_has_no_signal_and_no_nan(mode):
    deltas = gs.compute_deltas(torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 0.0]]), mode)
    assert deltas.isfinite().all()
    if mode not in ("rewards", "max_rewards"):
        assert deltas[0].abs().max() == 0


def test_erratum_2_the_baseline_example():
    rewards = torch.tensor([[11.0, 9.0], [0.0, 2.0]])
    assert round(rewards.std().item(), 2) == 5.32
    assert round(gs.compute_deltas(rewards, "centered_rewards").std().item(), 2) == 1.15


def test_process_deltas_agree_with_plain_python():
    rng = random.Random(2)
    group = [[float(rng.randint(0, 1)) for _ in range(3)] for _ in range(4)]
    steps = [x for response in group for x in response]
    mean, std = statistics.mean(steps), statistics.stdev(steps)
    deltas = gs.compute_process_deltas(torch.tensor([[group]], dtype=torch.float64))[0, 0]
    for i, t in itertools.product(range(4), range(3)):
        wanted = sum((group[i][k] - mean) / (std + 1e-5) for k in range(t, 3))
        assert deltas[i, t].item() == pytest.approx(wanted)


# --------------------------------------------------------------------------------------------------
# Losses


def plain_loss(log_probs, old, deltas, mode, low, high):
    """The loss of one run with math.exp and loops; deltas[b][i][t]."""
    terms = []
    for b, i in itertools.product(range(len(log_probs)), range(len(log_probs[0]))):
        new_row, old_row = log_probs[b][i], old[b][i]
        sequence = math.exp(statistics.mean(x - y for x, y in zip(new_row, old_row)))
        for x, y, d in zip(new_row, old_row, deltas[b][i]):
            ratio = sequence if mode == "gspo" else math.exp(x) / math.exp(y)
            clipped = min(max(ratio, 1 - low), 1 + high)
            terms.append(
                {
                    "naive": -x * d,
                    "unclipped": -ratio * d,
                    "clipped": -min(ratio * d, clipped * d),
                    "gspo": -min(ratio * d, clipped * d),
                    "cispo": -min(ratio, 1 + high) * d * x,
                }[mode]
            )
    return statistics.mean(terms)


@pytest.mark.parametrize("mode", gs.LOSSES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("high", [None, 0.5])
def test_losses_agree_with_plain_python(mode, per_token, high):
    generator = torch.Generator().manual_seed(4)
    shape = (2, 3, 4, 5)  # run, batch, trial, pos
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    new = old + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = torch.randn(shape if per_token else shape[:-1], generator=generator).double()
    loss = gs.compute_loss(new, deltas, mode, old, epsilon=0.2, epsilon_high=high)
    assert loss.shape == (2,)
    full = deltas if per_token else deltas.unsqueeze(-1).expand(shape)
    for run in range(2):
        wanted = plain_loss(
            new[run].tolist(), old[run].tolist(), full[run].tolist(), mode, 0.2, high or 0.2
        )
        assert loss[run].item() == pytest.approx(wanted)
        alone = gs.compute_loss(new[run], deltas[run], mode, old[run], 0.2, high)
        assert alone.shape == () and alone.item() == pytest.approx(wanted)


@pytest.mark.parametrize("mode", gs.LOSSES)
def test_gradients_of_the_losses_agree_with_finite_differences(mode):
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(1, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    new = (old + 0.3 * torch.randn(1, 2, 3, generator=generator).double()).requires_grad_()
    deltas = torch.tensor([[1.5, -0.7]], dtype=torch.float64)
    gs.compute_loss(new, deltas, mode, old).backward()
    ratio = (new - old).exp().detach()
    for i, t in itertools.product(range(2), range(3)):
        step = torch.zeros_like(new)
        step[0, i, t] = 1e-6
        with torch.no_grad():
            up, down = (gs.compute_loss(new + s, deltas, mode, old) for s in (step, -step))
        wanted = ((up - down) / 2e-6).item()
        if mode == "cispo":  # its weight is a constant, which a finite difference does not know
            wanted = (-ratio[0, i, t].clamp(max=1.2) * deltas[0, i] / 6).item()
        assert new.grad[0, i, t].item() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(
    "ratio, delta, has_gradient",
    [
        (1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True),
    ],
)  # fmt: skip
def test_the_clip_is_one_sided(ratio, delta, has_gradient):
    # Without the minimum, a token that moved the wrong way could never come back.
    log_prob = torch.full((1, 1, 1), math.log(ratio) - 1, requires_grad=True)
    gs.compute_loss(log_prob, torch.tensor([[delta]]), "clipped", torch.full((1, 1, 1), -1.0)).backward()
    assert (log_prob.grad.item() != 0) == has_gradient
    if has_gradient:
        assert math.copysign(1, -log_prob.grad.item()) == delta


def test_all_losses_have_the_policy_gradient_on_policy():
    log_probs = (-torch.rand(2, 3, 4) - 0.1).requires_grad_()
    deltas = torch.randn(2, 3)
    wanted = -deltas.unsqueeze(-1).expand(2, 3, 4) / 24
    for mode in gs.LOSSES:
        log_probs.grad = None
        # old_log_probs with a gradient of their own, as when one forgets to freeze them
        gs.compute_loss(log_probs, deltas, mode, log_probs * 1.0).backward()
        assert torch.allclose(log_probs.grad, wanted, atol=1e-7), mode


# --------------------------------------------------------------------------------------------------
# KL, entropy, GAE, critic


def test_kl_estimators_by_hand():
    log_probs, ref = torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[-1.5, -1.0]]])
    x = [-0.5, 1.0]  # log π_ref − log π
    values = {
        "k1": -sum(x),
        "k2": sum(v * v / 2 for v in x),
        "k3": sum(math.exp(v) - v - 1 for v in x),
    }
    for estimator, wanted in values.items():
        kl = gs.compute_kl_penalty(log_probs, ref, estimator)
        assert kl.shape == () and kl.item() == pytest.approx(wanted)
    assert gs.compute_kl_penalty(log_probs, ref).item() == pytest.approx(values["k3"])


def test_entropy_and_exact_kl_agree_with_plain_python():
    model, ref = make_model(seed=1), make_model(seed=2)
    entropies, kls = [], []
    for row, ref_row in zip(model(PROMPTS).flatten(0, 1), ref(PROMPTS).flatten(0, 1)):
        p, q = softmax(row.tolist()), softmax(ref_row.tolist())
        entropies.append(-sum(x * math.log(x) for x in p))
        kls.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
    assert gs.compute_entropy(PROMPTS, model).item() == pytest.approx(statistics.mean(entropies), rel=1e-4)
    assert gs.compute_exact_kl(PROMPTS, model, ref).item() == pytest.approx(sum(kls) / 3, rel=1e-4)


def test_gae_is_the_discounted_sum_of_its_definition():
    rewards, values = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    gamma, lam = 0.9, 0.7
    advantages, returns = gs.compute_gae(rewards, values, gamma, lam)
    v = torch.cat([values, torch.zeros(2, 3, 1)], dim=-1)
    for t in range(5):
        wanted = sum(
            (gamma * lam) ** (k - t) * (rewards[..., k] + gamma * v[..., k + 1] - v[..., k])
            for k in range(t, 5)
        )
        assert torch.allclose(advantages[..., t], wanted)
    assert torch.allclose(returns, advantages + values)
    # λ = 1, γ = 1: the reward that is still to come, minus V
    to_come, _ = gs.compute_gae(rewards, values, 1.0, 1.0)
    assert torch.allclose(to_come, rewards.flip(-1).cumsum(-1).flip(-1) - values)


def test_gae_gives_constants():
    values = torch.randn(1, 2, 3, requires_grad=True)
    assert not any(x.requires_grad for x in gs.compute_gae(torch.ones(1, 2, 3), values))


def test_the_critic_does_not_see_the_token_that_it_judges():
    critic = gs.Critic(5, 3, 3, generator=torch.Generator().manual_seed(0))
    critic.value_weights.data.normal_(generator=torch.Generator().manual_seed(1))
    responses = torch.zeros(3, 1, 3, dtype=torch.long)
    before = critic(PROMPTS, responses)
    responses[..., 1] = 4
    change = (critic(PROMPTS, responses) - before).abs().amax(dim=(0, 1))
    assert change[0] == change[1] == 0 and change[2] > 1e-3


def test_the_critic_takes_a_run_axis():
    critic = gs.Critic(5, 3, 3, num_runs=2, generator=torch.Generator().manual_seed(0))
    critic.value_weights.data.normal_(generator=torch.Generator().manual_seed(1))
    responses = torch.randint(5, (2, 3, 4, 3))
    values = critic(PROMPTS, responses)
    one = gs.Critic(5, 3, 3)
    one.load_state_dict({name: p[1] for name, p in critic.state_dict().items()})
    assert values.shape == (2, 3, 4, 3)
    assert torch.allclose(values[1], one(PROMPTS, responses[1]), atol=1e-6)


def test_erratum_7_the_critic_learns_the_mean_reward(monkeypatch):
    # With the value loss on the wrong side of the objective, V runs away from the rewards.
    critics = []

    class Spy(gs.Critic):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            critics.append(self)

    monkeypatch.setattr(gs, "Critic", Spy)
    result = gs.run_policy_gradient(**gs.RECIPE | dict(deltas_mode="gae", num_runs=4, num_epochs=60))
    first_values = critics[0](PROMPTS, sample(result.model))[..., 0]
    assert result.records[-1]["mean_reward"] > 2.7
    assert (first_values.mean() - result.records[-1]["mean_reward"]).abs() < 0.2


# --------------------------------------------------------------------------------------------------
# The theory, by enumeration


@pytest.fixture(scope="module")
def gradients():
    return gs.measure_gradients(num_runs=4, seed=0)


def test_scores_are_gradients_of_log_probs_and_average_to_zero():
    model = make_model(num_runs=2, double=True)
    everything = gs.enumerate_responses(5, 3)
    scores = gs.compute_scores(PROMPTS, everything, model)  # [run batch trial params]
    probs = gs.compute_log_probs(PROMPTS, everything.expand(3, -1, -1), model).sum(-1).exp()
    assert torch.einsum("rbt,rbtp->rbp", probs, scores).abs().max() < 1e-12

    def log_prob(shift):  # of response 77 to prompt 1 in run 1, with one weight moved
        moved = make_model(num_runs=2, double=True)
        moved.embedding.data[1, 2, 3] += shift
        return gs.compute_log_probs(PROMPTS, everything.expand(3, -1, -1), moved)[1, 1, 77].sum().item()

    wanted = (log_prob(1e-6) - log_prob(-1e-6)) / 2e-6
    assert scores[1, 1, 77, 2 * 4 + 3].item() == pytest.approx(wanted, rel=1e-5)


def test_the_exact_gradient_is_that_of_the_expected_reward_by_finite_differences():
    model = make_model(num_runs=1, double=True)
    everything = gs.enumerate_responses(5, 3).expand(3, -1, -1)
    rewards = gs.sort_distance_reward(PROMPTS, everything).double()[None]

    def expected_reward():
        probs = gs.compute_log_probs(PROMPTS, everything, model).sum(-1).exp()
        return (probs * rewards).sum().item() / 3

    probs = gs.compute_log_probs(PROMPTS, everything, model).sum(-1).exp().detach()
    scores = gs.compute_scores(PROMPTS, everything[0], model)
    gradient = torch.einsum("rbt,rbtp->rp", probs * rewards, scores)[0] / 3
    for i, (row, column) in ((0, (0, 0)), (13, (3, 1))):
        model.embedding.data[0, row, column] += 1e-5
        up = expected_reward()
        model.embedding.data[0, row, column] -= 2e-5
        down = expected_reward()
        model.embedding.data[0, row, column] += 1e-5
        assert gradient[i].item() == pytest.approx((up - down) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_the_expected_update_agrees_with_sampled_groups(mode):
    # The enumeration over reward groups, checked against what training really does: sample, average.
    model = make_model(num_runs=1, init_scale=0.7)
    everything = gs.enumerate_responses(5, 3)
    grid = everything.expand(3, -1, -1)
    probs = gs.compute_log_probs(PROMPTS, grid, model).sum(-1).exp().detach()
    scores = gs.compute_scores(PROMPTS, everything, model)
    rewards = gs.sort_distance_reward(PROMPTS, grid)[None]
    mean, variance = gs.expected_update(probs, rewards, scores, mode, group_size=3)

    draws = 20_000
    chosen = torch.multinomial(
        probs[0], draws * 3, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    chosen = chosen.view(3, draws, 3).transpose(0, 1)  # [draw batch trial]
    sampled = rewards[0].expand(draws, -1, -1).gather(2, chosen)
    deltas = gs.compute_deltas(sampled, mode)
    updates = torch.zeros(draws, scores.shape[-1])
    for b, i in itertools.product(range(3), range(3)):
        updates += deltas[:, b, i, None] * scores[0, b][chosen[:, b, i]] / 9
    # The squared distance of the two means should be about variance/draws.
    assert (updates.mean(0) - mean[0]).square().sum() < 3 * variance[0] / draws
    assert updates.var(0).sum().item() == pytest.approx(variance[0].item(), rel=0.05)


def test_theory_which_deltas_are_unbiased(gradients):
    rows = {mode: gradients["6a", mode] for mode in gs.DELTAS}
    for mode, length in (("rewards", 1), ("leave_one_out", 1), ("centered_rewards", 3 / 4)):
        assert rows[mode]["cosine"].tolist() == pytest.approx([1] * 4, abs=1e-4)
        assert rows[mode]["length"].tolist() == pytest.approx([length] * 4, abs=1e-3)
    assert (rows["normalized_rewards"]["cosine"] < 0.9999).all()
    assert (rows["max_rewards"]["cosine"] < 0.9999).all()
    # What a baseline is for: less noise, and leave-one-out only rescales the centred update.
    assert (rows["leave_one_out"]["noise"] < 0.8 * rows["rewards"]["noise"]).all()
    assert torch.allclose(rows["leave_one_out"]["noise"], rows["centered_rewards"]["noise"], rtol=1e-3)


def test_erratum_1_the_quotient_of_log_probs_unlearns(gradients):
    assert (gradients["6b", "exp(log π − log π_old)"]["cosine"] > 0.9999).all()
    assert (gradients["6b", "log π / log π_old"]["cosine"] < -0.9).all()


def test_erratum_6_which_kl_each_estimator_minimises(gradients):
    k1, k2, k3 = (gradients["6c", k] for k in ("k1", "k2", "k3"))
    assert (k2["error_to_ref"] < 1e-3).all() and (k2["error_from_ref"] > 0.1).all()
    assert (k3["error_from_ref"] < 1e-3).all() and (k3["error_to_ref"] > 0.1).all()
    # no gradient at all, as far from the one as from the other, although …
    assert torch.allclose(k1["error_to_ref"], torch.ones(4), atol=1e-3)
    assert torch.allclose(k1["error_from_ref"], torch.ones(4), atol=1e-3)
    for k in (k1, k3):  # … its value is unbiased, as that of k3
        assert k["value"].tolist() == pytest.approx([1] * 4, abs=1e-3)


def test_erratum_6_the_penalty_pulls_to_the_reference_not_to_the_old_policy():
    strong = gs.RECIPE | dict(kl_penalty=10.0, num_runs=4, num_epochs=60, compute_ref_model_period=60)
    held, free = (gs.run_policy_gradient(**strong | dict(kl_penalty=k)) for k in (10.0, 0.0))
    assert held.records[-1]["kl"] < 0.05 < free.records[-1]["kl"]  # "kl" is to the reference of epoch 0


# --------------------------------------------------------------------------------------------------
# Training


def test_the_recipe_sorts_everything_in_every_run():
    result = gs.run_policy_gradient(**gs.RECIPE, num_runs=32)
    assert result.exact_match.tolist() == [1.0] * 32
    assert result.records[-1]["exact_match"] == 1.0 and len(result.records) == 100
    assert result.records[-1]["step"] == 1000 and result.prompts.tolist() == PROMPTS.tolist()
    needed = {"epoch", "step", "loss", "mean_reward", "exact_match", "entropy", "kl"}
    assert all(needed <= set(record) for record in result.records)


def test_the_classic_defaults_do_not():
    result = gs.run_policy_gradient(num_runs=32)
    assert result.exact_match.shape == (32,) and result.exact_match.mean() < 0.3


def test_erratum_3_the_classic_start_is_saturated_and_a_flat_one_is_not():
    starts = gs.measure_starts(num_runs=200, seed=1)
    classic, flat = starts["2a", "init_scale 1.0"], starts["2a", "init_scale 0.1"]
    assert classic["entropy"].mean() < 0.6 and classic["top"].mean() > 0.75
    assert flat["entropy"].mean() > 1.55  # of log 5 = 1.609
    # The algorithm is the same; only the start differs.
    recipe = dict(num_runs=16, num_epochs=30)
    stuck = gs.run_policy_gradient(**gs.RECIPE | recipe | dict(init_scale=1.0))
    free = gs.run_policy_gradient(**gs.RECIPE | recipe)
    assert stuck.exact_match.mean() < 0.5 < 0.9 < free.exact_match.mean()


def test_erratum_4_a_module_has_no_clone_and_the_reference_is_frozen():
    assert not hasattr(torch.nn.Module, "clone")
    kls = []
    settings = gs.RECIPE | dict(num_epochs=12, compute_ref_model_period=4, kl_penalty=0.1, num_runs=2)
    gs.run_policy_gradient(**settings, on_epoch=lambda record, *_: kls.append(record["kl"]))
    # It grows while the reference stands still and falls back when that is refreshed. A reference
    # that shares the model's weights would give 0 throughout.
    assert kls[3] > kls[0] > 1e-4 and kls[4] < kls[3]


@pytest.mark.parametrize("change", [
    dict(deltas_mode="process"), dict(deltas_mode="gae"), dict(loss_mode="gspo"), dict(loss_mode="cispo"),
    dict(deltas_mode="centered_rewards"), dict(deltas_mode="leave_one_out"),
    dict(deltas_mode="batch_normalized"), dict(entropy_bonus=0.05), dict(kl_penalty=0.1, kl_estimator="k2"),
])  # fmt: skip
def test_every_variant_learns(change):
    # A reversed sign anywhere fails here: 30 epochs would end near zero.
    result = gs.run_policy_gradient(**gs.RECIPE | change | dict(num_runs=8, num_epochs=30))
    assert result.exact_match.mean() > 0.8


def test_unlearning_is_visible():
    # The control for the test above: with the reward negated, nothing is sorted.
    def negated(prompts, responses):
        return -gs.sort_distance_reward(prompts, responses)

    result = gs.run_policy_gradient(**gs.RECIPE | dict(reward_fn=negated, num_runs=8, num_epochs=30))
    assert result.exact_match.mean() == 0 and result.records[-1]["mean_reward"] > -0.2


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    settings = gs.RECIPE | dict(num_epochs=4, num_runs=3)
    one, two, other = (gs.run_policy_gradient(**settings, seed=s) for s in (0, 0, 1))
    assert one.records == two.records != other.records
    for p, q in zip(one.model.parameters(), two.model.parameters()):
        assert torch.equal(p, q)


def test_a_training_step_is_each_runs_own_gradient(monkeypatch):
    # Adam hides a wrong scale of the gradient, so it is replaced by plain gradient descent here.
    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, lr))
    seen = []
    settings = dict(num_runs=3, num_epochs=1, num_steps_per_epoch=1, learning_rate=0.5, seed=7)
    result = gs.run_policy_gradient(
        **gs.RECIPE | settings, entropy_bonus=0.1, on_epoch=lambda *args: seen.append(args)
    )
    _, prompts, responses, _, deltas = seen[0]
    for run in range(3):
        start = gs.Model(5, 10, 3, 3, 0.1, 3, torch.Generator().manual_seed(7)).state_dict()
        one = gs.Model(5, 10, 3, 3)
        one.load_state_dict({name: p[run] for name, p in start.items()})
        log_probs = gs.compute_log_probs(prompts, responses[run], one)
        loss = gs.compute_loss(log_probs, deltas[run], "naive")
        (loss - 0.1 * gs.compute_entropy(prompts, one)).backward()
        for p, trained in zip(one.parameters(), result.model.parameters()):
            assert torch.allclose(p - 0.5 * p.grad, trained[run], atol=1e-6)
            assert p.grad.abs().max() > 1e-5


def test_annealing_takes_the_learning_rate_down_to_zero(monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: Spy(p, lr))
    settings = dict(num_epochs=4, num_steps_per_epoch=1, learning_rate=0.4)
    gs.run_policy_gradient(**gs.RECIPE | settings, anneal=True)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    rates.clear()
    gs.run_policy_gradient(**gs.RECIPE | settings)
    assert rates == [0.4] * 4


def test_the_entropy_bonus_keeps_the_policy_open():
    settings = gs.RECIPE | dict(num_epochs=30, num_runs=4)
    plain, bonus = (gs.run_policy_gradient(**settings, entropy_bonus=c) for c in (0.0, 1.0))
    assert bonus.records[-1]["entropy"] > 3 * plain.records[-1]["entropy"]


def test_prompts_of_ones_own_and_batches_of_them():
    train, unseen = gs.split_prompts(4, 3, num_train=40, num_runs=2, seed=0)
    assert train.shape == (2, 40, 3) and unseen.shape == (2, 24, 3)
    for run in range(2):
        seen, rest = ({tuple(p) for p in x[run].tolist()} for x in (train, unseen))
        assert len(seen) == 40 and len(rest) == 24 and not seen & rest
        assert {(0, 0, 0), (3, 3, 3)} <= seen
    assert not torch.equal(train[0], train[1])
    result = gs.run_policy_gradient(
        **gs.UNSEEN_RECIPE, prompts=train, batch_size=16, num_runs=2, num_epochs=200
    )
    assert result.exact_match.min() > 0.7
    assert gs.compute_exact_match(unseen, result.model).min() > 0.4


@pytest.mark.parametrize("objective, bound", [("log_likelihood", 0.95), ("expected_reward", 0.5)])
def test_training_on_the_answers(objective, bound):
    row = gs.measure_unseen(
        4, 3, 50, num_runs=2, seed=0, objective=objective, num_epochs=400, batch_size=32, entropy_bonus=0.1
    )
    assert row["train"].mean() > bound and isinstance(row["worst"], str)


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("call, words", [
    (lambda: gs.compute_deltas(torch.ones(2, 3), "mean"), "mode 'mean'.*leave_one_out"),
    (lambda: gs.compute_deltas(torch.ones(3), "rewards"), "rewards must be .batch trial."),
    (lambda: gs.compute_deltas(torch.ones(2, 1), "normalized_rewards"), "rewards needs"),
    (lambda: gs.compute_deltas(torch.ones(2, 1), "leave_one_out"), "rewards needs"),
    (lambda: gs.compute_deltas(torch.ones(2, 1), "batch_normalized"), "rewards needs"),
    (lambda: gs.compute_process_deltas(torch.ones(2, 1, 1)), "step_rewards.*two steps"),
    (lambda: gs.compute_process_deltas(torch.ones(2, 3)), "step_rewards must be"),
    (lambda: gs.compute_loss(torch.ones(2, 3, 4), torch.ones(2, 3), "ppo"), "mode 'ppo'.*cispo"),
    (lambda: gs.compute_loss(torch.ones(2, 3, 4), torch.ones(2, 3), "clipped"), "old_log_probs"),
    (lambda: gs.compute_loss(torch.ones(2, 3, 4), torch.ones(3, 2), "naive"), "deltas"),
    (lambda: gs.compute_loss(torch.ones(2, 3), torch.ones(2), "naive"), "log_probs must be"),
    (lambda: gs.compute_loss(torch.ones(2, 3, 4), torch.ones(2, 3), "gspo", torch.ones(2, 3)), "old_log"),
    (lambda: gs.compute_kl_penalty(torch.ones(2, 3, 4), torch.ones(2, 3, 4), "k4"), "estimator 'k4'.*k3"),
    (lambda: gs.compute_kl_penalty(torch.ones(2, 3, 4), torch.ones(2, 3)), "ref_log_probs"),
    (lambda: gs.compute_gae(torch.ones(2, 3, 4), torch.ones(2, 3)), "token_rewards and values"),
    (lambda: gs.compute_reward(PROMPTS, torch.ones(2, 4, 3).long(), gs.sort_distance_reward), "same batch"),
    (lambda: gs.sort_distance_reward(PROMPTS, torch.ones(3, 4, 1).long()), "same batch and pos, not"),
    (lambda: gs.compute_log_probs(PROMPTS, torch.ones(3, 4, 2).long(), make_model()), "responses must be"),
    (lambda: make_model()(torch.ones(3, 2).long()), "prompt_length"),
])  # fmt: skip
def test_functions_refuse_what_cannot_work(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("arguments, words", [
    (dict(prompts=[1, 2, 3]), "prompts must be"), (dict(prompts=[[0.5, 1.0]]), "prompts must be"),
    (dict(prompts=[[[1, 2]]], num_runs=2), "prompts has 1 runs"), (dict(prompts=[[-1, 2]]), "prompts must be at least 0"),
    (dict(prompts=[[1, 9]], vocab_size=5), "prompts must be at least 0"), (dict(deltas_mode="ppo"), "deltas_mode.*gae"),
    (dict(loss_mode="ppo"), "loss_mode.*gspo"), (dict(kl_estimator="k4"), "kl_estimator.*k3"),
    (dict(num_epochs=0), "num_epochs"), (dict(num_steps_per_epoch=0), "num_steps"), (dict(num_runs=0), "num_runs"),
    (dict(compute_ref_model_period=0), "compute_ref"), (dict(num_responses=0), "num_responses"),
    (dict(num_responses=1, deltas_mode="normalized_rewards"), "rewards needs"),
    (dict(learning_rate=0.0), "learning_rate"), (dict(learning_rate=math.nan), "learning_rate"),
    (dict(init_scale=0.0), "init_scale"), (dict(epsilon=1.0), "epsilon"), (dict(epsilon_high=-1.0), "epsilon_high"),
    (dict(kl_penalty=-1.0), "kl_penalty"), (dict(entropy_bonus=-1.0), "entropy_bonus"),
    (dict(batch_size=0), "batch_size"), (dict(embedding_dim=0), "embedding_dim"), (dict(seed=-1), "seed"),
])  # fmt: skip
def test_training_refuses_what_cannot_work(arguments, words):
    with pytest.raises(ValueError, match=words):
        gs.run_policy_gradient(**arguments)


# --------------------------------------------------------------------------------------------------
# The study and the command line


def test_the_interval_is_students_t():
    # t(0.975) for 7 and 31 degrees of freedom: 2.364624, 2.039513 (tables)
    for n, t in ((8, 2.364624), (32, 2.039513)):
        values = [float(i % 3) for i in range(n)]
        mean, half = gs.mean_and_interval(values)
        assert mean == pytest.approx(statistics.mean(values))
        assert half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=1e-3)


def command(*arguments, **kwargs):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, str(HERE / "grpo_sort.py"), *arguments],
        capture_output=True, encoding="utf-8", env=environment, timeout=120, **kwargs,
    )  # fmt: skip


def test_the_quick_study_end_to_end_keeps_what_it_does_not_measure(tmp_path):
    old = {"experiment": "4b", "label": "G = 3", "exact_match": [0.5, 1.0], "solved": [0.0, 1.0], "epochs": [9.0, 8.0]}
    (tmp_path / "results.json").write_text(json.dumps({"rows": [old]}))
    done = command("--quick", "--runs", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "prompt [1 0 2]" in done.stdout and "What the study found" in done.stdout
    rows = gs.load_rows(tmp_path / "results.json")
    assert rows["4b", "G = 3"] == old and "G = 3" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "G = 3" not in done.stdout  # it prints what it measured
    recipe = rows["2b", "+ learning rate 5e-3 (the recipe)"]
    assert len(recipe["exact_match"]) == 2 and recipe["settings"]["seed"] == 0
    assert recipe["settings"]["reward_fn"] == "sort_distance_reward" and recipe["made"]["torch"]
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_seed_gives_the_same_study(tmp_path):
    tables = []
    for name in ("a", "b"):
        assert gs.main(["--quick", "--runs", "2", "--no-plots", "--out", str(tmp_path / name)]) == 0
        tables.append((tmp_path / name / "tables.md").read_text(encoding="utf-8"))
        assert not list((tmp_path / name).glob("*.png"))
    assert tables[0] == tables[1]


def test_an_interrupted_study_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    plan, calls = gs.plan_study, []

    def third_call_interrupted(**settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gs.measure_training(**settings, num_epochs=2)

    def planned(*args):
        return [(e, label, third_call_interrupted, s) for e, label, _, s in plan(*args)]

    monkeypatch.setattr(gs, "plan_study", planned)
    assert gs.main(["--quick", "--runs", "2", "--no-plots", "--out", str(tmp_path)]) == 130
    rows = gs.load_rows(tmp_path / "results.json")
    assert [key for key in rows if key[0] == "1"] == [("1", "rewards"), ("1", "centered_rewards")]
    assert "interrupted" in capsys.readouterr().out and (tmp_path / "tables.md").exists()


def test_a_missing_matplotlib_costs_the_plots_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gs.importlib.util, "find_spec", lambda name: None)
    original = gs.plan_study
    monkeypatch.setattr(gs, "plan_study", lambda *a: original(*a)[:1])
    assert gs.main(["--quick", "--runs", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert "matplotlib is not installed" in out.err and (tmp_path / "tables.md").exists()


def test_one_variant_is_printed_as_it_learns():
    done = command("--delta", "centered_rewards", "--loss", "cispo", "--reward", "exact", "--kl", "0.01",
                   "--kl-estimator", "k2", "--num-epochs", "6", "--runs", "3", "--prompts", "2,0", "1,3")  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    for words in ("epoch 0: mean reward", "prompt [2, 0]", "response [", "delta ", "of 3 runs sort every prompt"):
        assert words in done.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--runs", "0"], "--runs must be at least 1"), (["--seed", "-1"], "--seed must be between"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"), (["--delta", "x"], "invalid choice"),
    (["--quick", "--full"], "exclude each other"), (["--quick", "--loss", "naive"], "belong to the study"),
    (["--prompts", "3,2,4", "1,2"], "same length"), (["--prompts", "a,b"], "--prompts"),
    (["--prompts", "3,-2"], "0 to 999"), (["--prompts", "1,99999999999"], "0 to 999"),
    (["--learning-rate", "1e30", "--runs", "1"], "lower learning_rate"), (["--num-epochs", "0"], "num_epochs must be at least 1"),
    (["--num-responses", "1"], "trials"), (["--epsilon", "2"], "epsilon must be above 0 and below 1"),
    (["--kl", "nan"], "kl_penalty must be"), (["--learning-rate", "-1"], "learning_rate must be"),
    (["--out", "/dev/null/x"], "can't be written"), (["--nonsense"], "unrecognized"),
])  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        gs.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_results_of_something_else_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("my thesis")
    with pytest.raises(SystemExit) as stop:
        gs.main(["--quick", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "move it away" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "my thesis"


def test_a_failing_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gs, "run_study", full)
    with pytest.raises(SystemExit) as stop:
        gs.main(["--quick", "--out", str(tmp_path)])
    assert stop.value.code == 1 and "No space left on device" in capsys.readouterr().err


def test_importing_does_no_work_and_help_is_readable(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import grpo_sort, torch; print(torch.initial_seed())"
    code += "; print('matplotlib' in sys.modules)"
    quiet = subprocess.run([sys.executable, "-c", code, str(HERE)], capture_output=True, text=True, cwd=tmp_path)
    assert quiet.stdout.split()[1:] == ["False"] and quiet.stderr == "" and not list(tmp_path.iterdir())
    shown = command("--help")
    assert shown.returncode == 0 and "--full" in shown.stdout and max(map(len, shown.stdout.split("\n"))) <= 100


# --------------------------------------------------------------------------------------------------
# The file as something to copy from, and the README


@pytest.mark.parametrize("name", [
    "compute_deltas", "compute_process_deltas", "compute_loss", "compute_kl_penalty", "compute_gae",
])  # fmt: skip
def test_functions_lift_out_with_the_imports_that_they_name(name):
    node = next(n for n in ast.parse(SORT_SOURCE).body if getattr(n, "name", "") == name)
    assert "Needs: torch." in ast.get_docstring(node)
    space = {"torch": torch}
    exec(ast.get_source_segment(SORT_SOURCE, node), space)  # nothing else of the file is there
    x, rewards = -torch.rand(2, 3, 4), torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 1.0]])
    arguments = {
        "compute_deltas": [(rewards, mode) for mode in gs.DELTAS],
        "compute_process_deltas": [(x,)],
        "compute_loss": [(x, rewards, mode, x - 0.1) for mode in gs.LOSSES],
        "compute_kl_penalty": [(x, x - 0.1, k) for k in ("k1", "k2", "k3")],
        "compute_gae": [(x, x)],
    }[name]
    for args in arguments:
        lifted, original = space[name](*args), getattr(gs, name)(*args)
        for a, b in zip(lifted, original) if isinstance(lifted, tuple) else [(lifted, original)]:
            assert torch.equal(a, b)


def test_the_copied_file_knows_what_it_needs():
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SORT_SOURCE).group(1)
    inline = ast.literal_eval(re.search(r"dependencies = (\[.*?\])", block).group(1))
    required = (HERE / "requirements.txt").read_text().split("\n")
    assert set(inline) <= {line.split("#")[0].strip() for line in required}
    assert 'requires-python = ">=3.10"' in block


def test_the_readmes_example_of_a_reward_of_ones_own_works(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    exec(example, {})
    assert capsys.readouterr().out.strip() == "3.0" and "# 3.0;" in example


def test_the_numbered_lines_are_listed_in_the_readme():
    marked = set(re.findall(r"# \(!(\d+)\)", SORT_SOURCE))
    assert marked and marked == set(re.findall(r"(?m)^\| \(!(\d+)\)", README))


def test_the_committed_results_meet_the_targets():
    rows = gs.load_rows(RESULTS / "results.json")
    assert rows["2b", "+ learning rate 5e-3 (the recipe)"]["exact_match"] == [1.0] * 32
    for task in ("5a", "5b"):
        unseen = rows[task, "GRPO, recommended"]["unseen"]
        assert len(unseen) >= 8 and statistics.mean(unseen) >= 0.99
    planned = {(e, label) for e, label, *_ in gs.plan_study(32, 0, full=True)}
    assert planned <= set(rows)  # --full made it, all of it
    for (experiment, _), row in rows.items():
        counts = [len(v) for k, v in row.items() if k in ("exact_match", "unseen", "cosine", "value", "top")]
        assert min(counts) >= (8 if experiment[0] == "5" else 32)


def test_tables_and_findings_are_those_of_the_results():
    rows = gs.load_rows(RESULTS / "results.json")
    text = (RESULTS / "tables.md").read_text(encoding="utf-8")
    for part in (*gs.format_tables(rows).values(), *gs.findings(rows)):
        assert part in text
    assert len(gs.findings(rows)) == len(gs.FINDINGS)


def test_the_numbers_in_the_readme_are_those_of_the_results():
    tables = (RESULTS / "tables.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- from (results/\S+) -->\n(.*?)<!-- end -->", README, re.S)
    assert len(blocks) >= 2
    for source, block in blocks:
        text = (HERE / source).read_text(encoding="utf-8")
        for line in filter(str.strip, block.split("\n")):
            assert line in text, f"README.md quotes {source}, which does not say: {line}"
    # Outside these blocks no measured figure: a mean with its interval stands nowhere else.
    rest = re.sub(r"<!-- from .*?<!-- end -->", "", README, flags=re.S)
    for number in re.findall(r"-?[\d.,]+ ± [\d.]+", rest):
        assert number in tables, f"README.md says {number}, results/ does not"
    for image in re.findall(r"!\[.*?\]\((results/\S+?)\)", README):
        assert (HERE / image).exists()
