# SPDX-License-Identifier: MIT
"""Tests of grpo_sort.py and grpo_gsm8k.py. Run with `python -m pytest test_grpo.py`.

Each test says which mistake it guards against. What is expected is worked out by hand, by plain
Python loops, by enumeration of all responses or by finite differences, not by the code under test.
Tests named test_erratum_N prove row N of the errata table in README.md.
"""

import argparse
import ast
import copy
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
if __name__ != "__main__":
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the models are tiny, and the machine may be busy

import pytest
import torch

import grpo_gsm8k as gsm
import grpo_sort as gs

HERE = Path(__file__).resolve().parent
RESULTS, GSM_RESULTS = HERE / "results" / "sort", HERE / "results" / "gsm8k"
sys.path.insert(0, str(RESULTS))
import study as sort_study

PROMPTS = torch.tensor(gs.CLASSIC_PROMPTS)  # [batch pos]
EVERYTHING = torch.tensor(list(itertools.product(range(5), repeat=3)))  # all responses: [trial pos]
SORT_SOURCE = (HERE / "grpo_sort.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")


def make_model(num_runs=None, seed=0, init_scale=1.0, double=False):
    generator = torch.Generator().manual_seed(seed)
    model = gs.Model(5, 4, 3, 3, init_scale, num_runs, generator)
    return model.double() if double else model


def sample(model, num_responses=6, seed=0):
    return gs.generate_responses(PROMPTS, model, num_responses, torch.Generator().manual_seed(seed))


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


# --------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("prompt", [(3, 1, 0), (1, 1, 2), (4, 4, 4), (0, 3, 0)])
def test_rewards_agree_with_plain_python_on_every_response(prompt):
    everything = EVERYTHING.tolist()
    prompts, responses, target = torch.tensor([prompt]), EVERYTHING[None], sorted(prompt)
    distance = [sum(x == y for x, y in zip(r, target)) for r in everything]
    inclusion = [
        sum(x in r for x in prompt) + sum(x <= y for x, y in zip(r, r[1:])) for r in everything
    ]
    assert gs.sort_distance_reward(prompts, responses)[0].tolist() == distance
    assert gs.sort_inclusion_ordering_reward(prompts, responses)[0].tolist() == inclusion
    assert gs.exact_sort_reward(prompts, responses)[0].tolist() == [r == target for r in everything]
    steps = gs.sort_step_rewards(prompts, responses)
    assert steps[0].tolist() == [[x == y for x, y in zip(r, target)] for r in everything]


@pytest.mark.parametrize("reward", gs.REWARDS.values())
def test_rewards_take_a_run_axis(reward):
    responses = torch.randint(5, (7, 3, 4, 3), generator=torch.Generator().manual_seed(0))
    together = gs.compute_reward(PROMPTS, responses, reward)
    assert together.shape == (7, 3, 4) and together.dtype == torch.float32
    for run in range(7):
        assert torch.equal(together[run], gs.compute_reward(PROMPTS, responses[run], reward))


@pytest.mark.parametrize("reward", [
    gs.sort_step_rewards,  # [batch trial pos]: would train, its positions taken for trials
    lambda prompts, responses: gs.sort_distance_reward(prompts, responses).mean(-1),
])  # fmt: skip
def test_a_reward_of_another_shape_is_refused(reward):
    with pytest.raises(ValueError):
        gs.compute_reward(PROMPTS, sample(make_model()), reward)
    with pytest.raises(ValueError):
        gs.run_policy_gradient(**gs.RECIPE | dict(reward_fn=reward, num_epochs=1, num_responses=3))


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


def test_sorting_greedily_takes_the_likeliest_token_everywhere():
    # A sum or a mean over the positions would call a response right that is so in part.
    settings = gs.RECIPE | dict(prompts=EVERYTHING, num_epochs=5, num_runs=2)
    model = gs.run_policy_gradient(**settings).model  # half-trained
    found = gs.sorts_greedily(EVERYTHING, model)
    assert found.shape == (2, 125) and found.dtype == torch.bool and 0 < found.sum() < 250
    logits = model(EVERYTHING).tolist()  # [run][prompt][pos][vocab]
    for run in range(2):
        likeliest = [[row.index(max(row)) for row in rows] for rows in logits[run]]
        right = [r == sorted(p) for r, p in zip(likeliest, EVERYTHING.tolist())]
        assert found[run].tolist() == right


def test_log_probs_are_those_of_the_chosen_tokens_and_sum_to_one():
    model = make_model(num_runs=2, double=True)
    log_probs = gs.compute_log_probs(PROMPTS, EVERYTHING.expand(3, -1, -1), model)
    assert log_probs.shape == (2, 3, 125, 3)
    assert torch.allclose(log_probs.sum(-1).exp().sum(-1), torch.ones(2, 3).double())
    probs = softmax(model(PROMPTS)[1, 2, 0].tolist())  # run 1, prompt 2, position 0
    i = EVERYTHING.tolist().index([4, 0, 2])
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
    mean, others = statistics.mean(group), group[:i] + group[i + 1 :]
    everything = [x for g in batch for x in g]
    return {
        "rewards": lambda: r,
        "centered_rewards": lambda: r - mean,
        "normalized_rewards": lambda: (r - mean) / (statistics.stdev(group) + 1e-5),
        "max_rewards": lambda: r if r == max(group) else 0.0,
        "leave_one_out": lambda: r - statistics.mean(others),
        "batch_normalized": lambda: (r - mean) / (statistics.stdev(everything) + 1e-5),
        "max_likelihood": lambda: (r - mean) / mean if mean > 0 else 0.0,
    }[mode]()


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_deltas_agree_with_plain_python(mode):
    rng = random.Random(1)
    runs = [[[float(rng.randint(0, 4)) for _ in range(5)] for _ in range(3)] for _ in range(4)]
    runs[0][1] = [-2.0, 1.0, 0.0, -3.0, 0.0]  # mean < 0
    runs[1][2] = [-1.0, 1.0, 0.0, -1.0, 1.0]  # mean 0
    deltas = gs.compute_deltas(torch.tensor(runs, dtype=torch.float64), mode)
    for run, b, i in itertools.product(range(4), range(3), range(5)):
        wanted = plain_delta(runs[run], b, i, mode)
        assert deltas[run, b, i].item() == pytest.approx(wanted, abs=1e-9)
    one = gs.compute_deltas(torch.tensor(runs[0], dtype=torch.float64), mode)
    assert torch.allclose(one, deltas[0])  # batch statistics are those of the run alone


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_a_group_of_equal_rewards_has_no_signal_and_no_nan(mode):
    deltas = gs.compute_deltas(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), mode)
    assert deltas.isfinite().all() and deltas[1].abs().max() == 0
    if mode not in ("rewards", "max_rewards"):
        assert deltas[0].abs().max() == 0
        # (!1): the float32 mean of twelve times 2.8 is not 2.8; divided by 1e-5 that would be 0.05
        assert gs.compute_deltas(torch.full((2, 12), 2.8), mode).abs().max() == 0


def test_process_deltas_of_equal_rewards_are_zero():
    assert gs.compute_process_deltas(torch.full((1, 12, 400), 2.8)).abs().max() == 0


def test_process_deltas_agree_with_plain_python():
    rng = random.Random(2)
    group = [[float(rng.randint(0, 1)) for _ in range(3)] for _ in range(4)]
    steps = [x for response in group for x in response]
    mean, std = statistics.mean(steps), statistics.stdev(steps)
    deltas = gs.compute_process_deltas(torch.tensor([[group]], dtype=torch.float64))[0, 0]
    for i, t in itertools.product(range(4), range(3)):
        wanted = sum((group[i][k] - mean) / (std + 1e-5) for k in range(t, 3))
        assert deltas[i, t].item() == pytest.approx(wanted)


@pytest.mark.parametrize("p", [0.02, 0.5])
@pytest.mark.parametrize("size", [2, 8, 400])
def test_what_the_expected_update_is_by_enumerating_groups_of_right_and_wrong(p, size):
    # Two responses, the right one (reward 1) of probability p, so J = p. The scores ∇log π by the
    # logit are 1 − p and −p; ∇J = p (1 − p), ∇log J = 1 − p. A group has k right ones.
    k = torch.arange(size + 1)
    groups = (torch.arange(size) < k[:, None]).double()  # [k trial]
    probs = [math.comb(size, i) * p**i * (1 - p) ** (size - i) for i in k.tolist()]
    scores, gradient, by_log = groups - p, p * (1 - p), 1 - p
    for mode, wanted in (
        ("rewards", gradient),
        ("leave_one_out", gradient),
        ("centered_rewards", gradient * (size - 1) / size),
        ("max_likelihood", by_log * (1 - (1 - p) ** (size - 1))),  # → ∇log J in a large group
    ):
        updates = (gs.compute_deltas(groups, mode) * scores).mean(dim=-1)
        update = math.fsum(q * x for q, x in zip(probs, updates.tolist()))
        assert update == pytest.approx(wanted, rel=1e-9), mode
    assert size < 400 or update == pytest.approx(by_log, rel=1e-3)


def test_erratum_2_the_baseline_example():
    rewards = torch.tensor([[11.0, 9.0], [0.0, 2.0]])
    assert round(rewards.std().item(), 2) == 5.32
    assert round(gs.compute_deltas(rewards, "centered_rewards").std().item(), 2) == 1.15


@pytest.mark.parametrize("mode", ["centered_rewards", "normalized_rewards"])
def test_erratum_9_the_length_bias_comes_from_dividing_by_the_length(mode):
    # Of three completions the two wrong ones have 2 and 6 tokens. With or without the division by
    # the std, which they share, only loss_type "grpo" pushes a token of the longer one less.
    deltas = gs.compute_deltas(torch.tensor([[1.0, 0.0, 0.0]]), mode)[0]
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [1] * 6])
    pushes = {}
    for loss_type in ("grpo", "dr_grpo"):
        log_probs = torch.full((3, 6), -1.0, requires_grad=True)
        loss, _ = gsm.grpo_loss(
            log_probs, log_probs, None, deltas, mask,
            beta=0.0, loss_type=loss_type, max_completion_length=6,
        )  # fmt: skip
        loss.backward()
        pushes[loss_type] = log_probs.grad[1, 0].item(), log_probs.grad[2, 0].item()
    short, long = pushes["grpo"]
    assert short == pytest.approx(3 * long) and long > 0
    short, long = pushes["dr_grpo"]
    assert short == pytest.approx(long) and long > 0


def test_erratum_9_the_difficulty_bias_comes_from_dividing_by_the_std():
    # All of one length here. The std gives a group the weight 1/std: an easy or hard prompt, whose
    # rewards spread little, counts more than its rewards say.
    groups = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0, 0, 0]])
    weight = {m: gs.compute_deltas(groups, m).abs().sum(dim=-1) for m in gs.DELTAS}
    assert weight["centered_rewards"].tolist() == [7 / 8 + 7 / 8, 4.0]
    hard, even = (weight["normalized_rewards"] / weight["centered_rewards"]).tolist()
    stds = [statistics.stdev(group) for group in groups.tolist()]
    assert [hard, even] == pytest.approx([1 / (x + 1e-5) for x in stds]) and hard > 1.5 * even


def test_erratum_10_the_best_baseline_weighs_with_the_square_of_the_gradient_of_log_pi():
    # Two actions, π = 0.8 and 0.2, rewards 11 and 9. By the logit ∇log π = 1 − p = 0.2 and −0.8.
    probs, rewards = [Fraction(4, 5), Fraction(1, 5)], [11, 9]
    scores = [Fraction(1, 5), Fraction(-4, 5)]

    def mean(values):
        return sum(p * x for p, x in zip(probs, values))

    def baseline(weights):
        return mean([w * r for w, r in zip(weights, rewards)]) / mean(weights)

    def variance(b):
        updates = [(r - b) * s for r, s in zip(rewards, scores)]
        assert mean(updates) == Fraction(32, 100)  # ∇J = p (1 − p) (11 − 9), whatever the baseline
        return mean([x**2 for x in updates]) - mean(updates) ** 2

    best = baseline([s**2 for s in scores])
    quoted = baseline([(p * s) ** 2 for p, s in zip(probs, scores)])  # ∇π = π ∇log π
    assert best == Fraction(94, 10) and variance(best) == 0
    assert quoted == Fraction(106, 10) and variance(quoted) > 0.2


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


@pytest.mark.parametrize("ratio, delta, has_gradient", [
    (1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True),
])  # fmt: skip
def test_the_clip_is_one_sided(ratio, delta, has_gradient):
    # (!4) Without the minimum, a token that moved the wrong way could never come back.
    log_prob = torch.full((1, 1, 1), math.log(ratio) - 1, requires_grad=True)
    old = torch.full((1, 1, 1), -1.0)
    gs.compute_loss(log_prob, torch.tensor([[delta]]), "clipped", old).backward()
    assert (log_prob.grad.item() != 0) == has_gradient
    if has_gradient:
        assert math.copysign(1, -log_prob.grad.item()) == delta


@pytest.mark.parametrize("mode", gs.LOSSES)
def test_all_losses_have_the_policy_gradient_on_policy(mode):
    # (!2) also if old_log_probs have a gradient of their own, as when one forgets to freeze them
    log_probs = (-torch.rand(2, 3, 4) - 0.1).requires_grad_()
    deltas = torch.randn(2, 3)
    gs.compute_loss(log_probs, deltas, mode, log_probs * 1.0).backward()
    wanted = -deltas.unsqueeze(-1).expand(2, 3, 4) / 24
    assert torch.allclose(log_probs.grad, wanted, atol=1e-7)


def numbers_of(example, name, count=4):
    """The first numbers in a line of a worked example."""
    line = next(line for line in example.split("\n") if line.startswith(name + " "))
    return [float(x) for x in line[len(name) :].split()[:count]]


def test_the_worked_example_is_what_the_functions_give():
    responses = torch.tensor([[[0, 1, 2], [0, 1, 1], [0, 2, 1], [1, 0, 0]]])
    assert all(str(list(r)).replace(",", "") in gs.EXAMPLE for r in responses[0].tolist())
    rewards = gs.sort_distance_reward(torch.tensor([[1, 0, 2]]), responses)
    assert rewards[0].tolist() == numbers_of(gs.EXAMPLE, "distance reward")
    assert f"mean {rewards.mean():.2f}, std {rewards.std():.2f}" in gs.EXAMPLE
    for mode in gs.DELTAS:
        if f"\n{mode} " in gs.EXAMPLE:
            deltas = gs.compute_deltas(rewards, mode)[0]
            assert deltas.tolist() == pytest.approx(numbers_of(gs.EXAMPLE, mode), abs=0.005), mode
    log_probs = torch.full((1, 4, 3), -math.log(3), requires_grad=True)
    deltas = gs.compute_deltas(rewards, "centered_rewards")
    loss = gs.compute_loss(log_probs, deltas, "clipped", log_probs)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    for pos in range(3):
        gradient = log_probs.grad[0, :, pos].tolist()
        assert gradient == pytest.approx(numbers_of(gs.EXAMPLE, "gradient, centered"), abs=5e-5)
    assert f"{-math.log(3):.2f}".replace("-", "−") in gs.EXAMPLE
    assert f"its ratio is {math.exp(-0.80 + math.log(3)):.2f}" in gs.EXAMPLE


# --------------------------------------------------------------------------------------------------
# KL, entropy, GAE, critic


def test_kl_estimators_by_hand():
    # Summed over pos (a mean would weigh β differently), averaged over the rest.
    log_probs, ref = torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[-1.5, -1.0]]])
    old, x = torch.tensor([[[-1.2, -1.0]]]), [-0.5, 1.0]  # log π_ref − log π
    k3 = [math.exp(v) - v - 1 for v in x]
    for estimator, wanted in (
        ("k1", -sum(x)),
        ("k2", sum(v * v / 2 for v in x)),
        ("k3", sum(k3)),
        ("k3_weighted", math.exp(0.2) * k3[0] + math.exp(-1) * k3[1]),
    ):
        kl = gs.compute_kl_penalty(log_probs, ref, estimator, old)
        assert kl.shape == () and kl.item() == pytest.approx(wanted)
        twice = [torch.cat([t, t]) for t in (log_probs, ref, old)]
        assert gs.compute_kl_penalty(*twice[:2], estimator, twice[2]).item() == pytest.approx(
            wanted
        )
    assert gs.compute_kl_penalty(log_probs, ref).item() == pytest.approx(sum(k3))
    assert gs.compute_kl_penalty(log_probs, ref, "k3_weighted").item() == pytest.approx(sum(k3))


def make_logits(seed):
    """Of a policy over 5 tokens at 3 independent positions: float64[pos vocab]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()


def token_log_probs(logits):
    """log π of the tokens of all 125 responses, each in a run of its own: [run 1 1 pos]."""
    return logits.log_softmax(-1)[range(3), EVERYTHING][:, None, None]


def divergences(logits, ref_logits):
    """Values and gradients by the logits of π, with plain loops: {name: (value, [pos vocab])}."""
    sums, gradients = dict.fromkeys(("to_ref", "from_ref", "chi2"), 0.0), {}
    for row, ref_row in zip(logits.tolist(), ref_logits.tolist()):
        p, q = softmax(row), softmax(ref_row)
        kl = sum(x * math.log(x / y) for x, y in zip(p, q))
        square = sum(x * x / y for x, y in zip(p, q))
        sums["to_ref"] += kl  # KL(π ‖ π_ref)
        sums["from_ref"] += sum(y * math.log(y / x) for x, y in zip(p, q))
        sums["chi2"] += square - 1  # χ²(π ‖ π_ref)
        for name, gradient in (
            ("to_ref", [x * (math.log(x / y) - kl) for x, y in zip(p, q)]),
            ("from_ref", [x - y for x, y in zip(p, q)]),
            ("chi2", [2 * x * (x / y - square) for x, y in zip(p, q)]),
        ):
            gradients.setdefault(name, []).append(gradient)
    zero = torch.zeros(3, 5, dtype=torch.float64)
    found = {name: (sums[name], torch.tensor(gradients[name]).double()) for name in sums}
    return found | {"nothing": (0.0, zero)}


def mean_of_samples(values, sampler, logits):
    """E over the 125 responses to samples of `sampler`, its gradient by the logits of π."""
    probs = token_log_probs(sampler).sum(dim=(1, 2, 3)).exp().detach()
    mean = (probs * values).sum()
    return mean.item(), torch.autograd.grad(mean, logits)[0]


@pytest.mark.parametrize("estimator, on_policy, old, gradient_of, unbiased", [
    ("k1", True, None, "nothing", True),
    ("k2", True, None, "to_ref", False),
    ("k3", True, None, "from_ref", True),
    ("k3_weighted", True, None, "to_ref", True),
    ("k3_weighted", True, "with a gradient", "to_ref", True),  # as when one forgets to freeze it
    ("k3_weighted", False, "constant", "to_ref", True),
])  # fmt: skip
def test_erratum_6_which_kl_each_estimator_minimises(
    estimator, on_policy, old, gradient_of, unbiased
):
    logits, ref = make_logits(0), make_logits(1)
    sampler = logits if on_policy else make_logits(2)
    log_probs, old_log_probs = token_log_probs(logits), token_log_probs(sampler) if old else None
    estimate = gs.compute_kl_penalty(log_probs, token_log_probs(ref), estimator, old_log_probs)
    value, gradient = mean_of_samples(estimate, sampler, logits)
    exact = divergences(logits, ref)
    assert (value == pytest.approx(exact["to_ref"][0])) == unbiased
    for name, (_, wanted) in exact.items():
        assert torch.allclose(gradient, wanted, atol=1e-12) == (name == gradient_of), name


def test_erratum_11_with_the_ratio_upside_down_k3_is_another_divergence():
    logits, ref = make_logits(0), make_logits(1)
    y = token_log_probs(logits) - token_log_probs(ref).detach()  # log π − log π_ref
    upside_down = (y.exp() - y - 1).sum(dim=(1, 2, 3))
    value, gradient = mean_of_samples(upside_down, logits, logits)
    exact = divergences(logits, ref)
    assert value == pytest.approx(exact["chi2"][0] - exact["to_ref"][0])
    assert value > 1.5 * exact["to_ref"][0]  # and not KL(π ‖ π_ref)
    assert torch.allclose(gradient, exact["chi2"][1] / 2, atol=1e-12)


def entropy_of(row):
    return -sum(p * math.log(p) for p in softmax(row))


def test_entropy_agrees_with_plain_python():
    model = make_model(seed=1)
    wanted = statistics.mean(entropy_of(row) for row in model(PROMPTS).flatten(0, 1).tolist())
    assert gs.compute_entropy(PROMPTS, model).item() == pytest.approx(wanted, rel=1e-4)


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
    # Token rewards may hold a KL penalty, and that a gradient.
    values, rewards = torch.randn(2, 1, 2, 3, requires_grad=True)
    assert not any(x.requires_grad for x in gs.compute_gae(rewards, values))


def test_the_critic_does_not_see_the_token_that_it_judges():
    critic = gs.Critic(5, 3, 3, generator=torch.Generator().manual_seed(0))
    critic.value_weights.data.normal_(generator=torch.Generator().manual_seed(1))
    responses = torch.zeros(3, 1, 3, dtype=torch.long)
    before = critic(PROMPTS, responses)
    responses[..., 1] = 4
    change = (critic(PROMPTS, responses) - before).abs().amax(dim=(0, 1))
    assert change[0] == change[1] == 0 and change[2] > 1e-3
    assert before[0, 0].unique().numel() == 3 and before[:, 0, 0].unique().numel() == 3


def test_the_critic_takes_a_run_axis():
    critic = gs.Critic(5, 3, 3, num_runs=2, generator=torch.Generator().manual_seed(0))
    critic.value_weights.data.normal_(generator=torch.Generator().manual_seed(1))
    responses = torch.randint(5, (2, 3, 4, 3))
    values = critic(PROMPTS, responses)
    one = gs.Critic(5, 3, 3)
    one.load_state_dict({name: p[1] for name, p in critic.state_dict().items()})
    assert values.shape == (2, 3, 4, 3)
    assert torch.allclose(values[1], one(PROMPTS, responses[1]), atol=1e-6)


@pytest.fixture
def critics(monkeypatch):
    """The critics that trainings make."""
    made = []

    class Spy(gs.Critic):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(gs, "Critic", Spy)
    return made


def test_erratum_7_the_critic_learns_the_mean_reward(critics):
    # With the value loss on the wrong side of the objective, V runs away from the rewards.
    settings = gs.RECIPE | dict(deltas_mode="gae", num_runs=4, num_epochs=30)
    result = gs.run_policy_gradient(**settings)
    first_values = critics[0](PROMPTS, sample(result.model))[..., 0]
    assert result.records[-1]["mean_reward"] > 2.7
    assert (first_values.mean() - result.records[-1]["mean_reward"]).abs() < 0.2


# --------------------------------------------------------------------------------------------------
# The theory, by enumeration: results/sort/study.py


@pytest.fixture(scope="module")
def gradients():
    return sort_study.measure_gradients(num_runs=4, seed=0)


def test_scores_are_gradients_of_log_probs_and_average_to_zero():
    model = make_model(num_runs=2, double=True)
    everything = sort_study.enumerate_responses(5, 3)
    assert everything.tolist() == EVERYTHING.tolist()
    scores = sort_study.compute_scores(PROMPTS, everything, model)  # [run batch trial params]
    probs = gs.compute_log_probs(PROMPTS, everything.expand(3, -1, -1), model).sum(-1).exp()
    assert torch.einsum("rbt,rbtp->rbp", probs, scores).abs().max() < 1e-12

    def log_prob(shift):  # of response 77 to prompt 1 in run 1, with one weight moved
        moved = make_model(num_runs=2, double=True)
        moved.embedding.data[1, 2, 3] += shift
        log_probs = gs.compute_log_probs(PROMPTS, everything.expand(3, -1, -1), moved)
        return log_probs[1, 1, 77].sum().item()

    wanted = (log_prob(1e-6) - log_prob(-1e-6)) / 2e-6
    assert scores[1, 1, 77, 2 * 4 + 3].item() == pytest.approx(wanted, rel=1e-5)


def test_the_exact_gradient_is_that_of_the_expected_reward_by_finite_differences():
    # REINFORCE itself: ∇J = E[R ∇log π].
    model = make_model(num_runs=1, double=True)
    everything = EVERYTHING.expand(3, -1, -1)
    rewards = gs.sort_distance_reward(PROMPTS, everything).double()[None]

    def expected_reward():
        probs = gs.compute_log_probs(PROMPTS, everything, model).sum(-1).exp()
        return (probs * rewards).sum().item() / 3

    probs = gs.compute_log_probs(PROMPTS, everything, model).sum(-1).exp().detach()
    scores = sort_study.compute_scores(PROMPTS, EVERYTHING, model)
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
    # The enumeration over reward groups, against what training really does: sample, average.
    model = make_model(num_runs=1, init_scale=0.7)
    grid = EVERYTHING.expand(3, -1, -1)
    probs = gs.compute_log_probs(PROMPTS, grid, model).sum(-1).exp().detach()
    scores = sort_study.compute_scores(PROMPTS, EVERYTHING, model)
    rewards = gs.sort_distance_reward(PROMPTS, grid)[None]
    mean, variance = sort_study.expected_update(probs, rewards, scores, mode, group_size=3)

    draws, generator = 20_000, torch.Generator().manual_seed(0)
    chosen = torch.multinomial(probs[0], draws * 3, replacement=True, generator=generator)
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
    noise = {mode: row["noise"] for mode, row in rows.items()}
    assert (noise["leave_one_out"] < 0.8 * noise["rewards"]).all()
    assert torch.allclose(noise["leave_one_out"], noise["centered_rewards"], rtol=1e-3)


def test_erratum_1_the_quotient_of_log_probs_unlearns(gradients):
    assert (gradients["6b", "exp(log π − log π_old)"]["cosine"] > 0.9999).all()
    assert (gradients["6b", "log π / log π_old"]["cosine"] < -0.9).all()


def test_the_study_measures_what_is_enumerated_above(gradients):
    # The estimators as in the tests of errata 6 and 11, the baselines as in that of erratum 10.
    for name, to_ref, from_ref, unbiased in (
        ("k1", 1, 1, True),  # no gradient at all, as far from the one as from the other
        ("k2", 0, None, False),
        ("k3", None, 0, True),
        ("k3_weighted", 0, None, True),
        ("k3_weighted, off policy", 0, None, True),
    ):
        row = gradients["6c", name]
        for metric, wanted in (("error_to_ref", to_ref), ("error_from_ref", from_ref)):
            if wanted is None:
                assert (row[metric] > 0.1).all(), name
            else:
                assert torch.allclose(row[metric], torch.full((4,), 1.0 * wanted), atol=2e-3), name
        assert (row["value"].tolist() == pytest.approx([1] * 4, abs=1e-3)) == unbiased
    row = gradients["6c", "k3 with the ratio upside down"]
    assert row["value_to_chi2"].tolist() == pytest.approx([1] * 4, abs=2e-3)
    assert (row["error_chi2"] < 2e-3).all()
    best = gradients["6e", "E[(∇log π)² R] / E[(∇log π)²]"]
    assert best["baseline"].item() == pytest.approx(9.4) and best["variance"].item() < 1e-9


# --------------------------------------------------------------------------------------------------
# Training

SMALL = gs.RECIPE | dict(num_epochs=4, num_runs=3)


def same_weights(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters()))


def test_the_recipe_sorts_everything_in_every_run():
    result = gs.run_policy_gradient(**gs.RECIPE, num_runs=32)
    assert result.exact_match.tolist() == [1.0] * 32
    assert result.prompts.tolist() == PROMPTS.tolist() and len(result.records) == 100
    assert result.records[-1]["exact_match"] == 1.0 and result.records[-1]["step"] == 1000
    # A record is the mean over the runs of the curves.
    names = {"loss", "mean_reward", "exact_match", "entropy", "kl"}
    assert set(result.curves) == names
    assert all(set(record) == names | {"epoch", "step"} for record in result.records)
    for name, curve in result.curves.items():
        assert curve.shape == (100, 32)
        assert result.records[3][name] == pytest.approx(statistics.mean(curve[3].tolist()))


def test_the_classic_defaults_do_not():
    result = gs.run_policy_gradient(num_runs=32)
    assert result.exact_match.shape == (32,) and result.exact_match.mean() < 0.3


def test_erratum_3_the_classic_start_is_saturated_and_a_flat_one_is_not():
    starts = sort_study.measure_starts(num_runs=200, seed=1)
    classic, flat = starts["2a", "init_scale 1.0"], starts["2a", "init_scale 0.1"]
    assert classic["entropy"].mean() < 0.6 and classic["top"].mean() > 0.75
    assert flat["entropy"].mean() > 1.55  # of log 5 = 1.609
    # The algorithm is the same; only the start differs.
    recipe = dict(num_runs=16, num_epochs=15)
    stuck = gs.run_policy_gradient(**gs.RECIPE | recipe | dict(init_scale=1.0))
    free = gs.run_policy_gradient(**gs.RECIPE | recipe)
    assert stuck.exact_match.mean() < 0.5 < 0.9 < free.exact_match.mean()


@pytest.mark.parametrize("change", [
    dict(deltas_mode="process"), dict(deltas_mode="gae"), dict(deltas_mode="centered_rewards"),
    dict(deltas_mode="leave_one_out"), dict(deltas_mode="batch_normalized"),
    dict(deltas_mode="max_likelihood"), dict(loss_mode="gspo"), dict(loss_mode="cispo"),
    dict(entropy_bonus=0.05), dict(kl_penalty=0.1, kl_estimator="k2"),
    dict(kl_penalty=0.1, kl_estimator="k3_weighted"), dict(target_kl=0.1),
])  # fmt: skip
def test_every_variant_learns(change):
    # A reversed sign anywhere fails here: it would end near zero.
    result = gs.run_policy_gradient(**gs.RECIPE | change | dict(num_runs=8, num_epochs=12))
    assert result.exact_match.mean() > 0.8


def test_unlearning_is_visible():
    # The control for the test above: with the reward negated, nothing is sorted.
    def negated(prompts, responses):
        return -gs.sort_distance_reward(prompts, responses)

    settings = gs.RECIPE | dict(reward_fn=negated, num_runs=8, num_epochs=12)
    result = gs.run_policy_gradient(**settings)
    assert result.exact_match.mean() == 0 and result.records[-1]["mean_reward"] > -0.2


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    one, two, other = (gs.run_policy_gradient(**SMALL, seed=s) for s in (0, 0, 1))
    assert one.records == two.records != other.records and same_weights(one, two)


def train_alone(run, epochs, optimizer, settings):
    """One run of a training, trained alone on the samples that it had beside the others.

    epochs: the arguments of on_epoch → model, losses of all steps and number of gradient steps, the
    last two for each epoch
    """
    start = gs.Model(5, 10, 3, 3, 0.1, 3, torch.Generator().manual_seed(7)).state_dict()
    model = gs.Model(5, 10, 3, 3)
    model.load_state_dict({name: p[run] for name, p in start.items()})
    optimizer, losses, steps = optimizer(model.parameters(), settings["learning_rate"]), [], []
    for epoch, (_, prompts, responses, rewards, deltas, old) in enumerate(epochs):
        if epoch % settings["compute_ref_model_period"] == 0:
            ref_model = copy.deepcopy(model).requires_grad_(False)
        ref_log_probs = gs.compute_log_probs(prompts, responses[run], ref_model)
        log_probs = gs.compute_log_probs(prompts, responses[run], model)
        assert torch.allclose(old[run], log_probs, atol=1e-5)
        assert torch.equal(rewards[run], gs.sort_distance_reward(prompts, responses[run]))
        assert torch.equal(deltas[run], gs.compute_deltas(rewards[run], "normalized_rewards"))
        losses.append([])
        steps.append(0)
        for _ in range(settings["num_steps_per_epoch"]):
            log_probs = gs.compute_log_probs(prompts, responses[run], model)
            loss = gs.compute_loss(log_probs, deltas[run], settings["loss_mode"], old[run])
            loss = loss - settings["entropy_bonus"] * gs.compute_entropy(prompts, model)
            estimator = settings["kl_estimator"]
            kl = gs.compute_kl_penalty(log_probs, ref_log_probs, estimator, old[run])
            loss = loss + settings["kl_penalty"] * kl
            losses[-1].append(loss.item())
            x = (log_probs - old[run]).detach()  # of samples of π_old: k3 of KL(π_old ‖ π)
            if (x.exp() - x - 1).sum(-1).mean() > settings.get("target_kl", math.inf):
                for state in optimizer.state.values():  # Adam's count of steps goes on
                    state["step"] += 1
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps[-1] += 1
    return model, losses, steps


@pytest.mark.parametrize("optimizer, change", [
    # Plain gradient descent shows the scale of the gradient, which Adam hides.
    (torch.optim.SGD, dict(loss_mode="naive", num_steps_per_epoch=1, entropy_bonus=0.1)),
    (torch.optim.SGD, dict(kl_penalty=0.5, kl_estimator="k3_weighted", entropy_bonus=0.1)),
    (torch.optim.SGD, dict(kl_penalty=0.5, compute_ref_model_period=1)),
    (torch.optim.Adam, dict(learning_rate=5e-3)),
    (torch.optim.Adam, dict(learning_rate=5e-3, target_kl=0.01, num_steps_per_epoch=12)),
])  # fmt: skip
def test_every_run_trains_as_it_would_alone(optimizer, change, monkeypatch):
    settings = dict(num_epochs=3, num_steps_per_epoch=4, compute_ref_model_period=2, kl_penalty=0.0)
    settings |= dict(entropy_bonus=0.0, learning_rate=0.5, loss_mode="clipped", kl_estimator="k3")
    settings |= change
    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: optimizer(p, lr))
    epochs = []
    result = gs.run_policy_gradient(
        **gs.RECIPE | settings, num_runs=3, seed=7, on_epoch=lambda *args: epochs.append(args)
    )
    taken = []
    for run in range(3):
        model, losses, steps = train_alone(run, epochs, optimizer, settings)
        taken.append(steps)
        means = [statistics.mean(x) for x in losses]
        assert result.curves["loss"][:, run].tolist() == pytest.approx(means, abs=1e-5)
        means = [epoch[3][run].mean().item() for epoch in epochs]  # of the rewards
        assert result.curves["mean_reward"][:, run].tolist() == pytest.approx(means)
        for p, trained in zip(model.parameters(), result.model.parameters()):
            assert torch.allclose(p, trained[run], atol=2e-5)
    if "target_kl" in change:  # the runs stopped after different numbers of steps
        assert len({tuple(steps) for steps in taken}) > 1
        assert all(1 <= n < 12 for steps in taken for n in steps)


def test_a_target_kl_that_is_never_reached_changes_nothing():
    free, far = (gs.run_policy_gradient(**SMALL, target_kl=kl) for kl in (None, 1e9))
    assert free.records == far.records and same_weights(free, far)


def test_a_tiny_target_kl_leaves_one_step_an_epoch():
    settings = SMALL | dict(num_epochs=1, target_kl=1e-12)
    near = gs.run_policy_gradient(**settings)
    one = gs.run_policy_gradient(**settings | dict(num_steps_per_epoch=1))
    assert same_weights(near, one)


@pytest.mark.parametrize("period", [1, 2, 10])
def test_erratum_4_the_recorded_kl_is_to_a_frozen_copy_that_is_renewed(period):
    # A reference that shares the model's tensors would give 0 throughout. With period 1 it is the
    # policy that sampled. All that is recorded is of each run, of the policy after the epoch.
    assert not hasattr(torch.nn.Module, "clone")
    settings = SMALL | dict(compute_ref_model_period=period, kl_penalty=0.1)
    after = [gs.run_policy_gradient(**settings | dict(num_epochs=n)) for n in (1, 2, 3, 4)]
    start = gs.Model(5, 10, 3, 3, 0.1, 3, torch.Generator().manual_seed(0))
    models = [start] + [result.model for result in after]  # models[n]: after n epochs
    curves = after[-1].curves
    for n, run in itertools.product(range(1, 5), range(3)):
        model, reference = models[n], models[(n - 1) // period * period]
        rows, ref_rows = (m(PROMPTS)[run].flatten(0, 1).tolist() for m in (model, reference))
        kl = sum(
            p * math.log(p / q)
            for row, ref_row in zip(rows, ref_rows)
            for p, q in zip(softmax(row), softmax(ref_row))
        )
        assert curves["kl"][n - 1, run].item() == pytest.approx(kl / 3, abs=1e-5) and kl > 1e-4
        entropy = statistics.mean(map(entropy_of, rows))
        assert curves["entropy"][n - 1, run].item() == pytest.approx(entropy, abs=1e-5)
        exact_match = gs.sorts_greedily(PROMPTS, model)[run].float().mean()
        assert curves["exact_match"][n - 1, run] == exact_match


def test_erratum_6_the_penalty_pulls_to_the_reference_not_to_the_old_policy():
    settings = gs.RECIPE | dict(num_runs=4, num_epochs=20, compute_ref_model_period=20)
    held, free = (gs.run_policy_gradient(**settings, kl_penalty=k) for k in (10.0, 0.0))
    assert held.records[-1]["kl"] < 0.05 < free.records[-1]["kl"]  # to the policy of epoch 0


def test_gae_is_given_the_whole_reward_at_the_end_and_gamma_and_lambda(monkeypatch):
    calls, seen, compute_gae = [], [], gs.compute_gae

    def spy(*args, **kwargs):
        bound = inspect.signature(compute_gae).bind(*args, **kwargs).arguments
        calls.append(bound | {"found": compute_gae(*args, **kwargs)})
        return calls[-1]["found"]

    monkeypatch.setattr(gs, "compute_gae", spy)
    settings = SMALL | dict(deltas_mode="gae", gamma=0.9, lam=0.7, num_epochs=2)
    gs.run_policy_gradient(**settings, on_epoch=lambda *args: seen.append(args))
    for call, (_, _, _, rewards, deltas, _) in zip(calls, seen, strict=True):
        assert (call["gamma"], call["lam"]) == (0.9, 0.7)
        assert torch.equal(call["token_rewards"][..., -1], rewards)
        assert call["token_rewards"][..., :-1].abs().max() == 0
        for run in range(3):  # the advantages, normalised over all tokens of a run
            advantages = call["found"][0][run].flatten().tolist()
            mean, std = statistics.mean(advantages), statistics.pstdev(advantages)
            wanted = [(x - mean) / (std + 1e-5) for x in advantages]
            assert deltas[run].flatten().tolist() == pytest.approx(wanted, abs=1e-4)


def test_the_value_coefficient_scales_the_critics_loss_only(critics, monkeypatch):
    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, lr))
    settings = SMALL | dict(
        deltas_mode="gae", num_epochs=1, num_steps_per_epoch=1, learning_rate=0.1
    )
    one, three = (gs.run_policy_gradient(**settings, value_coefficient=c) for c in (1.0, 3.0))
    assert same_weights(one, three)
    moved, moved_three = (critic.value_weights.detach() for critic in critics)  # they start at 0
    assert torch.allclose(3 * moved, moved_three, rtol=1e-4) and moved.abs().max() > 1e-3


def test_annealing_takes_learning_rate_and_entropy_bonus_down_to_zero(monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: Spy(p, lr))
    settings = gs.RECIPE | dict(num_epochs=4, num_steps_per_epoch=1, learning_rate=0.4)
    gs.run_policy_gradient(**settings, anneal=True)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    rates.clear()
    gs.run_policy_gradient(**settings)
    assert rates == [0.4] * 4
    # The first loss with δ of mean 0 is minus the bonus times the entropy, here log 5.
    settings |= dict(entropy_bonus=2.0, init_scale=1e-3, learning_rate=1e-9)
    for anneal, left in ((True, (1, 0.75, 0.5, 0.25)), (False, (1, 1, 1, 1))):
        records = gs.run_policy_gradient(**settings, anneal=anneal).records
        wanted = [-2.0 * x * math.log(5) for x in left]
        assert [record["loss"] for record in records] == pytest.approx(wanted, abs=1e-3)


def test_prompts_of_ones_own_and_batches_of_them():
    train, unseen = gs.split_prompts(4, 3, num_train=40, num_runs=2, seed=0)
    assert train.shape == (2, 40, 3) and unseen.shape == (2, 24, 3)
    for run in range(2):
        seen, rest = ({tuple(p) for p in x[run].tolist()} for x in (train, unseen))
        assert len(seen) == 40 and len(rest) == 24 and not seen & rest
        assert {(0, 0, 0), (3, 3, 3)} <= seen
    assert not torch.equal(train[0], train[1])
    batches = []
    settings = gs.UNSEEN | dict(prompts=train, batch_size=16, num_runs=2, num_epochs=200)
    del settings["split"]
    result = gs.run_policy_gradient(**settings, on_epoch=lambda *args: batches.append(args[1]))
    assert result.exact_match.min() > 0.7
    assert gs.sorts_greedily(unseen, result.model).float().mean(-1).min() > 0.4
    # A run draws from its own prompts only, in the end from all, in each epoch others, and others
    # than the run beside it.
    places = []
    for run in range(2):
        own = [tuple(p) for p in train[run].tolist()]
        places.append([[own.index(tuple(p)) for p in b[run].tolist()] for b in batches])
        assert all(len(batch) == 16 for batch in places[run]) and places[run][0] != places[run][1]
        assert {i for batch in places[run] for i in batch} == set(range(40))
    assert places[0][0] != places[1][0]


@pytest.mark.parametrize("objective, bound", [
    (sort_study.CROSS_ENTROPY, 0.95), (sort_study.EXPECTED_REWARD, 0.5),
])  # fmt: skip
def test_the_study_can_train_on_the_answers(objective, bound):
    prompts, _ = gs.split_prompts(4, 3, 50, num_runs=2, seed=0)
    settings = dict(num_epochs=400, batch_size=32, entropy_bonus=0.1, seed=0)
    model = sort_study.train_on_answers(prompts, objective, **settings)
    assert gs.sorts_greedily(prompts, model).float().mean() > bound


# --------------------------------------------------------------------------------------------------
# Errors

TOKENS, GROUP = torch.ones(2, 3, 4), torch.ones(2, 3)  # [batch trial pos], [batch trial]


@pytest.mark.parametrize("call", [
    lambda: gs.compute_deltas(GROUP, "mean"),
    lambda: gs.compute_deltas(torch.ones(3), "rewards"),
    lambda: gs.compute_process_deltas(torch.ones(2, 1, 1)),
    lambda: gs.compute_process_deltas(GROUP),
    lambda: gs.compute_loss(TOKENS, GROUP, "ppo", TOKENS),
    lambda: gs.compute_loss(TOKENS, GROUP, "clipped"),
    lambda: gs.compute_loss(TOKENS, torch.ones(3, 2), "naive"),
    lambda: gs.compute_loss(TOKENS, torch.ones(2, 3, 1), "naive"),
    lambda: gs.compute_loss(TOKENS, GROUP, "gspo", GROUP),
    lambda: gs.compute_loss(TOKENS, GROUP, "clipped", TOKENS[:1]),
    lambda: gs.compute_kl_penalty(TOKENS, TOKENS, "k4"),
    lambda: gs.compute_kl_penalty(TOKENS, GROUP),
    lambda: gs.compute_kl_penalty(GROUP, GROUP),
    lambda: gs.compute_kl_penalty(TOKENS, TOKENS, "k3_weighted", GROUP),
    lambda: gs.sort_distance_reward(PROMPTS, torch.ones(3, 4, 1)),
    lambda: gs.exact_sort_reward(PROMPTS, torch.ones(3, 4, 1)),
    lambda: gs.compute_gae(TOKENS, GROUP),
])  # fmt: skip
def test_functions_refuse_what_cannot_work(call):
    # What would otherwise be broadcast, or do something else in silence.
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("mode", gs.DELTAS)
def test_a_group_of_one_is_refused_where_there_is_nothing_to_compare(mode):
    one, settings = torch.ones(2, 1), gs.RECIPE | dict(deltas_mode=mode, num_responses=1)
    if mode in ("rewards", "max_rewards"):
        assert torch.equal(gs.compute_deltas(one, mode), one)
        return
    with pytest.raises(ValueError):
        gs.compute_deltas(one, mode)
    with pytest.raises(ValueError):
        gs.run_policy_gradient(**settings)


@pytest.mark.parametrize("arguments", [
    dict(prompts=[1, 2, 3]), dict(prompts=[[0.5, 1.0]]), dict(prompts=[[-1, 2]]), dict(prompts=[]),
    dict(prompts=[[[1, 2]]], num_runs=2), dict(prompts=[[1, 9]], vocab_size=9),
    dict(deltas_mode="ppo"), dict(loss_mode="ppo"), dict(kl_estimator="k4"),
    dict(num_epochs=0), dict(num_steps_per_epoch=0), dict(num_runs=0), dict(num_responses=0),
    dict(compute_ref_model_period=0), dict(batch_size=0), dict(embedding_dim=0), dict(seed=-1),
    dict(learning_rate=0.0), dict(learning_rate=math.nan), dict(learning_rate=math.inf),
    dict(init_scale=0.0), dict(epsilon=-0.1), dict(epsilon_high=-1.0), dict(target_kl=math.nan),
    dict(kl_penalty=-1.0), dict(kl_penalty=math.nan), dict(entropy_bonus=-1.0),
    dict(value_coefficient=-1.0), dict(gamma=-0.1), dict(lam=-0.1),
    dict(learning_rate=1e30, num_epochs=5),  # found when the policy is no longer finite
], ids=str)  # fmt: skip
def test_training_refuses_what_cannot_work(arguments):
    with pytest.raises(ValueError):
        gs.run_policy_gradient(**gs.RECIPE | arguments)


# --------------------------------------------------------------------------------------------------
# Experiments


def test_the_interval_is_students_t():
    # t(0.975) for 7 and 31 degrees of freedom: 2.364624, 2.039513 (tables)
    for n, t in ((8, 2.364624), (32, 2.039513)):
        values = [float(i % 3) for i in range(n)]
        mean, half = gs.mean_and_interval(values)
        assert mean == pytest.approx(statistics.mean(values))
        assert half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=1e-3)
    assert gs.mean_and_interval([0.25]) == (0.25, 0.0)


def make_row(exact_match=0.75, **more):
    """What gs.measure gives, of 8 runs without a training."""
    row = dict(exact_match=[exact_match] * 8, solved=[1.0] * 3 + [0.0] * 5, epochs=[12.0] * 8)
    return row | dict(entropy=[0.5] * 8, curves={}) | more


def test_a_table_says_means_with_intervals_and_how_many_runs_sort_all():
    rows = [
        make_row(label="one", unseen=[0.9925] * 8),
        make_row(0.5, label="two", unseen=[1.0] * 8),
    ]
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in gs.format_table(rows)]
    assert [len(line) for line in cells] == [6] * 4 and set(cells[1]) == {"---"}
    assert cells[2] == [
        "one", "75.0 ± 0.0", "99.25 ± 0.00", "3 of 8", "12.0 ± 0.0", "0.50 ± 0.00"
    ]  # fmt: skip
    assert cells[3][:3] == ["two", "50.0 ± 0.0", "100.00 ± 0.00"]
    assert len(gs.format_table([make_row(label="")])[0].split("|")) == 7  # no column for unseen


def test_a_row_is_what_its_training_shows():
    settings = gs.RECIPE | dict(num_epochs=12, num_runs=4, seed=1, prompts=[[2, 0, 1], [1, 2, 2]])
    row, result = gs.measure(settings), gs.run_policy_gradient(**settings)
    curve = result.curves["exact_match"].tolist()  # [epoch][run]
    first = [
        next((i + 1 for i, epoch in enumerate(curve) if epoch[run] == 1), 12) for run in range(4)
    ]
    assert row["epochs"] == first and 1 < min(first)
    assert row["exact_match"] == result.exact_match.tolist()
    assert row["solved"] == [float(x == 1) for x in row["exact_match"]]
    assert row["entropy"] == pytest.approx(result.curves["entropy"][-1].tolist(), abs=1e-6)
    assert row["curves"] == {name: x.tolist() for name, x in result.curves.items()}
    assert "unseen" not in row


def test_a_row_with_a_split_is_tested_on_the_prompts_it_was_not_trained_on():
    settings = gs.UNSEEN | dict(batch_size=9, num_epochs=60, num_runs=2, seed=3)
    row = gs.measure(settings | dict(split=(4, 3, 40)))
    train, unseen = gs.split_prompts(4, 3, 40, 2, 3)
    del settings["split"]
    model = gs.run_policy_gradient(**settings, prompts=train).model
    for name, prompts in (("unseen", unseen), ("exact_match", train)):  # not of the last batch
        right = gs.sorts_greedily(prompts, model).float().mean(-1).tolist()
        assert row[name] == pytest.approx(right, abs=1e-6)
    # The wider study measures the same, and says what is left wrong.
    found = sort_study.measure(settings | dict(split=(4, 3, 40)))
    assert all(found[name] == row[name] for name in ("unseen", "exact_match"))
    assert found["left"] and found["worst"]


TABLES = [  # title, base, changes
    ("A. changes of a base", dict(num_epochs=7), [{}, dict(num_responses=3), dict(gamma=0.5)]),
    ("B. one on top of the other", None, [{}, dict(init_scale=0.1), dict(num_responses=3)]),
    ("C. as in A", {}, [dict(num_epochs=7, num_responses=3)]),
]


def test_rows_are_printed_and_written_as_they_come(tmp_path, monkeypatch, capsys):
    measured, printed = [], [""]

    def measure(settings, on_epoch=None):
        printed[0] += capsys.readouterr().out
        if measured:  # all rows so far can be read, and have been shown
            rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
            assert [row["settings"] for row in rows] == measured
            table = (tmp_path / "tables.md").read_text(encoding="utf-8")
            for row in rows:
                assert f"\n| {row['label']} " in printed[0] and f"\n| {row['label']} " in table
        measured.append(settings)
        return make_row()

    monkeypatch.setattr(gs, "measure", measure)
    results = []
    gs.run_tables(TABLES, tmp_path, results, seed=3, num_runs=8)
    common = dict(seed=3, num_runs=8)
    # Of two rows with equal settings only the first is trained; base None adds change to change.
    assert measured == [common | s for s in (
        dict(num_epochs=7), dict(num_epochs=7, num_responses=3), dict(num_epochs=7, gamma=0.5),
        {}, dict(init_scale=0.1), dict(init_scale=0.1, num_responses=3),
    )]  # fmt: skip
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["torch"] == torch.__version__ and len(written["rows"]) == len(results) == 7
    base = written["rows"][0]["label"]  # of the rows without a change
    assert [(row["table"][0], row["label"]) for row in written["rows"] if row["label"] != base] == [
        ("A", "num_responses 3"), ("A", "gamma 0.5"), ("B", "+ init_scale 0.1"),
        ("B", "+ num_responses 3"), ("C", "num_epochs 7, num_responses 3"),
    ]  # fmt: skip
    assert written["rows"][-1]["settings"] == written["rows"][1]["settings"]
    assert all(row["exact_match"] == [0.75] * 8 and "curves" not in row for row in written["rows"])
    printed = printed[0] + capsys.readouterr().out
    for title, *_ in TABLES:
        assert printed.count(f"## {title}") == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_every_experiment_can_be_trained(tmp_path):
    # A misspelt argument, or one that is refused, would show only after minutes of others.
    tables = [table for tables in gs.EXPERIMENTS.values() for table in tables]
    results, quick = [], dict(num_epochs=1, num_runs=2, seed=0)
    gs.run_tables(tables, tmp_path, results, **quick)
    with multiprocessing.get_context("spawn").Pool(2, gs.prepare) as pool:  # the same in processes
        again = []
        gs.run_tables(tables, tmp_path, again, pool, **quick)
    assert again == results
    assert len(results) == sum(len(changes) for *_, changes in tables)
    assert all(len(row["exact_match"]) == 2 for row in results)
    assert len({(row["table"], row["label"]) for row in results}) == len(results)
    for number, tables in gs.EXPERIMENTS.items():
        assert all(re.match(rf"{number}[a-z]?\. ", title) for title, *_ in tables)
    assert all("unseen" in row for row in results if row["table"][0] == "5")
    # The classic experiment starts from the defaults, everything else from the recipe or beyond.
    first = next(row["settings"] for row in results if row["table"][:2] == "1.")
    assert first == quick | dict(deltas_mode="rewards")
    ladder = [row["settings"] for row in results if row["table"][:3] == "2b."]
    recipe = {k: getattr(v, "__name__", v) for k, v in gs.RECIPE.items()}
    assert ladder[0] == quick and ladder[-1] == quick | recipe


def test_the_plots_show_the_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    texts, lines, text, plot = {}, [], Axes.text, Axes.plot
    monkeypatch.setattr(Axes, "text", lambda *a, **k: texts.update({a[1:3]: a[3]}) or text(*a, **k))
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: lines.append(a[1]) or plot(*a, **k))
    result = gs.run_policy_gradient(**SMALL)
    modes = (*gs.DELTAS, "process", "gae")
    cells = list(itertools.product(range(len(modes)), range(len(gs.LOSSES))))
    curves = {name: x.tolist() for name, x in result.curves.items()}
    rows = [make_row(table="1. curves", label="rewards", curves=curves)]
    rows += [
        make_row((10 * y + x) / 100, table="3. grid", label=f"{modes[y]}, {gs.LOSSES[x]}")
        for y, x in cells
        if (y, x) != (8, 4)  # not measured
    ]
    gs.draw_plots(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "grid.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert texts == {(x, y): f"{10 * y + x}" for y, x in cells} | {(4, 8): ""}
    curves = (("loss", 1), ("mean_reward", 1), ("exact_match", 100))  # the last one in per cent
    for points, (name, factor) in zip(lines, curves, strict=True):
        assert [float(x) for x in points] == pytest.approx(
            [factor * record[name] for record in result.records]
        )


# --------------------------------------------------------------------------------------------------
# Command line


def stop_of(arguments, capsys):
    """(exit status, standard error) of a command line that ends the program."""
    with pytest.raises(SystemExit) as stop:
        gs.main(arguments)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch):
    """What run_policy_gradient is called with; it returns at once."""
    calls = []

    @functools.wraps(gs.run_policy_gradient)
    def train(**settings):
        calls.append(settings)
        return argparse.Namespace(exact_match=torch.ones(2))

    monkeypatch.setattr(gs, "run_policy_gradient", train)
    return calls


FLAGS = {  # name: (what is written, what arrives)
    "num_epochs": ("3", 3), "num_steps_per_epoch": ("2", 2), "compute_ref_model_period": ("4", 4),
    "num_responses": ("5", 5), "deltas_mode": ("gae", "gae"), "loss_mode": ("gspo", "gspo"),
    "kl_penalty": ("1", 1.0), "reward_fn": ("exact", gs.exact_sort_reward),
    "prompts": ("3,2,4 1,0,2", [[3, 2, 4], [1, 0, 2]]), "batch_size": ("7", 7),
    "vocab_size": ("6", 6), "embedding_dim": ("9", 9), "init_scale": ("2", 2.0),
    "learning_rate": ("1", 1.0), "epsilon": ("0.1", 0.1), "epsilon_high": ("1", 1.0),
    "target_kl": ("1", 1.0), "kl_estimator": ("k3_weighted", "k3_weighted"),
    "entropy_bonus": ("2", 2.0), "anneal": ("", True), "gamma": ("0", 0.0), "lam": ("1", 1.0),
    "value_coefficient": ("2", 2.0),
}  # fmt: skip


@pytest.mark.parametrize("preset", ["recipe", "classic", None])
def test_every_argument_has_a_flag_and_arrives_with_its_type(preset, trained):
    arguments = set(inspect.signature(gs.run_policy_gradient).parameters)
    assert set(FLAGS) == arguments - {"num_runs", "seed", "on_epoch"}
    start = {} if preset == "classic" else gs.RECIPE
    chosen = ["--preset", preset] if preset else []
    for name, (text, value) in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        assert not gs.main([*chosen, flag, *text.split(), "--runs", "3", "--seed", "5"])
        given = trained.pop()
        assert callable(given.pop("on_epoch")) and type(given[name]) is type(value)
        assert given == start | {name: value, "num_runs": 3, "seed": 5}
    if preset:
        assert not gs.main(chosen)
        given = trained.pop()
        assert given == start | dict(num_runs=32, seed=0, on_epoch=given["on_epoch"])


def test_help_explains_every_flag_and_importing_does_no_work(tmp_path, monkeypatch, capsys):
    code = "import sys, torch; sys.path.insert(0, sys.argv[1]); state = torch.get_rng_state()"
    code += "; import grpo_sort; print(torch.equal(state, torch.get_rng_state()))"
    code += "; print('matplotlib' in sys.modules)"
    quiet = [sys.executable, "-c", code, str(HERE)]
    done = subprocess.run(quiet, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", "False"] and done.stderr == ""
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        gs.main(["--help"])
    shown = capsys.readouterr().out
    flags = dict(re.findall(r"(?ms)^  (--[\w-]+)(.*?)(?=^  --|^\S|\Z)", shown))
    # less the choices, or the name of the argument
    flags = {name: re.sub(r"^ (?:\{.*?\}|\S+)(?: \[.*?\])?\s", "", x) for name, x in flags.items()}
    wanted = {"--quick", "--experiment", "--preset", "--out", "--runs", "--seed", "--processes"}
    assert set(flags) == wanted | {"--" + name.replace("_", "-") for name in FLAGS}
    assert not stop.value.code and all(len(words.split()) >= 2 for words in flags.values())


def test_one_variant_prints_every_response_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls, show, train = [], [], gs.run_policy_gradient

    @functools.wraps(train)
    def spy(**settings):
        show.append(settings.pop("on_epoch"))
        return train(**settings, on_epoch=lambda *args: calls.append(args) or show[0](*args))

    monkeypatch.setattr(gs, "run_policy_gradient", spy)
    assert not gs.main("--preset classic --num-epochs 2 --runs 3 --reward-fn distance".split())
    out = capsys.readouterr()
    assert out.err == "" and not list(tmp_path.iterdir())
    parts = re.split(r"(?m)^  prompt (\[.*?\]).*$", out.out)
    assert parts[0].strip().startswith("epoch 0:") and "of 3 runs sort every prompt" in out.out
    assert [ast.literal_eval(p) for p in parts[1::2]] == PROMPTS.tolist()  # of epoch 0, not of 1
    _, _, responses, rewards, deltas, log_probs = calls[0]
    for b, text in enumerate(parts[2::2]):  # of run 0
        lines = re.findall(r"(\[.*?\])\s+reward (\S+)\s+delta (\S+)\s+log π (\S+)", text)
        assert [ast.literal_eval(line[0]) for line in lines] == responses[0, b].tolist()
        assert [float(line[1]) for line in lines] == rewards[0, b].tolist()
        assert [float(line[2]) for line in lines] == deltas[0, b].tolist()
        wanted = pytest.approx(log_probs[0, b].sum(-1).tolist(), abs=0.006)
        assert len(lines) == 10 and [float(line[3]) for line in lines] == wanted


@pytest.mark.parametrize("arguments", ["process", "gae"])
def test_one_variant_prints_a_delta_for_each_token(arguments, capsys):
    settings = f"--deltas-mode {arguments} --num-epochs 1 --runs 1 --prompts 1,0 2,2"
    assert not gs.main(settings.split())
    out = capsys.readouterr().out
    assert len(re.findall(r"delta [+-]\d\S* [+-]\d\S*  ", out)) == 20 and "prompt [2, 2]" in out


@pytest.mark.parametrize("arguments", [
    "--nonsense", "--loss-mode ppo", "--deltas-mode x", "--reward-fn x", "--preset x",
    "--experiment 9", "--quick --loss-mode naive", "--experiment 1 --preset recipe",
    "--prompts a,b", "--prompts 3,2,4 1,2", "--prompts 3,-2",
    "--num-epochs 0", "--num-epochs 1.5", "--num-responses 1", "--kl-penalty nan",
    "--learning-rate -1", "--learning-rate 1e30 --runs 1", "--runs 0 --preset recipe",
    "--runs 0 --quick", "--seed -1 --preset recipe", "--out /dev/null/x",
])  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, error = stop_of(arguments.split(), capsys)
    assert status == 2 and error.count("\n") == 1 and error.endswith("\n")


def test_the_quick_study_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measure, fewer = gs.measure, dict(num_epochs=20)
    monkeypatch.setattr(gs, "measure", lambda s, **more: measure(s | fewer, **more))
    assert not gs.main("--quick --runs 2 --seed 4 --processes 1".split())
    shown = capsys.readouterr().out
    assert gs.EXAMPLE in shown and "  prompt [1, 0, 2]" in shown
    assert shown.count("reward ") > 9  # some responses to each prompt
    out = tmp_path / "runs" / "sort"
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    tables = [title for title, *_ in gs.EXPERIMENTS[1]]
    assert [row["table"][:2] for row in rows] == ["0.", "1.", "1.", "1."]
    assert {row["table"] for row in rows[1:]} == set(tables)
    for row in rows:
        assert len(row["exact_match"]) == 2 and row["settings"]["seed"] == 4
        assert row["settings"]["num_runs"] == 2
        assert f"| {row['label']} " in shown
    assert rows[0]["settings"]["reward_fn"] == "sort_distance_reward"
    names = {"results.json", "tables.md", "curves.png"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, numbers", [
    ("", (0, 1, 2, 3)), ("--quick", (0, 1)), ("--experiment 4 5", (4, 5)), ("--experiment 1", (1,)),
])  # fmt: skip
def test_the_command_line_chooses_the_experiments(arguments, numbers, tmp_path, monkeypatch):
    tables, drawn = [], []
    monkeypatch.setattr(gs, "run_tables", lambda new, *args, **kwargs: tables.extend(new))
    monkeypatch.setattr(gs, "draw_plots", lambda results, out: drawn.append(out))
    arguments += f" --processes 1 --out {tmp_path}/new/x"
    assert not gs.main(arguments.split())
    wanted = [table for n in numbers for table in gs.EXPERIMENTS.get(n, ())]
    assert tables[numbers[0] == 0 :] == wanted and drawn == [tmp_path / "new" / "x"]
    if numbers[0] == 0:
        assert tables[0][0][:2] == "0." and tables[0][1:] == (gs.RECIPE, [{}])


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch):
    rows = [make_row(), make_row()]

    def measure(*arguments):
        if not rows:
            raise KeyboardInterrupt
        return rows.pop()

    monkeypatch.setattr(gs, "measure", measure)
    arguments = ["--experiment", "2", "--processes", "1", "--out", str(tmp_path)]
    assert gs.main(arguments) == 130
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 2 and rows[1]["label"] == "+ normalized_rewards"
    assert "normalized_rewards" in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_a_missing_matplotlib_costs_the_plots_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.setattr(gs, "measure", lambda *_, **__: make_row())
    assert not gs.main(["--quick", "--processes", "1", "--out", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "tables.md"}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gs, "measure", lambda *_, **__: make_row())
    monkeypatch.setattr(gs, "write_results", full)
    status, error = stop_of(["--quick", "--processes", "1", "--out", str(tmp_path)], capsys)
    assert status == 2 and error.count("\n") == 1 and "No space left on device" in error


# --------------------------------------------------------------------------------------------------
# The file as something to copy from, and the README


@pytest.mark.parametrize("name", [
    "compute_deltas", "compute_process_deltas", "compute_loss", "compute_kl_penalty", "compute_gae",
])  # fmt: skip
def test_functions_lift_out_with_the_imports_that_they_name(name):
    node = next(n for n in ast.parse(SORT_SOURCE).body if getattr(n, "name", "") == name)
    assert "Needs: torch." in " ".join(ast.get_docstring(node).split())
    space = {"torch": torch}
    exec(ast.get_source_segment(SORT_SOURCE, node), space)  # nothing else of the file is there
    x, rewards = -torch.rand(2, 3, 4), torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 1.0]])
    arguments = {
        "compute_deltas": [(rewards, mode) for mode in gs.DELTAS],
        "compute_process_deltas": [(x,)],
        "compute_loss": [(x, rewards, mode, x - 0.1) for mode in gs.LOSSES],
        "compute_kl_penalty": [(x, x - 0.1, k, x - 0.2) for k in gs.KL_ESTIMATORS],
        "compute_gae": [(x, x)],
    }[name]
    for args in arguments:
        lifted, original = space[name](*args), getattr(gs, name)(*args)
        for a, b in zip(lifted, original) if isinstance(lifted, tuple) else [(lifted, original)]:
            assert torch.equal(a, b)


def test_the_functions_that_need_only_torch_are_all_tested_above():
    names = [
        node.name
        for node in ast.parse(SORT_SOURCE).body
        if isinstance(node, ast.FunctionDef) and "Needs: " in (ast.get_docstring(node) or "")
    ]
    marks = test_functions_lift_out_with_the_imports_that_they_name.pytestmark
    assert names == marks[0].args[1]


def test_the_readmes_example_of_a_reward_of_ones_own_works(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    exec(example, {})
    assert capsys.readouterr().out.strip() == "3.0" and "# 3.0;" in example


def test_the_numbered_lines_are_listed_in_the_readme():
    tables = re.findall(r"\| line \| in `(\w+\.py)` \|.*\n\|---.*\n((?:\| \(!.*\n)+)", README)
    assert [name for name, _ in tables] == ["grpo_sort.py", "grpo_gsm8k.py"]
    for source, (_, table) in zip((SORT_SOURCE, GSM_SOURCE), tables):
        marked = set(re.findall(r"(?m)(?:#.*|^ *)\(!(\d+)\)(?! to)", source))
        assert len(marked) > 5 and marked == set(re.findall(r"(?m)^\| \(!(\d+)\)", table))


def test_headers_list_every_section_and_the_readme_links_to_those_of_the_long_file():
    for source in (SORT_SOURCE, GSM_SOURCE):
        lines = source.split("\n")
        found = [(int(n), i) for i, x in enumerate(lines, 1) for n in re.findall(r"^# (\d+)\. ", x)]
        assert [n for n, _ in found] == list(range(1, len(found) + 1))
        header = source.partition('"""')[2].partition('"""')[0]
        listed = re.findall(r"(?:^|  )(\d+) [a-zK-P]", header, re.M)
        assert sorted(map(int, listed)) == [n for n, _ in found]
    links = re.findall(r"\[(\d+) [^\]]+\]\(grpo_gsm8k\.py#L(\d+)\)", README)
    assert [(int(n), int(line)) for n, line in links] == found


def errata():
    return README.partition("\n## Errata\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("expression, value", re.findall(r"`([^`]+)` → `([^`]+)`", errata()))
def test_what_the_errata_table_shows_is_so(expression, value):
    space = {"torch": torch, "gs": gs, "gsm": gsm, "study": sort_study}
    assert eval(expression, space) == ast.literal_eval(value)


def test_every_erratum_has_a_row_and_a_test():
    rows = [int(n) for n in re.findall(r"(?m)^\| (\d+) \|", errata())]
    names = set(re.findall(r"(?m)^def (test_\w+)", Path(__file__).read_text(encoding="utf-8")))
    tested = {int(n) for name in names for n in re.findall(r"^test_erratum_(\d+)_", name)}
    assert rows == sorted(tested) == list(range(1, 12))
    for part in re.findall(r"pytest test_grpo.py -k (\w+)", README):
        assert any(part in name for name in names), part


def test_every_command_of_the_readme_is_understood(monkeypatch, tmp_path, trained):
    """Those that take minutes, a GPU or the hub get as far as the work itself, which is left out;
    .ci/run runs the first three in full, other tests the quick ones."""
    done = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gs, "run_tables", lambda *arguments, **options: done.append(arguments))
    monkeypatch.setattr(gs, "draw_plots", lambda *arguments: None)
    monkeypatch.setattr(gsm, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(gsm, "prepare", lambda settings, device: (settings,))
    monkeypatch.setattr(gsm, "run", lambda *arguments: done.append(arguments) or 0)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).split("\n")
    commands = [re.split(r"\s# ", line.split(" && ")[-1])[0].strip() for line in blocks if line]
    commands += re.findall(r"`(\.venv/bin/[^`]+)`", README)
    count = 0
    for command in dict.fromkeys(commands):
        program, *arguments = command.split()
        arguments = [a for a in arguments if not a.startswith("--nproc-per-node")]
        before = len(done) + len(trained)
        if arguments[0] == "grpo_sort.py":
            assert not gs.main([*arguments[1:], "--processes", "1"]), command
        elif arguments[0] == "grpo_gsm8k.py":
            assert program == ".venv/bin/python" or "torchrun" in program
            assert gsm.main(arguments[1:]) == 0, command
        elif arguments[0] == "test_grpo.py":
            assert arguments[1:] in (["--study"], ["--benchmark"])
            continue
        elif arguments[0] == "results/sort/study.py":
            assert (HERE / arguments[0]).exists()
            continue
        else:
            assert arguments[:3] == ["-m", "pytest", "test_grpo.py"], command
            continue
        assert len(done) + len(trained) > before, command
        count += 1
    assert count > 10
    ci = (HERE / ".ci" / "run").read_text(encoding="utf-8")
    assert ".venv/bin/python grpo_gsm8k.py --rehearsal" in ci
    assert "readme_command 1" in ci and "readme_command 2" in ci


# --------------------------------------------------------------------------------------------------
# The committed results


def read_results():
    """results/sort/results.json → {"torch": …, "rows": […]}"""
    return json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))


def test_results_say_what_made_them():
    """results/README.md: versions, and minutes within a fifth, of what the files themselves say."""
    table = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    study = json.loads((GSM_RESULTS / "results.json").read_text())["rows"]
    bench = json.loads((GSM_RESULTS / "benchmark.json").read_text())["made_with"]
    assert {row["cpus"] for row in study} == {bench["cpus"]} == {2}
    starts = {row["seed"]: row["start_seconds"] for row in study}
    seconds = sum(row["train_seconds"] for row in study) + sum(starts.values())
    made = ("torch", "transformers", "trl")
    for name, versions, spent in (
        ("sort/results.json", {read_results()["torch"]}, None),
        ("gsm8k/results.json", {row[k] for row in study for k in made[:2]}, seconds),
        ("gsm8k/benchmark.json", {bench[k] for k in made}, None),
    ):
        line = next(line for line in table.split("\n") if line.startswith(f"| `{name}`"))
        assert all(version.split("+")[0] in line for version in versions), line
        if spent is not None:
            assert 0.8 < spent / 60 / int(re.search(r"(\d+) minutes", line).group(1)) < 1.2
    for path in (HERE / "results").glob("*/*.*"):
        assert path.name in table or f"`*{path.suffix}`" in table, path
    for image in re.findall(r"!\[.*?\]\((\S+?)\)", table):
        assert (HERE / "results" / image).exists()


def test_the_committed_results_meet_the_targets():
    rows = {(row["table"].split(".")[0], row["label"]): row for row in read_results()["rows"]}
    assert rows["2b", "+ learning_rate 0.005"]["exact_match"] == [1.0] * 32
    free = ("split", "num_epochs", "batch_size", "num_runs")
    recipe = {k: getattr(x, "__name__", x) for k, x in gs.UNSEEN.items() if k not in free}.items()
    for table in ("5a", "5b"):
        unseen = [
            r["unseen"]
            for (t, _), r in rows.items()
            if t == table and recipe <= r["settings"].items()
        ]
        assert len(unseen) == 1 and len(unseen[0]) >= 8 and statistics.mean(unseen[0]) >= 0.99
    for (table, label), row in rows.items():
        runs = min(len(x) for x in row.values() if isinstance(x, list))
        assert runs >= {"5a": 8, "5b": 8, "6e": 1}.get(table, 32), (table, label)


def test_the_committed_results_are_those_of_the_experiments():
    # After a change of a table in EXPERIMENTS they have to be made again.
    found = [(row["table"], row["settings"]) for row in read_results()["rows"]]
    for title, base, changes in itertools.chain(*gs.EXPERIMENTS.values()):
        settings = {}
        for change in changes:
            settings = (settings if base is None else base) | change
            wanted = {k: getattr(x, "__name__", x) for k, x in settings.items()}
            wanted = json.loads(json.dumps(wanted)).items()
            same = [
                t
                for t, s in found
                if t.split(".")[0] == title.split(".")[0] and wanted <= s.items()
            ]
            assert same, (title, change)


def test_the_committed_tables_are_those_of_the_results():
    text, rows = (RESULTS / "tables.md").read_text(encoding="utf-8"), read_results()["rows"]
    for title in dict.fromkeys(row["table"] for row in rows):
        lines = sort_study.format_table([row for row in rows if row["table"] == title])
        table = "\n".join(lines)
        assert f"## {title}\n\n{table}\n" in text


def test_the_committed_benchmark_meets_the_targets():
    """At most half of TRL's time and a third of its memory; the fastest of three ways to sample."""
    rows = json.loads((GSM_RESULTS / "benchmark.json").read_text())["rows"]

    def median(what):
        chosen = [row for row in rows if row["what"] == what and row["tokens"] == 128]
        return statistics.median(x for row in chosen for x in row["seconds"][1:])

    def peak(what, tokens=128):
        return max(row["peak"] for row in rows if row["what"] == what and row["tokens"] == tokens)

    assert median("ours") <= median("TRL") / 2 and peak("ours") <= peak("TRL") / 3
    assert median("the loop of this script") <= 1.1 * median("transformers, generate()")
    table = 4 * 32 * (512 - 64) * 32_000  # bytes of the logits that 448 more tokens would add
    assert peak("ours", 512) - peak("ours", 64) < table / 2
    assert format_benchmark(rows) in (GSM_RESULTS / "benchmark.md").read_text(encoding="utf-8")


NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
MEASURED = rf"{NUMBER} ± {NUMBER}|(?<![\d.,])\d+ of \d+(?![.\d])"  # "62.5 ± 9.5", "19 of 32"


def measured_in(text):
    return set(re.findall(MEASURED, text.replace("−", "-")))


def test_the_numbers_in_the_readme_are_those_of_the_results():
    tables = (RESULTS / "tables.md").read_text(encoding="utf-8")
    numbers = measured_in(tables)
    lines = {" ".join(line.split()) for line in tables.split("\n")}  # without the padding
    blocks = re.findall(r"<!-- from (results/\S+) -->\n(.*?)<!-- end -->", README, re.S)
    assert "results/sort/tables.md" in dict(blocks)
    for source, block in blocks:
        text = (HERE / source).read_text(encoding="utf-8")
        for line in filter(str.strip, block.split("\n")):
            if source != "results/sort/tables.md":
                assert line in text, f"README.md quotes {source}, which does not say: {line}"
            elif line.startswith("|"):
                assert " ".join(line.split()) in lines, f"not in {source}: {line}"
            else:
                assert measured_in(line) <= numbers, f"not in {source}: {line}"
    # Outside these blocks no measured figure: a mean with its interval stands nowhere else.
    rest = re.sub(r"<!-- from .*?<!-- end -->", "", README, flags=re.S)
    for number in measured_in(rest):
        assert number in numbers or " of " in number, f"README.md says {number}, results/ does not"
    for image in re.findall(r"!\[.*?\]\((results/\S+?)\)", README):
        assert (HERE / image).exists()


# ==================================================================================================
# grpo_gsm8k.py

GSM8K = os.environ.get("GSM8K")  # a folder with the real train.jsonl and test.jsonl
needs_gsm8k = pytest.mark.skipif(not GSM8K, reason="set GSM8K to a folder with the real data")
GSM_SOURCE = (HERE / "grpo_gsm8k.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def problems():
    return gsm.make_problems(seed=0)


@pytest.fixture(scope="session")
def tokenizer(problems):
    return gsm.make_tokenizer(problems[0][:500])


def make_policy(vocab_size=450, seed=0, layers=2, scale=1.0, **config):
    """A tiny random Qwen2; scale sharpens its distribution. (With tied embeddings a random model
    would only repeat its last token, and prove little.)"""
    torch.manual_seed(seed)
    options = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )
    policy = gsm.Qwen2ForCausalLM(gsm.Qwen2Config(**options | config))
    with torch.no_grad():
        policy.get_output_embeddings().weight *= scale
    return policy


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, problems, tokenizer):
    """A folder like a downloaded checkpoint, its training and its held-out file."""
    folder = tmp_path_factory.mktemp("start")
    for name, rows in zip(("train", "test"), problems):
        text = "".join(json.dumps(row) + "\n" for row in rows[:60])
        (folder / f"{name}.jsonl").write_text(text)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    make_policy(len(tokenizer), scale=4.0, **ends).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


class Words:
    """A tokenizer of single characters: enough of one for the sampling tests."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, padding_side="left", **options):
        width = max(map(len, texts))
        ids = [[0] * (width - len(t)) + [2 + ord(c) % 8 for c in t] for t in texts]
        mask = [[0] * (width - len(t)) + [1] * len(t) for t in texts]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# --------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("text, message", [
    ("", "no problems"),
    ("\n\n", "no problems"),
    ('{"question": "q", "answer": "a\\n#### 1"}\n{"question": ', ":2: not JSON"),
    ("[1]\n", ":1: a problem must be"),
    ('{"answer": "#### 1"}', ":1: no question"),
    ('{"question": "  ", "answer": "#### 1"}', ":1: no question"),
    ('{"question": "q", "answer": "18"}', ":1: 'answer' must end"),
    ('{"question": "q", "answer": "#### "}', ":1: 'answer' must end"),
    ('{"question": "q", "answer": "#### many"}', ":1: 'many' after '####' is not one number"),
    ('{"question": "\\ud800", "answer": "#### 1"}', ":1: the question holds half a surrogate"),
    ("[" * 100_000, ":1: not JSON"),
])
def test_bad_data_is_refused_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        gsm.load_problems(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_files_that_are_missing_or_not_utf8_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        gsm.load_problems(tmp_path / "nothing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl:1: not JSON in UTF-8"):
        gsm.load_problems(tmp_path / "latin.jsonl")


def test_rows_keep_question_and_final_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"question": "How many?", "answer": "2*3=6\\n#### 1,080"}\n\n')
    assert gsm.load_problems(path) == [{"question": "How many?", "answer": "1,080"}]


def test_erratum_8_the_prompt_is_the_tokenizers_own_template(tokenizer):
    prompt = gsm.build_prompt("How many?", tokenizer)
    assert prompt == (
        f"<|im_start|>system\n{gsm.SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert tag in gsm.SYSTEM_PROMPT
    assert gsm.extract_answer_from_model_output(gsm.SYSTEM_PROMPT) is None  # no credit for echoing
    bare = gsm.Qwen2Tokenizer()
    with pytest.raises(ValueError, match="chat template"):
        gsm.build_prompt("How many?", bare)


@needs_gsm8k
def test_every_row_of_gsm8k_loads_and_every_gold_answer_is_a_number():
    sizes = [len(gsm.load_problems(f"{GSM8K}/{split}.jsonl")) for split in ("train", "test")]
    assert sizes == [7473, 1319]  # load_rows refuses answers that parse_number cannot read


# --------------------------------------------------------------------------------------------------
# Outcome rewards


@pytest.mark.parametrize("text, number", [
    ("5", 5), ("-5", -5), ("−5", -5), ("+5", 5), ("$5", 5), ("-$5", -5), ("$-5", -5), ("£1,080.10", "10801/10"),
    ("€3", 3), ("50%", 50), ("5\\%", 5), ("1,000", 1000), ("1,234,567.5", "2469135/2"), ("1{,}000", 1000),
    (".5", "1/2"), ("0.50", "1/2"), ("5.", 5), ("18,", 18), ("...5", 5), ("007", 7), ("-0", 0),
    ("42 apples", 42), ("The answer is 18.", 18), ("$ 18 a day", 18), ("25 cm²", 25), ("$8/hour", 8),
    ("\\boxed{42}", 42), ("\\frac{1}{2}", "1/2"), ("-\\frac{1}{2}", "-1/2"), ("\\dfrac{6}{4}", "3/2"),
    ("1/2", "1/2"), ("3 / 4 cup", "3/4"), ("**72**", 72), ("x = -7", -7), ("\\$5", 5),
    # none, several, or nothing sure
    ("", None), ("none", None), ("5-3", None), ("10-20", None), ("1 1/2", None), ("2\\frac{1}{2}", None),
    ("1,00", None), ("1,0000", None), (",5,", 5), ("1.2.3", None), ("1e5", None), ("10^5", None), ("5:30", None),
    ("1/0", None), ("1/2/3", None), ("5 6", None), ("٣", None), ("٣5", None), ("2½", None), ("9" * 41, None),
    ("10²", None), ("(10)³", None), ("\\frac12", None), ("5 m²", 5),
    ("\ud800", None), ("5 and five", 5),
])
def test_parse_number(text, number):
    assert gsm.parse_number(text) == (None if number is None else Fraction(number))


def test_parse_number_reads_back_what_was_written():
    draw = random.Random(0)
    for _ in range(2000):
        value = Fraction(draw.randrange(-10**9, 10**9), draw.choice([1, 1, 10, 100]))
        text = f"{abs(float(value)):,.2f}" if draw.random() < 0.5 else f"{abs(float(value)):.2f}"
        sign = "-" if value < 0 else ""
        written = draw.choice([f"{sign}{text}", f"{sign}${text}", f"about {sign}{text} dollars.", f"{sign}{text}%"])
        assert gsm.parse_number(written) == value, written


@pytest.mark.parametrize("hostile", [
    "9" * 1_000_000, "1," * 500_000, "1=" * 500_000, "(" * 500_000 + "=1", "\\frac{" * 200_000,
    "<answer>" * 200_000, "<reasoning>" * 100_000, "<<" * 300_000, "1=1\n" * 50_000, "." * 500_000 + "1",
    "1+1=2 " * 100_000, "-" * 500_000 + "5", "\ud800" * 1000, "9" * 40 + "*9" * 900 + "=1", "1/" * 300_000,
    "٣" * 500_000, "$" * 500_000, " " * 500_000 + "1", "- " * 300_000 + "=", "\\" * 500_000, "x" * 500_000,
], ids=lambda text: text[:8].encode("unicode_escape").decode())
def test_hostile_text_is_graded_in_linear_time(hostile):
    """Every grader must survive what a model may write; 0.5 MB within seconds, and never raise."""
    started = time.perf_counter()
    answer = f"<answer>{hostile}</answer>"
    gsm.parse_number(hostile)
    gsm.last_number(hostile)
    assert gsm.correctness_reward([hostile, answer], ["7", "7"]) == [0.0, 0.0]
    assert gsm.format_reward([hostile])[0] <= 0.8
    steps = gsm.step_rewards(hostile, "7")
    assert steps[-1] == (len(hostile), 0.0)
    gsm.step_rewards(f"<reasoning>\n{hostile}\n</reasoning>{answer}", "7")
    assert time.perf_counter() - started < 10


def test_the_answer_is_what_stands_in_the_last_closed_tag():
    extract = gsm.extract_answer_from_model_output
    assert extract("<answer>\n 5 \n</answer>") == "5"
    assert extract("<answer>4</answer> no, <answer>5</answer> done") == "5"
    for text in ("5", "<answer>5", "<answer></answer>", "<answer>...</answer>", "</answer>5<answer>",
                 "<answer>4</answer><answer>5", ""):
        assert extract(text) is None
    assert gsm.extract_answer_from_dataset("so 2*3=6\n#### 6 ") == "6"
    assert gsm.extract_answer_from_dataset("6") is None and gsm.extract_answer_from_dataset("####") is None


def test_correctness_and_format_rewards():
    answers = ["1,080"] * 6
    texts = [f"<answer>{x}</answer>" for x in ("1,080", "1080", "$1080.00", "1081", "1,080 or 1,081")] + ["1,080"]
    assert gsm.correctness_reward(texts, answers) == [2.0, 1.5, 1.5, 0.0, 0.0, 0.0]
    full = "<reasoning>\n</reasoning>\n<answer>\n1,080\n</answer>"
    texts = ["", "<answer>", "<answer></answer>", full, full + full]
    assert gsm.format_reward(texts) == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert gsm.combined_reward([full, "1,080"], ["1,080"] * 2) == pytest.approx([2.8, 0.0])


def test_erratum_8_a_reader_without_commas_cannot_read_gold_answers():
    """The tutorial's pattern for a number finds two in '1,080', and so none."""
    assert re.findall(r"-?\d*\.?\d+", "1,080") == ["1", "080"]
    assert gsm.parse_number("1,080") == 1080


@needs_gsm8k
def test_erratum_8_93_gold_answers_have_a_comma():
    rows = [row for split in ("train", "test") for row in gsm.load_problems(f"{GSM8K}/{split}.jsonl")]
    assert len(rows) == 8792 and sum("," in row["answer"] for row in rows) == 93


# --------------------------------------------------------------------------------------------------
# Step rewards


@pytest.mark.parametrize("line, verdicts", [
    ("Natalia sold 48/2 = 24 clips in May.", [True]),
    ("48/2 = <<48/2=25>>24", [True]),  # the text; the annotation is judged by step_rewards
    ("2*3 = 6 = 7", [True, False]), ("7 - 3 = 4 - 0 = 4 eggs", [True, True]), ("2*3 = 6 = 6", [True, True]),
    ("100/3 = 33.3", [True]), ("100/3 = 33.33", [True]), ("100/3 = 33.4", [False]), ("100/3 = 33", [True]),
    ("33.3 = 100/3", [True]), ("0.1 + 0.2 = 0.3", [True]), ("1,000*2 = 2,000", [True]), ("12*3 = 35", [False]),
    ("5 x 4 = $20", [True]), ("5x4=21", [False]), ("5 × 4 = 20", [True]), ("9 ÷ 3 = 3", [True]), ("9 − 3 = 6", [True]),
    ("\\( 48 \\div 2 = 24 \\)", [True]), ("\\frac{48}{2} = 24", [True]), ("\\[ 3 \\times 4 = 13 \\]", [False]),
    ("20% * 50 = 10", [True]), ("5/20*100 = 25%", [True]), ("100% - 20% = 80%", [True]), ("20% * 50 = 11", [False]),
    ("(2+3)*4 = 20", [True]), ("2+3*4 = 14", [True]), ("10-4-3 = 3", [True]), ("24/4/2 = 3", [True]),
    ("-5+3 = -2", [True]), ("5 - -3 = 8", [True]), ("-(2+3)*2 = -10", [True]), ("- 5 + 3 = 8", [True]),
    ("**2*3 = 6**", [True]), ("1. 5 + 3 = 8", [True]), ("So: 5 + 3 = 8, and 2 + 2 = 5.", [True, False]),
    ("$40 + $2.50 = $42.50", [True]), ("5+3 = 8/hour", [True]), ("3 + 4 ≈ 7", [True]),
    # not checkable, whatever the numbers say
    ("24 cups * 1/12 = 2", []), ("6 meters * 2 walls = 13", []), ("$1 = 100 cents", []), ("x = 5 + 3", []),
    ("x = 12", []), ("2x = 10", []), ("15% of $80 = (15/100)*$80", []), ("2**3 = 8", []), ("2^3 = 9", []),
    ("= 5", []), ("5 + 3 =", []), ("5 + 3 == 9", []), ("3 + 4 >= 8", []), ("1/0 = 5", []), ("(2+3 = 5", []),
    ("() = 5 + 1", []), ("5 5 + 3 = 8", []), ("1,00 + 3 = 103", []), ("1.2.3 + 1 = 5", []), ("Week 2 = 35 + 35", []),
    ("2(3+4) = 15", []), ("no equation", []), ("", []), ("So 10% = 5.", []), ("100% = 50", []), ("30% off = 70% = 14", []),
])
def test_equations_are_judged_only_where_they_are_certain(line, verdicts):
    assert gsm.check_equations(gsm.ANNOTATION.sub("", line)) == verdicts


def test_arithmetic_is_that_of_python_on_random_expressions():
    draw = random.Random(0)
    for _ in range(2000):
        size = draw.randrange(1, 7)
        text = f"{draw.randrange(20)}"
        for _ in range(size):
            text = draw.choice([f"({text})", text, f"-({text})", f"{draw.randrange(20)} - ({text})"])
            text += f" {draw.choice('+-*/')} {draw.choice(['', '-'])}{draw.randrange(1, 20)}"
        exact = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
        assert gsm.evaluate_arithmetic(gsm.tokenize_arithmetic(text)) == exact, text


def test_steps_are_lines_of_the_reasoning_and_the_answer():
    text = "<reasoning>\nI think.\n2*3 = 6\nThen 6+1 = 8, 1+1 = 2.\n<<6+1=7>>7\n</reasoning>\n1+1 = 3\n<answer>7</answer> bye"
    steps = gsm.step_rewards(text, "7")
    assert [reward for _, reward in steps] == [1.0, 0.0, 1.0, 1.0]
    ends = [text[:end].split("\n")[-1] for end, _ in steps]
    assert ends == ["2*3 = 6", "Then 6+1 = 8, 1+1 = 2.", "<<6+1=7>>7", "<answer>7</answer> bye"]
    # without tags the text before the answer counts; the answer is worth 0, 0.75 or 1
    assert gsm.step_rewards("2*3 = 6", "6") == [(7, 1.0), (7, 0.0)]
    assert gsm.step_rewards("<answer>1080</answer>", "1,080") == [(21, 0.75)]
    assert gsm.step_rewards("", "7") == [(0, 0.0)]
    assert gsm.step_rewards("<<5=5>> 2 * 2 = <<2*2=5>>4", "5")[0] == (26, 0.0)


@needs_gsm8k
@pytest.mark.parametrize("split", ["train", "test"])
def test_step_checker_on_the_reasoning_of_gsm8k(split):
    """Judged: at least 75 % of the annotated lines; misjudged: at most 0.5 % of those; caught: at
    least 97 % of planted mistakes; every annotation of the training set holds."""
    lines = judged = misjudged = planted = caught = 0
    draw = random.Random(0)
    for row in Path(GSM8K, f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        for line in json.loads(row)["answer"].partition("\n####")[0].split("\n"):
            for annotation in gsm.ANNOTATION.findall(line):
                assert gsm.check_equations(annotation, annotation=True) == [True] * annotation.count("=")
            if "<<" not in line:
                continue
            plain = gsm.ANNOTATION.sub("", line)
            lines += 1
            steps = gsm.step_rewards(plain, "0")
            judged, misjudged = judged + (len(steps) > 1), misjudged + (steps[0][1] == 0 and len(steps) > 1)
            results = list(re.finditer(r"=\s*\$?\s*([0-9][0-9,]*(?:\.[0-9]+)?)(?![0-9])", plain))
            if len(steps) > 1 and steps[0][1] == 1 and results:
                match = results[-1]
                wrong = Fraction(match.group(1).replace(",", "")) + draw.choice([1, -1, 2, 10])
                digits = len(match.group(1).partition(".")[2])
                spoiled = plain[: match.start(1)] + f"{float(wrong):.{digits}f}" + plain[match.end(1) :]
                planted, caught = planted + 1, caught + (gsm.step_rewards(spoiled, "0")[0][1] == 0)
    print(f"{split}: {lines} lines, judged {judged / lines:.4f}, misjudged {misjudged / judged:.5f}, "
          f"caught {caught / planted:.4f} of {planted}")
    assert judged / lines >= 0.75 and misjudged / judged <= 0.005 and caught / planted >= 0.97


def test_step_ends_fall_on_the_right_tokens(tokenizer):
    """Every end is compared with a plain search; the tokens are random, not what an encoder would
    make of the text, and some characters take several tokens."""
    draw = random.Random(0)
    pieces = ["2", "*", " ", "3", "=", "6", "\n", "é", "🙂", "x", "<answer>", "</answer>", "<|im_end|>"]
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    assert max(map(len, pieces)) == 4  # the smiling face is four tokens
    for _ in range(200):
        ids = [token for piece in draw.choices(pieces, k=draw.randrange(1, 40)) for token in piece]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ends = sorted({i + 1 for i, c in enumerate(text) if c == "\n"})
        steps = [(end, 1.0) for end in ends] + [(len(text), 0.5)]
        found = gsm.locate_steps(steps, ids, tokenizer)
        for (end, _), (index, _) in zip(steps[:-1], found):
            prefixes = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
            assert index == next(i for i, prefix in enumerate(prefixes) if prefix[:end] == text[:end])
        assert found[-1] == (len(ids) - 1, 0.5)  # the last step takes the end token with it


# --------------------------------------------------------------------------------------------------
# Sampling


def test_the_mask_ends_with_the_first_of_several_end_tokens():
    ids = torch.tensor([[5, 6, 1, 1], [5, 3, 1, 7], [5, 6, 7, 8], [1, 5, 5, 5]])
    assert gsm.create_completion_mask(ids, [1, 3]).tolist() == [
        [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0],
    ]
    # pad token and end token are often the same: the end must stay inside
    assert gsm.create_completion_mask(torch.tensor([[4, 0, 0, 0]]), [0]).tolist() == [[1, 1, 0, 0]]


def hostile(policy):
    config = policy.generation_config
    config.do_sample, config.top_k, config.top_p = True, 2, 0.5
    config.repetition_penalty, config.temperature, config.eos_token_id = 1.5, 0.3, [1, 2]
    return policy


def test_erratum_8_samples_come_from_the_distribution_that_is_scored():
    """Under a generation_config that would cut the distribution to two tokens. χ² of 20,000 samples
    of two tokens against softmax(logits / T); 99.99 % of honest samplers stay below the bound."""
    policy, G, temperature = hostile(make_policy(10, scale=2.0)), 20_000, 0.7
    ids, mask, completions, completion_mask = gsm.generate_completions(
        policy, Words(), ["abc"], G, 2, temperature, generator=torch.Generator().manual_seed(0)
    )
    first = (policy(ids[:1]).logits[0, -1] / temperature).softmax(-1).double()
    expected = torch.zeros(10, 11, dtype=torch.double)  # [first second], 10 = ended
    for token in range(10):
        if token in (1, 2):
            expected[token, 10] = first[token]
            continue
        sequence = torch.cat([ids[:1], torch.tensor([[token]])], dim=1)
        expected[token, :10] = first[token] * (policy(sequence).logits[0, -1] / temperature).softmax(-1)
    second = torch.where(completion_mask[:, 1] == 1, completions[:, 1], 10)
    counts = torch.zeros(10, 11, dtype=torch.double).index_put_(
        (completions[:, 0], second), torch.ones(G, dtype=torch.double), accumulate=True
    )
    cells = expected > 0
    chi_squared = ((counts - G * expected)[cells] ** 2 / (G * expected[cells])).sum().item()
    freedom = cells.sum().item() - 1
    assert counts[~cells].sum() == 0 and chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_completions_are_those_of_transformers_generate():
    policy, prompts = make_policy(10, scale=3.0), ["abcdefgh", "cd", "hgfedcbaab"]
    ids, mask, completions, completion_mask = gsm.generate_completions(policy, Words(), prompts, 1, 20, 0)
    theirs = policy.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=1, pad_token_id=0
    )[:, ids.shape[1] :]
    assert len(set(map(tuple, completions.tolist()))) == 3
    for ours, kept, other in zip(completions, completion_mask, theirs):
        assert ours[kept == 1].tolist() == other[: kept.sum()].tolist()


def test_an_error_while_sampling_leaves_every_module_in_its_mode(tokenizer):
    """Out of memory, say: a model left in eval mode would train without its dropout."""
    policy = make_policy(len(tokenizer)).train()
    policy.base_model.norm.eval()  # a frozen part, which stays as it was

    def fails(*arguments, **options):
        assert not policy.base_model.layers.training
        raise MemoryError

    policy.base_model.forward = fails
    with pytest.raises(MemoryError):
        gsm.generate_completions(policy, tokenizer, ["How many?"], 2, 4)
    assert policy.training and policy.base_model.layers.training and not policy.base_model.norm.training


def test_left_padding_and_cache_change_no_log_probability():
    """Each sampled row again, alone and without padding or cache, must have the probabilities that
    the batch gave it: guards positions, attention mask and the dropping of finished rows."""
    policy, prompts = make_policy(10, scale=2.0), ["a", "bcdefgh", "hg"]
    generator = torch.Generator().manual_seed(0)
    ids, mask, completions, completion_mask = gsm.generate_completions(
        policy, Words(), prompts, 8, 12, generator=generator
    )
    assert ids.shape == (24, 7) and completion_mask.sum(-1).unique().numel() > 3
    assert [row[m == 1].tolist() for row, m in zip(ids[::8], mask[::8])] == [
        row[m == 1].tolist() for row, m in zip(*Words()(prompts).values())
    ]
    together = gsm.compute_log_probs(
        policy, torch.cat([ids, completions], 1), torch.cat([mask, completion_mask], 1), completions.shape[1]
    )
    for row in range(24):
        n, prompt = completion_mask[row].sum(), ids[row][mask[row] == 1]
        sequence = torch.cat([prompt, completions[row, :n]]).unsqueeze(0)
        logits = policy(sequence).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1)[range(n), completions[row, :n]]
        assert torch.allclose(together[row, :n], alone, atol=1e-5)


def test_positions_do_not_count_the_padding():
    """With learned absolute positions, as in GPT-2; Qwen2's rotary ones would hide the mistake."""
    torch.manual_seed(0)
    policy = gsm.transformers.GPT2LMHeadModel(gsm.transformers.GPT2Config(
        vocab_size=10, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1
    )).eval()
    policy.transformer.wpe.weight.data *= 50
    together = gsm.generate_completions(policy, Words(), ["a", "bcdefgh"], 1, 8, temperature=0)
    alone = gsm.generate_completions(policy, Words(), ["a"], 1, 8, temperature=0)
    n = alone[3].sum()
    assert together[3][0].sum() == n and torch.equal(together[2][0, :n], alone[2][0, :n])
    ids, mask = (torch.cat(pair, dim=1) for pair in (together[::2], together[1::2]))
    short, short_mask = (torch.cat(pair, dim=1) for pair in (alone[::2], alone[1::2]))
    padded = gsm.compute_log_probs(policy, ids[:1], mask[:1], together[2].shape[1])[0, :n]
    assert torch.allclose(padded, gsm.compute_log_probs(policy, short, short_mask, alone[2].shape[1])[0, :n], atol=1e-5)


def test_the_same_generator_gives_the_same_samples_and_the_mode_is_restored():
    policy = make_policy(10)
    sample = [
        gsm.generate_completions(policy.train(mode), Words(), ["ab"], 5, 9, generator=torch.Generator().manual_seed(3))
        for mode in (True, False)
    ]
    assert torch.equal(sample[0][2], sample[1][2]) and not policy.training
    gsm.generate_completions(policy.train(), Words(), ["ab"], 1, 2)
    assert policy.training


def test_erratum_8_checkpointing_in_train_mode_spoils_the_completions():
    """Gradient checkpointing in train mode drops the KV cache inside each layer, and transformers 5
    before 5.24 then generates from the last token alone. generate_completions must not care."""
    policy = make_policy(50, layers=4, scale=2.0)
    honest = gsm.generate_completions(policy.eval(), Words(), ["abcd", "efgh"], 1, 30, 0, [49])[2]
    policy.train()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    ours = gsm.generate_completions(policy, Words(), ["abcd", "efgh"], 1, 30, 0, [49])[2]
    assert torch.equal(ours, honest)
    ids = Words()(["abcd", "efgh"])["input_ids"]
    options = dict(do_sample=False, max_new_tokens=30, eos_token_id=49, pad_token_id=0)
    theirs = policy.generate(ids, **options)[:, 4:]
    width = min(theirs.shape[1], honest.shape[1])
    agreement = (theirs[:, :width] == honest[:, :width]).float().mean().item()
    version = tuple(int(n) for n in gsm.transformers.__version__.split(".")[:2])
    assert agreement < 0.9 if version < (5, 24) else agreement == 1


def test_logits_that_are_not_finite_are_an_error_not_a_crash(tokenizer):
    policy = make_policy(len(tokenizer)).train()
    with torch.no_grad():
        policy.model.norm.weight[0] = math.nan
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="not finite"):
            gsm.generate_completions(policy, Words(), ["ab"], 2, 3, temperature)
    assert policy.training
    with pytest.raises(FloatingPointError, match="not finite"):
        gsm.evaluate_model(policy, tokenizer, [{"question": "?", "answer": "1"}], 3)


def test_the_cache_keeps_what_attention_computes_with_and_changes_nothing(monkeypatch):
    """Under autocast: the same samples as with transformers' own cache, in half the memory."""
    policy, prompts = make_policy(10, scale=2.0), ["abc", "defgh"]
    kept, update = [], gsm.DynamicCache.update
    monkeypatch.setattr(gsm.DynamicCache, "update", lambda self, k, v, *a, **o: kept.append(k.dtype) or update(self, k, v, *a, **o))
    samples = []
    for cache in (gsm.Cache, gsm.DynamicCache):
        monkeypatch.setattr(gsm, "Cache", cache)
        with torch.autocast("cpu", torch.bfloat16):
            samples.append(gsm.generate_completions(
                policy, Words(), prompts, 8, 12, generator=torch.Generator().manual_seed(0)
            )[2])
    assert torch.equal(*samples) and set(kept[: len(kept) // 2]) == {torch.bfloat16} and kept[-1] == torch.float32


def test_end_tokens_are_those_of_the_checkpoint_and_of_the_tokenizer():
    policy = hostile(make_policy(10))
    assert gsm.get_eos_token_ids(policy, Words()) == [1, 2]
    policy.generation_config.eos_token_id = 7
    assert gsm.get_eos_token_ids(policy, Words()) == [1, 7]
    endless = Words()
    endless.eos_token_id = policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end token"):
        gsm.get_eos_token_ids(policy, endless)


# --------------------------------------------------------------------------------------------------
# Log-probabilities


def test_log_probs_and_their_gradient_are_those_of_the_whole_table():
    """Chunks, recomputation, shift by one, temperature: against log_softmax over everything."""
    policy, temperature = make_policy(40).double(), 0.8
    ids = torch.randint(40, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    table = (policy(ids, attention_mask=mask, position_ids=positions).logits.float() / temperature).log_softmax(-1)
    expected = table[:, :-1].gather(-1, ids[:, 1:, None])[:, -6:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), list(policy.parameters()))
    for chunk_size in (1, 4, 5, 1000):
        log_probs = gsm.compute_log_probs(policy, ids, mask, 6, temperature, chunk_size)
        assert log_probs.dtype == torch.float32 and torch.allclose(log_probs, expected, atol=1e-5)
        given = torch.autograd.grad((log_probs * weights).sum(), list(policy.parameters()))
        for a, b in zip(given, wanted):
            assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep must be between 1 and 10, not 11"):
        gsm.compute_log_probs(policy, ids, mask, 11)


def test_selective_log_softmax_is_log_softmax_at_the_ids():
    logits = 30 * torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (4, 5))
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(gsm.selective_log_softmax(logits, ids).double(), expected, atol=1e-5)
    assert gsm.selective_log_softmax(logits.bfloat16(), ids).dtype == torch.float32


def test_the_memory_of_log_probs_does_not_hold_the_whole_table():
    """The largest tensor that autograd keeps must not have a vocabulary axis for every token."""
    policy, sizes = make_policy(5000), []
    ids = torch.randint(5000, (4, 65))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        gsm.compute_log_probs(policy, ids, torch.ones_like(ids), 64, chunk_size=16)
    weights = max(p.numel() for p in policy.parameters())
    assert max(sizes) <= weights < 4 * 64 * 5000


def test_bfloat16_weights_do_not_learn_at_the_default_learning_rate():
    """(!8): why the weights are float32. One AdamW step of 2e-6 on weights near 0.02."""
    for dtype, moved in ((torch.float32, 1.0), (torch.bfloat16, 0.0)):
        weight = torch.nn.Parameter(torch.full((1000,), 0.02, dtype=dtype))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=gsm.Settings.learning_rate, weight_decay=0.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert (weight != before).float().mean().item() == moved
    here = torch.tensor(0.02).bfloat16()
    above = torch.nextafter(here, torch.tensor(1.0).bfloat16())
    assert above.item() - here.item() == pytest.approx(1.2e-4, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_are_their_formulas():
    groups = [[2.8, 0.8, 0.8, 0.0], [0.0, 0.0, 0.6, 0.0]]
    everything = groups[0] + groups[1]
    for mode in gsm.ADVANTAGES:
        given = gsm.compute_advantages(torch.tensor(groups), mode).tolist()
        for group, row in zip(groups, given):
            for i, r in enumerate(group):
                centred = r - statistics.mean(group)
                expected = {
                    "centered": centred,
                    "normalized": centred / (statistics.stdev(group) + 1e-4),
                    "leave_one_out": r - statistics.mean(group[:i] + group[i + 1 :]),
                    "batch_normalized": centred / (statistics.stdev(everything) + 1e-4),
                }[mode]
                assert row[i] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", gsm.ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.6000000000000001, 0.8, 2.8])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(mode, reward):
    """(!3): the float32 mean of equal numbers may differ from them by a rounding error."""
    rewards = torch.full((3, 7), reward)
    rewards[0, 0] = 1.0
    advantages = gsm.compute_advantages(rewards, mode)
    assert (advantages[1:] == 0).all() and (advantages[0] != 0).all()


def test_wrong_advantages_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        gsm.compute_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"must be \[batch num_generations\]"):
        gsm.compute_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match="'best' is unknown"):
        gsm.compute_advantages(torch.zeros(3, 2), "best")


def test_process_advantages_refuse_character_offsets_and_take_whole_numbers():
    with pytest.raises(ValueError, match="behind the 4 tokens"):
        gsm.compute_process_advantages([[(19, 1.0)], [(3, 0.0)]], torch.ones(2, 4))
    of_ints = gsm.compute_process_advantages([[(3, 1)], [(3, 0)]], torch.ones(2, 4))
    assert torch.equal(of_ints, gsm.compute_process_advantages([[(3, 1.0)], [(3, 0.0)]], torch.ones(2, 4)))


def test_process_advantages_sum_the_normalised_rewards_of_later_steps():
    steps = [[(1, 1.0), (3, 0.0)], [(4, 1.0)], [(0, 0.0), (2, 1.0), (4, 1.0)], [(2, 0.0)]]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = gsm.compute_process_advantages(steps, mask)
    rewards = [reward for row in steps for _, reward in row]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards) + 1e-4
    for row in range(4):
        for pos in range(5):
            expected = sum((r - mean) / std for end, r in steps[row] if end >= pos) * mask[row, pos].item()
            assert given[row, pos].item() == pytest.approx(expected, abs=1e-5)
    twice = gsm.compute_process_advantages(steps + steps[::-1], torch.cat([mask, mask.flip(0)]), 4)
    assert torch.equal(twice[:4], given) and torch.allclose(twice[4:], given.flip(0))
    same = gsm.compute_process_advantages([[(0, 0.7)], [(1, 0.7), (2, 0.7)]], torch.ones(2, 3))
    assert (same == 0).all()
    with pytest.raises(ValueError, match="step_rewards has 4 rows"):
        gsm.compute_process_advantages(steps, mask[:3])
    with pytest.raises(ValueError, match="multiple of num_generations"):
        gsm.compute_process_advantages(steps, mask, 3)


# --------------------------------------------------------------------------------------------------
# The loss


def random_step(rows=4, length=6, seed=0, per_token=False, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=draw, dtype=dtype)

    log_probs = -3 * uniform(rows, length)
    old, reference = log_probs + 0.6 * (uniform(rows, length) - 0.5), log_probs + uniform(rows, length) - 0.5
    mask = (torch.arange(length) < torch.tensor([length, 2, 4, 1])[:rows, None]).long()
    advantages = 2 * uniform(rows, length) - 1 if per_token else 2 * uniform(rows) - 1
    return log_probs.requires_grad_(), old, reference, advantages, mask


def loss_by_hand(log_probs, old, reference, advantages, mask, kind, level, epsilon, high, beta, constant, items):
    """The formulas again, a number at a time."""
    rows = []
    for lp, op, rp, a, m in zip(*(x.tolist() for x in (log_probs, old, reference, advantages, mask))):
        n = sum(m)
        geometric = math.exp(sum(lp[t] - op[t] for t in range(n)) / n)
        tokens = []
        for t in range(n):
            ratio = geometric if level == "sequence" else math.exp(lp[t] - op[t])
            A = a[t] if isinstance(a, list) else a
            if kind == "cispo":
                token = -min(ratio, 1 + high) * A * lp[t]
            else:
                token = -min(ratio * A, min(max(ratio, 1 - epsilon), 1 + high) * A)
            tokens.append(token + beta * (math.exp(rp[t] - lp[t]) - (rp[t] - lp[t]) - 1))
        rows.append(tokens)
    if kind == "grpo":
        return statistics.mean(sum(tokens) / len(tokens) for tokens in rows)
    total = sum(map(sum, rows))
    return total / (len(rows) * constant) if kind == "dr_grpo" else total / (items or sum(map(len, rows)))


@pytest.mark.parametrize("kind", gsm.LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, high, per_token, items", [(0, None, False, None), (0.3, 0.4, True, 29)])
def test_the_loss_is_its_formula(kind, level, beta, high, per_token, items):
    step = random_step(per_token=per_token)
    loss, _ = gsm.grpo_loss(
        *step, epsilon=0.1, epsilon_high=high, beta=beta, loss_type=kind, importance_sampling_level=level,
        max_completion_length=9, num_items=items,
    )
    by_hand = loss_by_hand(*step, kind, level, 0.1, high or 0.1, beta, 9, items)
    assert loss.item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_the_gradient_is_that_of_finite_differences(kind, level):
    log_probs, *rest = random_step(per_token=True)

    def loss(x):
        return gsm.grpo_loss(
            x, *rest, loss_type=kind, importance_sampling_level=level, max_completion_length=9
        )[0]

    assert torch.autograd.gradcheck(loss, [log_probs])


def test_cispo_pushes_every_token_with_its_clipped_weight():
    log_probs, old, _, advantages, mask = random_step()
    loss, _ = gsm.grpo_loss(log_probs, old, None, advantages, mask, loss_type="cispo", beta=0, epsilon_high=0.1)
    loss.backward()
    weight = (log_probs - old).exp().clamp(max=1.1)
    assert torch.allclose(log_probs.grad, -(weight * advantages[:, None] * mask) / mask.sum())


def test_on_policy_the_gradient_is_the_policy_gradient_whatever_the_loss_says():
    """The most asked question: the loss is 0, is it broken? Its gradient is −advantage / tokens."""
    log_probs, _, _, _, _ = random_step()
    mask, advantages = torch.ones(4, 6), torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    loss, metrics = gsm.grpo_loss(log_probs, log_probs, None, advantages, mask, beta=0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and metrics["ratio"] == 1 and metrics["clip_fraction_high"] == 0
    assert torch.allclose(log_probs.grad, -advantages[:, None].expand(4, 6) / 24)


@pytest.mark.parametrize("kind", gsm.LOSS_TYPES)
def test_neither_padding_nor_micro_batches_change_the_loss(kind):
    """The two invariances that catch wrong normalisers; what stands in the padding may be anything."""
    log_probs, old, reference, advantages, mask = (x.detach() for x in random_step())
    options = dict(loss_type=kind, max_completion_length=9)
    loss, metrics = gsm.grpo_loss(log_probs, old, reference, advantages, mask, **options)
    garbage = torch.tensor([math.inf, -math.inf, math.nan]).expand(4, 3)
    wide = [torch.cat([x, garbage], dim=1) for x in (log_probs, old, reference)]
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.long)], dim=1)
    wide[0].requires_grad_()
    padded, padded_metrics = gsm.grpo_loss(*wide, advantages, wide_mask, **options)
    padded.backward()
    assert padded.item() == pytest.approx(loss.item()) and torch.isfinite(wide[0].grad).all()
    assert {k: v.item() for k, v in padded_metrics.items()} == pytest.approx({k: v.item() for k, v in metrics.items()})
    parts = 0
    for rows in ([0, 3], [1], [2]):
        part, _ = gsm.grpo_loss(
            log_probs[rows], old[rows], reference[rows], advantages[rows], mask[rows],
            num_items=mask.sum().item(), num_rows=4, **options,
        )
        parts += part.item()
    assert parts == pytest.approx(loss.item())


def test_an_empty_completion_does_not_divide_by_zero():
    log_probs, old, reference, advantages, mask = random_step()
    for kind in gsm.LOSS_TYPES:
        loss, metrics = gsm.grpo_loss(
            log_probs, old, reference, advantages, mask * 0, loss_type=kind, max_completion_length=9
        )
        assert loss.item() == 0 and all(math.isfinite(x) for x in metrics.values())


def test_the_metrics_count_what_the_clip_cuts():
    old = torch.zeros(1, 6)
    ratio = torch.tensor([[0.5, 0.5, 1.0, 1.5, 1.5, 9.0]])
    advantages = torch.tensor([[-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    reference = ratio.log() + math.log(2)
    _, metrics = gsm.grpo_loss(ratio.log(), old, reference, advantages, mask, beta=0.1)
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 5)  # 0.5 with −1
    assert metrics["clip_fraction_high"].item() == pytest.approx(1 / 5)  # 1.5 with +1
    assert metrics["ratio"].item() == pytest.approx(1.0)
    assert metrics["kl"].item() == pytest.approx(2 - math.log(2) - 1)
    _, metrics = gsm.grpo_loss(ratio.log(), old, None, advantages, mask, beta=0, loss_type="cispo")
    assert metrics["clip_fraction_high"].item() == pytest.approx(2 / 5) and "kl" not in metrics
    assert metrics["clip_fraction_low"].item() == 0


@pytest.mark.parametrize("change, message", [
    (dict(loss_type="ppo"), "loss_type 'ppo' is unknown: grpo, dapo"),
    (dict(importance_sampling_level="word"), "importance_sampling_level 'word' is unknown"),
    (dict(loss_type="dr_grpo"), "needs max_completion_length"),
    (dict(ref_log_probs=None), "ref_log_probs is needed"),
    (dict(ref_log_probs=torch.zeros(4, 5)), r"ref_log_probs must have .* log_probs, \[4, 6\], not \[4, 5\]"),
    (dict(old_log_probs=torch.zeros(4, 1)), r"old_log_probs must have .* not \[4, 1\]"),
    (dict(advantages=torch.zeros(3)), r"advantages \[row \(pos\)\], not \[4, 6\] and \[3\]"),
    (dict(advantages=torch.zeros(4, 5)), r"advantages .* and \[4, 5\]"),
    (dict(completion_mask=torch.zeros(1, 6)), r"completion_mask must have .* not \[1, 6\]"),
])
def test_the_loss_refuses_what_does_not_fit(change, message):
    names = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "completion_mask")
    with pytest.raises(ValueError, match=message):
        gsm.grpo_loss(**dict(zip(names, random_step())) | change)


def test_the_second_worked_example_is_what_the_functions_give():
    reasoning = ("48/2 = 24\n48+24 = 72", "48/2 = 24\n48+24 = 73", "48/2 = 26\n48+26 = 74")
    texts = [f"<reasoning>\n{t}\n</reasoning>\n<answer>\n{t[-2:]}\n</answer>" for t in reasoning] + ["72"]
    rewards = torch.tensor([gsm.combined_reward(texts, ["72"] * 4)])
    table = {
        "correctness": gsm.correctness_reward(texts, ["72"] * 4), "format": gsm.format_reward(texts),
        "reward": rewards[0].tolist(),
        **{mode: gsm.compute_advantages(rewards, mode)[0].tolist() for mode in gsm.ADVANTAGES[:3]},
    }
    for name, values in table.items():
        assert values == pytest.approx(numbers_of(gsm.EXAMPLE, name), abs=0.005), name
    assert f"mean {rewards.mean():.2f}, std {rewards.std():.2f}" in gsm.EXAMPLE
    steps = [[(end - 1, r) for end, r in gsm.step_rewards(text, "72")] for text in texts]
    flat = [r for row in steps for _, r in row]
    assert flat == numbers_of(gsm.EXAMPLE, "step rewards", 10)
    by_token = gsm.compute_process_advantages(steps, torch.ones(4, 80))  # as if characters were tokens
    flat = [by_token[i, end].item() for i, row in enumerate(steps) for end, _ in row]
    assert flat == pytest.approx(numbers_of(gsm.EXAMPLE, "process", 10), abs=0.051)
    log_probs = torch.zeros(4, 5, requires_grad=True)
    gsm.grpo_loss(
        log_probs, torch.zeros(4, 5), None, torch.tensor(table["normalized"]), torch.ones(4, 5), beta=0
    )[0].backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-table["normalized"][0] / 20] * 5)


# --------------------------------------------------------------------------------------------------
# Training


def make_rollout(policy, groups=3, G=4, seed=0, silent=(), per_token=False, eos=1):
    """Sampled completions with advantages by lot; the groups in `silent` have none."""
    draw = torch.Generator().manual_seed(seed)
    prompts = ["abcdefgh"[:n] for n in (3, 8, 1, 5, 6, 2)][:groups]
    ids, mask, completions, completion_mask = gsm.generate_completions(
        policy, Words(), prompts, G, 12, eos_token_ids=[eos], generator=draw
    )
    shape = completion_mask.shape if per_token else (groups * G, 1)
    advantages = torch.randn(shape, generator=draw) * completion_mask
    for group in silent:
        advantages[group * G : (group + 1) * G] = 0
    return gsm.Rollout(
        torch.cat([ids, completions], 1), torch.cat([mask, completion_mask], 1), completion_mask, advantages, [], {}
    )


def gradient_of(policy, rollout, reference=None, **settings):
    """The gradient of one update: the optimizer only looks."""
    seen = {}

    class Look:
        def step(self):
            seen.update((n, p.grad.clone()) for n, p in policy.named_parameters() if p.grad is not None)

        def zero_grad(self, set_to_none):
            policy.zero_grad(set_to_none)

    settings = gsm.Settings(**dict(beta=0.0, max_grad_norm=1e9, max_completion_length=12) | settings)
    metrics = gsm.update_policy(policy, reference, Look(), rollout, settings)
    return torch.cat([seen[name].flatten() for name in sorted(seen)]) if seen else None, metrics


@pytest.mark.parametrize("options", [
    *({"loss_type": kind} for kind in gsm.LOSS_TYPES), {"importance_sampling_level": "sequence"}, {"beta": 0.1},
], ids=str)
def test_the_gradient_does_not_depend_on_the_micro_batch_size(options):
    policy, reference = make_policy(10, scale=2.0), make_policy(10, seed=1, scale=2.0)
    rollout = make_rollout(policy, silent=[1], per_token=True)
    whole, metrics = gradient_of(policy, rollout, reference, micro_batch_size=100, **options)
    for size in (1, 2, 5):
        parts, part_metrics = gradient_of(policy, rollout, reference, micro_batch_size=size, **options)
        assert (parts - whole).norm() / whole.norm() < 1e-5
        for name in ("loss", "kl", "clip_fraction", "grad_norm"):
            assert part_metrics[name] == (None if metrics[name] is None else pytest.approx(metrics[name], rel=1e-4, abs=1e-7))


@pytest.mark.parametrize("kind", gsm.LOSS_TYPES)
def test_the_gradient_of_a_step_is_that_of_the_loss_on_all_rows_at_once(kind):
    """No sorting, trimming or splitting: every row padded as it was sampled, one call of the loss."""
    policy = make_policy(10, scale=2.0)
    rollout = make_rollout(policy, silent=[2])
    length = rollout.completion_mask.shape[1]
    log_probs = gsm.compute_log_probs(policy, rollout.input_ids, rollout.attention_mask, length)
    loss, _ = gsm.grpo_loss(
        log_probs, log_probs, None, rollout.advantages, rollout.completion_mask, beta=0, loss_type=kind,
        max_completion_length=12,
    )
    loss.backward()
    names = sorted(name for name, _ in policy.named_parameters())
    expected = torch.cat([dict(policy.named_parameters())[name].grad.flatten() for name in names])
    policy.zero_grad()
    given, metrics = gradient_of(policy, rollout, micro_batch_size=5, loss_type=kind)
    assert (given - expected).norm() / expected.norm() < 1e-5
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_groups_without_signal_cost_no_forward_pass(monkeypatch):
    policy = make_policy(10)
    rows, forward = [], gsm.compute_log_probs
    monkeypatch.setattr(gsm, "compute_log_probs", lambda m, ids, *a: rows.append(len(ids)) or forward(m, ids, *a))
    gradient_of(policy, make_rollout(policy, silent=[0, 2]), micro_batch_size=3)
    assert sum(rows) == 4
    rows.clear()
    gradient, metrics = gradient_of(policy, make_rollout(policy, silent=[0, 1, 2]))
    assert gradient is None and rows == [] and metrics["loss"] == 0 and metrics["skipped_updates"] == 0
    gradient_of(policy, make_rollout(policy, silent=[0, 1, 2]), make_policy(10, seed=1), beta=0.1)
    assert sum(rows) == 24  # the KL penalty pulls on all of them, and the reference reads them too


def test_micro_batches_are_of_like_length_and_trimmed():
    policy = make_policy(10, scale=2.0)
    rollout = make_rollout(policy, groups=6)
    batches = gsm.split_rollout(rollout, 5, keep_all=False)
    lengths = [row for batch in batches for row in batch["attention_mask"].sum(-1).tolist()]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 24
    for batch in batches:
        mask = batch["attention_mask"]
        assert mask[:, 0].any() and mask[:, -1].any()
        kept = batch["completion_mask"].shape[1]
        assert torch.equal(mask[:, -kept:], batch["completion_mask"].to(mask))
        assert batch["advantages"].shape == batch["completion_mask"].shape
    assert sum(batch["input_ids"].numel() for batch in batches) < rollout.input_ids.numel()


def test_inner_steps_keep_the_probabilities_of_the_sampling_policy(monkeypatch):
    """(!6): the old log-probabilities are those of the first pass, for all µ passes."""
    policy, rollout, seen = make_policy(10, scale=2.0), None, []
    rollout = make_rollout(policy)
    loss = gsm.grpo_loss
    monkeypatch.setattr(
        gsm, "grpo_loss", lambda lp, old, *a, **k: seen.append((lp.detach().clone(), old.clone())) or loss(lp, old, *a, **k)
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    gsm.update_policy(policy, None, optimizer, rollout, gsm.Settings(mu=3, beta=0.0, micro_batch_size=100))
    assert len(seen) == 3 and torch.equal(*seen[0])
    assert all(torch.equal(old, seen[0][1]) for _, old in seen) and not torch.allclose(*seen[2], atol=1e-3)


@pytest.mark.parametrize("kind", gsm.LOSS_TYPES)
def test_a_step_moves_the_policy_towards_what_was_rewarded(kind):
    """Sign and size: log π of rewarded completions rises, of the others it falls."""
    policy = make_policy(10, scale=2.0)
    rollout = make_rollout(policy)
    rollout.advantages = torch.tensor([1.0, -1.0] * 6)[:, None] * rollout.completion_mask
    inputs = rollout.input_ids, rollout.attention_mask, rollout.completion_mask.shape[1]
    mask = rollout.completion_mask

    def score():
        with torch.no_grad():
            rows = (gsm.compute_log_probs(policy, *inputs) * mask).sum(-1) / mask.sum(-1)
        return rows[::2].mean() - rows[1::2].mean()

    before = score()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    settings = gsm.Settings(beta=0.0, loss_type=kind, max_completion_length=12)
    gsm.update_policy(policy, None, optimizer, rollout, settings)
    assert score() > before + 0.01


def test_the_kl_penalty_pulls_back_to_the_reference():
    policy, reference = make_policy(10, seed=1, scale=2.0), make_policy(10, scale=2.0)
    rollout, kls = make_rollout(policy, silent=[0, 1, 2]), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(5):
        settings = gsm.Settings(beta=1.0, max_completion_length=12)
        kls.append(gsm.update_policy(policy, reference, optimizer, rollout, settings)["kl"])
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0.8 * kls[0]
    rollout.advantages[0] = 1.0
    _, metrics = gradient_of(policy, rollout, policy, beta=1.0)
    assert metrics["kl"] == 0  # a policy that is its own reference


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    policy = make_policy(10)
    rollout = make_rollout(policy)
    rollout.advantages[0, 0] = math.inf
    before = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    metrics = gsm.update_policy(policy, None, optimizer, rollout, gsm.Settings(mu=2, beta=0.0, max_completion_length=12))
    assert metrics["skipped_updates"] == 2 and metrics["grad_norm"] is None
    json.dumps(metrics, allow_nan=False)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.named_parameters())


def test_every_epoch_is_a_new_order_of_all_rows():
    drawn = [i for step in range(10) for i in gsm.step_indices(step, 3, 10, seed=0)]
    epochs = [drawn[:10], drawn[10:20], drawn[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert gsm.step_indices(2, 3, 10, seed=0) == drawn[6:9] != gsm.step_indices(2, 3, 10, seed=1)


def flags(policy_folder, out, *extra):
    return [
        "--rehearsal", "--model", str(policy_folder / "model"), "--train-file", str(policy_folder / "train.jsonl"),
        "--eval-file", str(policy_folder / "test.jsonl"), "--output-dir", str(out), "--num-steps", "4",
        "--batch-size", "3", "--num-generations", "4", "--max-completion-length", "16", "--eval-examples", "5",
        "--save-every", "2", "--eval-every", "2", *extra,
    ]


METRICS = (
    "step loss reward_mean reward_std correctness format kl clip_fraction grad_norm learning_rate completion_length "
    "finished_fraction zero_std_groups tokens_per_second step_seconds peak_memory_bytes"
).split()
EVALUATION = "step examples strict strict_low strict_high lenient format finished_fraction mean_length".split()
UNSTEADY = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


def steady(folder):
    """The metrics of a run without what a clock decides."""
    lines = gsm.load_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in lines]


def test_a_run_leaves_everything_behind_and_resumes_exactly(policy_folder, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--beta", "0.1", "--mu", "2", "--num-iterations", "2", "--num-steps", "3")
    assert gsm.main(flags(policy_folder, whole, *options)) == 0
    metrics = steady(whole)
    assert [line["step"] for line in metrics] == list(range(1, 7))
    for line in gsm.load_json_lines(whole / "metrics.jsonl"):
        assert set(METRICS) <= set(line) and all(isinstance(line[name], (int, float)) for name in METRICS)
    evaluations = gsm.load_json_lines(whole / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6] and all(list(line) == EVALUATION for line in evaluations)
    assert [line["kl"] == 0 for line in metrics].count(True) <= 2  # the reference is not the policy
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["beta"] == 0.1 and config["torch"] == torch.__version__ and "transformers" in config
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    sample = gsm.load_json_lines(whole / "samples.jsonl")[0]
    assert {"text", "reward", "advantage"} == set(sample["completions"][0])
    assert (whole / "curves.png").stat().st_size > 10_000
    final = gsm.AutoModelForCausalLM.from_pretrained(whole / "final")
    assert gsm.build_prompt("?", gsm.load_tokenizer(whole / "final")[0]).endswith("assistant\n")
    started = gsm.load_policy(policy_folder / "model", "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(final.parameters(), started.parameters()))

    # As if it had been killed after step 5, with half a line written: back to the checkpoint of 4.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-000006")
    (broken / "checkpoints" / "incomplete.tmp").mkdir()
    lines = (broken / "metrics.jsonl").read_text().split("\n")
    (broken / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"step": 6, "lo')
    samples = (broken / "samples.jsonl").read_text()
    (broken / "samples.jsonl").write_text(samples[: samples.rindex("}, {") + 1])  # cut where it looks whole
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, broken, *options))
    assert error.value.code == 2 and "already holds a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, broken, *options, "--resume", "--epsilon", "0.3"))
    assert error.value.code == 2 and "was made with --epsilon 0.2, not 0.3" in capsys.readouterr().err
    state = broken / "checkpoints" / "step-000004" / "state.json"
    text = state.read_text()
    for change, message in (('"processes": 2', "is of 2 processes, not 1"), ('"processe', "not a checkpoint")):
        state.write_text(text.replace('"processes": 1', change))
        with pytest.raises(SystemExit) as error:
            gsm.main(flags(policy_folder, broken, *options, "--resume"))
        assert error.value.code == 2 and message in capsys.readouterr().err
    state.write_text(text)
    assert gsm.main(flags(policy_folder, broken, *options, "--resume")) == 0
    assert (broken / "samples.jsonl").read_text() == samples
    assert steady(broken) == metrics and gsm.load_json_lines(broken / "eval.jsonl") == evaluations
    resumed = gsm.AutoModelForCausalLM.from_pretrained(broken / "final")
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), resumed.parameters()))


@pytest.mark.parametrize("mu, beta", [(1, 0.04), (2, 0.3)])
def test_the_loop_on_one_screen_is_the_loop_of_the_long_run(policy_folder, tmp_path, monkeypatch, mu, beta):
    """With the same samples; the long one takes micro-batches of five completions."""
    generate, calls = gsm.generate_completions, []

    def same(*arguments, **options):
        calls.append(1)
        return generate(*arguments, **options | {"generator": torch.Generator().manual_seed(len(calls))})

    monkeypatch.setattr(gsm, "generate_completions", same)
    tokenizer, _ = gsm.load_tokenizer(policy_folder / "model")
    problems = gsm.load_problems(policy_folder / "train.jsonl")
    start, simple, long = (gsm.load_policy(policy_folder / "model", "cpu") for _ in range(3))
    shape = dict(num_steps=3, batch_size=3, num_generations=4, max_completion_length=12, mu=mu, beta=beta, learning_rate=1e-4)
    gsm.train_simply(simple, tokenizer, problems, **shape)
    calls.clear()
    gsm.train_with_grpo(long, tokenizer, problems, gsm.Settings(output_dir=str(tmp_path), micro_batch_size=5, **shape))
    moved = max((a - b).abs().max().item() for a, b in zip(start.parameters(), simple.parameters()))
    apart = max((a - b).abs().max().item() for a, b in zip(long.parameters(), simple.parameters()))
    assert moved > 1e-4 and apart < moved / 100


def test_a_reference_is_held_only_with_a_kl_penalty(policy_folder, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(gsm, "take_step", lambda model, reference, *a: held.append(reference) or 1 / 0)
    for beta in ("0", "0.1"):
        with pytest.raises(ZeroDivisionError):
            gsm.main(flags(policy_folder, tmp_path / beta, "--beta", beta))
    assert held[0] is None and not any(p.requires_grad for p in held[1].parameters())


def test_signals_finish_the_step_save_and_leave(policy_folder, tmp_path, monkeypatch):
    step = gsm.take_step

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(gsm, "take_step", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    assert gsm.main(flags(policy_folder, tmp_path / "run")) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "run" / "final").exists()


def test_a_stop_does_not_wait_for_an_evaluation(policy_folder, tmp_path, monkeypatch):
    """It may take longer than torchrun waits; the resumed run makes it."""
    step = gsm.take_step
    monkeypatch.setattr(gsm, "take_step", lambda *a: signal.raise_signal(signal.SIGTERM) or step(*a))
    arguments = flags(policy_folder, tmp_path / "run", "--eval-every", "1", "--num-steps", "2")
    assert gsm.main(arguments) == 128 + signal.SIGTERM
    path = tmp_path / "run" / "eval.jsonl"
    assert [line["step"] for line in gsm.load_json_lines(path)] == [0]
    monkeypatch.setattr(gsm, "take_step", step)
    assert gsm.main([*arguments, "--resume"]) == 0
    assert [line["step"] for line in gsm.load_json_lines(path)] == [0, 1, 2]


def test_every_round_begins_with_a_new_reference(policy_folder, tmp_path):
    options = ("--num-iterations", "2", "--num-steps", "2", "--beta", "0.1", "--learning-rate", "0.01", "--eval-examples", "0")
    assert gsm.main(flags(policy_folder, tmp_path / "run", *options)) == 0
    kl = [line["kl"] for line in steady(tmp_path / "run")]
    assert max(kl[0], kl[2]) < 1e-6 < 1e-4 < min(kl[1], kl[3]), kl


def break_updates_after(monkeypatch, good):
    """The loss is not a number any more after so many micro-batches."""
    loss, calls = gsm.grpo_loss, []

    def breaks(*arguments, **options):
        calls.append(1)
        value, metrics = loss(*arguments, **options)
        return value * (math.nan if len(calls) > good else 1), metrics

    monkeypatch.setattr(gsm, "grpo_loss", breaks)


def test_a_run_gives_up_when_nothing_is_finite_any_more(policy_folder, tmp_path, monkeypatch, capsys):
    break_updates_after(monkeypatch, 0)
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, tmp_path / "run", "--eval-examples", "0", "--beta", "0.1"))
    assert error.value.code == 1 and "step 3: the 3 last steps had numbers" in capsys.readouterr().err
    assert [line["skipped_updates"] for line in steady(tmp_path / "run")] == [1, 1, 1]
    assert all(line["loss"] is None for line in steady(tmp_path / "run"))


def test_logits_that_are_not_finite_end_the_run_with_one_line(policy_folder, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise FloatingPointError("the model's logits are not finite")

    monkeypatch.setattr(gsm, "generate_completions", broken)
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, tmp_path / "run"))
    assert error.value.code == 1
    assert capsys.readouterr().err.endswith("grpo_gsm8k.py: the model's logits are not finite\n")


def test_the_saved_model_is_the_last_good_one(policy_folder, tmp_path, monkeypatch, capsys):
    """Updates go bad after step 2: two steps are left out and still saved, the third ends the run."""
    options = ("--num-steps", "9", "--save-every", "1", "--eval-examples", "0", "--learning-rate", "0.01", "--beta", "0.1", "--micro-batch-size", "12")
    good = flags(policy_folder, tmp_path / "good", *options)
    good[good.index("9")] = "2"
    assert gsm.main(good) == 0
    break_updates_after(monkeypatch, 2)
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, tmp_path / "bad", *options))
    assert error.value.code == 1 and "step 5: the 3 last steps" in capsys.readouterr().err
    # A checkpoint is a model for --model, as the message says.
    saved, last_good, start = (
        gsm.load_policy(folder, "cpu") for folder in (
            tmp_path / "bad" / "checkpoints" / "step-000004", tmp_path / "good" / "checkpoints" / "step-000002",
            policy_folder / "model",
        )
    )
    assert gsm.load_tokenizer(tmp_path / "bad" / "checkpoints" / "step-000004")[0].chat_template
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), last_good.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters()))


def test_files_that_are_not_ours_survive_in_the_output_folder(policy_folder, tmp_path):
    """--output-dir may be the folder that the training data lies in."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(policy_folder / "train.jsonl", out / "train.jsonl")
    arguments = flags(policy_folder, out, "--num-steps", "2")
    arguments[arguments.index("--train-file") + 1] = str(out / "train.jsonl")
    assert gsm.main(arguments) == 0
    assert gsm.main([*arguments, "--resume"]) == 0
    assert (out / "train.jsonl").read_bytes() == (policy_folder / "train.jsonl").read_bytes()


def test_a_late_process_does_not_take_the_runs_own_config_for_another_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        gsm.check_output_dir(gsm.Settings(output_dir=str(tmp_path)))
    monkeypatch.setattr(gsm, "get_rank", lambda: 1)
    gsm.check_output_dir(gsm.Settings(output_dir=str(tmp_path)))


def test_a_second_sigterm_still_saves_and_a_second_sigint_does_not():
    """torchrun passes on to its processes what a batch system has already sent to all of them."""
    with gsm.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_out_of_memory_does_not_say_that_a_checkpoint_is_damaged(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gsm, "load_safetensors", full)
    with pytest.raises(torch.OutOfMemoryError):
        gsm.load_checkpoint(tmp_path, None, None, None)


def test_a_full_disk_leaves_the_earlier_checkpoint(policy_folder, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, tmp_path / "run"))
    assert error.value.code == 1 and "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("supervision", gsm.SUPERVISION)
def test_rewards_reach_the_tokens_that_earned_them(policy_folder, supervision, monkeypatch):
    """The whole way from text to advantage, with completions that are known."""
    tokenizer, _ = gsm.load_tokenizer(policy_folder / "model")
    model = gsm.load_policy(policy_folder / "model", "cpu")
    texts = [
        f"<reasoning>\n{a}\n{b}\n</reasoning>\n<answer>\n{c}\n</answer><|im_end|>"
        for a, b, c in (("2 * 3 = 6", "6 + 1 = 7", 7), ("2 * 3 = 6", "6 + 1 = 8", 8), ("2 * 3 = 7", "7 + 1 = 8", 8))
    ]
    ids, mask = (tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right",
                           return_tensors="pt")[name] for name in ("input_ids", "attention_mask"))
    prompt = torch.full((3, 2), 5)
    monkeypatch.setattr(gsm, "generate_completions", lambda *a, **k: (prompt, torch.ones_like(prompt), ids, mask))
    settings = gsm.Settings(num_generations=3, supervision=supervision)
    rollout = gsm.collect_rollout(model, tokenizer, [{"question": "?", "answer": "7"}], settings, None)
    advantages = rollout.advantages
    assert torch.equal(rollout.completion_mask, mask) and (advantages[mask == 0] == 0).all()
    assert rollout.stats[0]["correctness"] == [2.0, 0.0, 0.0] and rollout.stats[0]["finished"] == [True] * 3
    if supervision == "outcome":
        expected = gsm.compute_advantages(torch.tensor([[2.8, 0.8, 0.8]]))[0]
        assert torch.allclose(advantages, expected[:, None] * mask)
        return
    values = [1, 1, 1, 1, 0, 0, 0, 1, 0]
    scores = [(v - statistics.mean(values)) / (statistics.stdev(values) + 1e-4) for v in values]
    for row in range(3):
        lines = tokenizer.decode(ids[row]).split("\n")
        ends = [len("\n".join(lines[:n])) for n in (2, 3)]
        for pos in range(int(mask[row].sum())):
            before = len(tokenizer.decode(ids[row, :pos]))  # characters before this token
            left = sum(before >= end for end in ends)  # steps that have ended
            assert advantages[row, pos].item() == pytest.approx(sum(scores[3 * row + left : 3 * row + 3]), abs=1e-4)


def test_evaluation_counts_strict_and_lenient(policy_folder, monkeypatch):
    tokenizer, _ = gsm.load_tokenizer(policy_folder / "model")
    model = gsm.load_policy(policy_folder / "model", "cpu")
    full = "<reasoning>\n</reasoning>\n<answer>\n7\n</answer>"
    texts = [full, "<answer>\n8\n</answer> 7", "it is 7", "it is 8", full + " and"]
    texts = [text + "<|im_end|>" * (i < 3) for i, text in enumerate(texts)]
    written = iter(texts)

    def generate(model, tokenizer, prompts, num_generations, max_completion_length, temperature):
        assert num_generations == 1 and temperature == 0 and len(prompts) <= 2
        encoded = tokenizer([next(written) for _ in prompts], padding=True, padding_side="right", return_tensors="pt")
        return None, None, encoded["input_ids"], encoded["attention_mask"]

    monkeypatch.setattr(gsm, "generate_completions", generate)
    rows = [{"question": "?" * n, "answer": "7"} for n in range(1, 6)]
    result = gsm.evaluate_model(model, tokenizer, rows, batch_size=2)
    assert (result["strict"], result["lenient"], result["format"]) == (2 / 5, 3 / 5, 2 / 5)
    assert result["finished_fraction"] == 3 / 5 and result["examples"] == 5
    assert result["mean_length"] == sum(len(tokenizer(t)["input_ids"]) for t in texts) / 5
    # Wilson's interval for 2 of 5, as statsmodels and the textbook's example have it
    assert (result["strict_low"], result["strict_high"]) == pytest.approx((0.1176, 0.7693), abs=1e-4)
    with pytest.raises(ValueError, match="at least one problem"):
        gsm.evaluate_model(model, tokenizer, [])


def test_erratum_8_thirty_questions_carry_18_points():
    low, high = gsm.wilson_interval(15, 30)
    assert 0.16 < 0.5 - low < 0.18 and 0.5 - low == pytest.approx(high - 0.5)
    assert 1.96 * math.sqrt(0.25 / 30) == pytest.approx(0.179, abs=1e-3)  # the simpler formula
    assert gsm.wilson_interval(0, 10)[0] == 0 and gsm.wilson_interval(10, 10)[1] == pytest.approx(1)


TORCHRUN = """
import sys, torch
sys.path[:0] = [{here!r}]
import grpo_gsm8k as gsm, test_grpo as t
torch.set_num_threads(1)
if gsm.os.environ.get("LOCAL_RANK"):
    gsm.dist.init_process_group("gloo")
saved = {{}}
for options in {options!r}:
    policy, reference = t.make_policy(10, scale=2.0), t.make_policy(10, seed=1, scale=2.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(3):
        # one global batch of three groups; the second process gets two, or only silent ones
        whole = t.make_rollout(t.make_policy(10, scale=2.0), seed=step, silent=[1, 2] if step == 1 else [])
        mine = torch.tensor([4 * g + i for g in gsm.my_share(range(3)) for i in range(4)])
        part = gsm.Rollout(*(getattr(whole, f)[mine] for f in (
            "input_ids", "attention_mask", "completion_mask", "advantages")), [], {{}})
        settings = gsm.Settings(**{{"beta": 0.0, "max_completion_length": 12, "micro_batch_size": 3}} | options)
        metrics = gsm.update_policy(policy, reference, optimizer, part, settings)
    saved[str(options)] = {{n: p.detach() for n, p in policy.named_parameters()}}, metrics
assert gsm.gather_lists([gsm.get_rank()] * 2) == [r for r in range(gsm.get_world_size()) for _ in range(2)]
if gsm.get_rank() == 0:
    torch.save(saved, sys.argv[1])
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    """torchrun with gloo: three steps from the same completions, with every loss, rows of different
    lengths, and a step in which one process has nothing but silent groups."""
    options = [{"loss_type": kind} for kind in gsm.LOSS_TYPES] + [{"beta": 0.1, "mu": 2}]
    (tmp_path / "steps.py").write_text(TORCHRUN.format(here=str(HERE), options=options))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for path, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        run = [sys.executable, *launcher, str(tmp_path / "steps.py"), str(tmp_path / path)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / path, weights_only=True) for path in ("one", "two"))
    for name in one:
        (parameters, metrics), (others, other_metrics) = one[name], two[name]
        start = dict(make_policy(10, scale=2.0).named_parameters())
        change = torch.cat([(parameters[n] - start[n]).flatten() for n in start])
        difference = torch.cat([(parameters[n] - others[n]).flatten() for n in start])
        assert change.norm() > 0.1 and difference.norm() / change.norm() < 1e-3
        for metric in ("loss", "kl", "clip_fraction", "grad_norm"):
            assert other_metrics[metric] == (None if metrics[metric] is None else pytest.approx(metrics[metric], rel=1e-3, abs=1e-6))


def test_torchrun_trains_evaluates_and_saves_once(policy_folder, tmp_path):
    run = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "grpo_gsm8k.py"),
        *flags(policy_folder, tmp_path / "run", "--num-steps", "2"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in steady(tmp_path / "run")] == [1, 2]
    evaluations = gsm.load_json_lines(tmp_path / "run" / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2] and evaluations[0]["examples"] == 5
    alone = gsm.evaluate_model(
        gsm.load_policy(policy_folder / "model", "cpu"), gsm.load_tokenizer(policy_folder / "model")[0],
        gsm.load_problems(policy_folder / "test.jsonl")[:5], 16,
    )
    assert {k: v for k, v in evaluations[0].items() if k != "step"} == alone
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2


# --------------------------------------------------------------------------------------------------
# The rehearsal, the study, the command line


def test_held_out_problems_use_numbers_that_their_template_never_shows():
    train, held_out = gsm.make_problems(seed=3)
    patterns = [
        re.sub(r"\\\{[nt]\\\}", r"[A-Za-z]+", re.sub(r"\\\{[abc]\\\}", r"(\\d+)", re.escape(text)))
        for text, _ in gsm.TEMPLATES
    ]

    def numbers(rows):
        seen = [set() for _ in patterns]
        for row in rows:
            fits = [(i, m.groups()) for i, p in enumerate(patterns) if (m := re.fullmatch(p, row["question"]))]
            assert len(fits) == 1 or row["question"].startswith("What is ")
            for i, groups in fits:
                seen[i].add(groups)
        return seen

    for shown, kept in zip(numbers(train), numbers(held_out)):
        assert kept and shown and not kept & shown
    two_steps = [row for row in held_out if row["answer"].count("=") == 2]
    assert len(two_steps) > 0.8 * len(held_out)


def test_the_rehearsals_rows_are_right_and_in_the_format_of_gsm8k(problems):
    for rows in problems:
        for i, row in enumerate(rows):
            assert gsm.check_problem(row, i)["answer"] == row["answer"].split("#### ")[1]
            demonstration = gsm.demonstrate(row)
            steps = gsm.step_rewards(demonstration, row["answer"].split("#### ")[1])
            assert [r for _, r in steps] == [1.0] * (row["answer"].count("=") + 1)
            assert gsm.format_reward([demonstration]) == pytest.approx([0.8])
    assert gsm.solve([3, 4, 2], "+*") == (["3 + 4 = 7", "7 * 2 = 14"], [3, 7, 14])
    short = gsm.demonstrate(problems[1][-1], keep_steps=1, tags=False)
    assert short.count("=") == 1 and "<reasoning>" not in short and "</answer>" in short


def test_the_rehearsals_tokenizer_survives_saving_and_reads_everything(policy_folder, tokenizer, problems):
    """AutoTokenizer rebuilds it from the model's type; the same text must give the same tokens."""
    loaded, context = gsm.load_tokenizer(policy_folder / "model")
    assert context == 256
    for row in problems[1][:50]:
        text = gsm.build_prompt(row["question"], tokenizer) + gsm.demonstrate(row) + tokenizer.eos_token
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] and loaded.decode(ids) == text
        assert len(ids) < 90
    assert loaded.decode(loaded("é 🙂 ٣")["input_ids"]) == "é 🙂 ٣"


def test_the_start_is_made_once_and_whole(tmp_path, capsys):
    model, train, held_out = gsm.make_start(tmp_path / "start", seed=0, num_steps=2)
    assert len(gsm.load_problems(train)) == 4000 and len(gsm.load_problems(held_out)) == 222
    weights = (model / "model.safetensors").read_bytes()
    gsm.make_start(tmp_path / "start", seed=0, num_steps=2)
    assert (model / "model.safetensors").read_bytes() == weights
    again = gsm.make_start(tmp_path / "again", seed=0, num_steps=2)[0]
    assert (again / "model.safetensors").read_bytes() == weights  # the seed decides everything


def test_the_study_compares_all_variants_and_writes_its_table(policy_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(gsm, "fine_tune", lambda model, tokenizer, rows, num_steps, seed: shown.append(num_steps))
    monkeypatch.setattr(gsm, "make_start", lambda folder, seed: (
        policy_folder / "model", policy_folder / "train.jsonl", policy_folder / "test.jsonl"))
    changes = dict(num_steps=2, batch_size=8, num_generations=4, max_completion_length=6, eval_every=0)
    study(tmp_path, tmp_path, seeds=(0, 1), **changes)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for s in (0, 1) for v in VARIANTS]
    assert shown == [2, 2]  # 2 × 8 × 4 completions are 2 batches of 32 demonstrations
    for row in rows:
        assert [e["step"] for e in row["evaluations"]] == [0, 2] and row["settings"]["seed"] == row["seed"]
        for name, value in (VARIANTS[row["variant"]] or {}).items():
            assert row["settings"][name] == value
    table = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert format_study(rows) in table and all(f"| {v} |" in table for v in VARIANTS)
    assert (tmp_path / "study.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, message", [
    ("--device cpu --num-generations 1", "--num-generations must be at least 2, not 1"),
    ("--device cpu --batch-size 0", "--batch-size must be at least 1, not 0"),
    ("--device cpu --learning-rate -1", "--learning-rate must be above 0"),
    ("--device cpu --learning-rate nan", "--learning-rate must be above 0"),
    ("--device cpu --epsilon 1", "--epsilon must be above 0 and below 1, not 1.0"),
    ("--device cpu --beta -0.1", "--beta must be at least 0"),
    ("--device cpu --temperature 0", "--temperature must be above 0"),
    ("--device cpu --loss-type ppo", "argument --loss-type: invalid choice: 'ppo'"),
    ("--device cpu --reward format --supervision process", "--reward format has no meaning"),
    ("--device cpu --num-steps many", "argument --num-steps: invalid int value: 'many'"),
    ("--device cpu --train-file nothing.jsonl --output-dir {tmp}/a", "nothing.jsonl: No such file"),
    ("--device cpu --model nothing/here --train-file {data}/train.jsonl --output-dir {tmp}/b", "--model nothing/here can't be loaded"),
    ("--device cpu --output-dir {data}/train.jsonl", "can't be written"),
    ("--device cpu --train-file {data}/train.jsonl --batch-size 100 --output-dir {tmp}/c", "at most the number of training rows (54)"),
    ("--rehearsal --train-file {data}/train.jsonl --output-dir {tmp}/d", "add --model"),
    ("--eval-only --eval-examples 0 --device cpu", "leaves nothing to do"),
    ("--device cpu --model {data}/model --train-file {data}/train.jsonl --output-dir {tmp}/e", "exceed the model's context of 256 tokens"),
    ("--unknown", "unrecognized arguments: --unknown"),
    ("--device cpu --train-file {tmp}/empty.jsonl --output-dir {tmp}/f", "empty.jsonl: no problems"),
    ("--device cpu --train-file {tmp}/broken.jsonl --output-dir {tmp}/g", "broken.jsonl:2: not JSON"),
    ("--device cpu --train-file {tmp}/broken.jsonl --output-dir /proc/no/way", "can't be written"),
    ("--device cpu --model {tmp}/bare --train-file {data}/train.jsonl --output-dir {tmp}/h", "no chat template"),
    ("--device cpu --model {tmp}/endless --train-file {data}/train.jsonl --output-dir {tmp}/i", "no end token"),
])
def test_the_command_line_refuses_before_any_work(policy_folder, tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text((policy_folder / "train.jsonl").read_text().split("\n")[0] + "\n{")
    for name, change in (("bare", "chat_template"), ("endless", "eos_token")):
        changed, _ = gsm.load_tokenizer(policy_folder / "model")
        setattr(changed, change, None)
        changed.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text((policy_folder / "model" / "config.json").read_text())
    monkeypatch.setattr(gsm, "load_policy", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        gsm.main(arguments.format(data=policy_folder, tmp=tmp_path).split())
    printed = capsys.readouterr()
    assert error.value.code == 2 and message in printed.err and printed.err.count("\n") == 1
    assert printed.err.startswith("grpo_gsm8k.py: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(capsys):
    with pytest.raises(SystemExit) as error:
        gsm.main([])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert "--rehearsal" in text and "--device cpu" in text


def test_every_setting_has_a_flag_and_its_help(capsys):
    with pytest.raises(SystemExit):
        gsm.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for item in gsm.fields(gsm.Settings):
        assert f"--{item.name.replace('_', '-')}" in text
    assert gsm.make_parser().parse_args([]) == argparse.Namespace(**gsm.asdict(gsm.Settings()))


def test_without_an_eval_file_a_tenth_is_held_out(policy_folder, tmp_path):
    settings = gsm.Settings(eval_examples=None)
    train, held_out = gsm.load_data(settings, policy_folder / "train.jsonl", None)
    assert (len(train), len(held_out)) == (54, 6)
    assert train + held_out == gsm.load_problems(policy_folder / "train.jsonl")
    assert len(gsm.load_data(gsm.Settings(eval_examples=3), policy_folder / "train.jsonl", policy_folder / "test.jsonl")[1]) == 3


def test_eval_only_evaluates_and_writes_nothing(policy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gsm.main([
        "--eval-only", "--device", "cpu", "--model", str(policy_folder / "model"), "--eval-examples", "4",
        "--eval-file", str(policy_folder / "test.jsonl"), "--max-completion-length", "8",
    ]) == 0
    assert "of 4 held-out problems right" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_importing_does_no_work():
    code = "import sys; before = set(sys.modules); import grpo_gsm8k; print('matplotlib' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.stdout.strip() == "False False" and done.stderr == ""


# --------------------------------------------------------------------------------------------------
# Memory, TRL, and the file as something to copy from


def qwen(hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, **options):
    return gsm.Qwen2Config(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab_size, tie_word_embeddings=True, **options
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_what_autograd_keeps(checkpointing):
    """Counted in bfloat16 autocast, as bytes of all tensors saved for the backward pass."""
    config = qwen(128, 512, 4, 4, 2, 500, bos_token_id=None)
    policy = gsm.Qwen2ForCausalLM(config).train()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    ids = torch.randint(500, (4, 100))
    saved, kept = {}, []

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(x)  # so that no address is used twice
        return x

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        policy.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    copies = 0 if checkpointing else sum(2 * p.numel() for n, p in policy.named_parameters() if p.dim() == 2 and "embed" not in n)
    settings = gsm.Settings(micro_batch_size=4, gradient_checkpointing=checkpointing)
    estimate = gsm.estimate_memory(config, 1, settings, 100)["activations"]
    layer = 400 * (36 * 128 + 2 * 64 + 8 * 512)  # alive only while one layer runs backward
    measured = sum(saved.values()) - copies + checkpointing * layer
    assert estimate == pytest.approx(measured, rel=0.1)


def test_the_memory_table_of_the_readme_is_that_of_the_formula():
    models = {
        "Qwen2.5-1.5B": (qwen(1536, 8960, 28, 12, 2, 151936), 1_543_714_304),
        "Qwen2.5-0.5B": (qwen(896, 4864, 24, 14, 2, 151936), 494_032_768),
    }
    flags = {"defaults": {}, "`--beta 0`": {"beta": 0.0}, "`--gradient-checkpointing`": {"gradient_checkpointing": True},
             "`--micro-batch-size 1`": {"micro_batch_size": 1}}
    rows = re.findall(r"(?m)^\| (Qwen2\.5-\S+?), (.*?) \| (.*) \|$", README)
    assert len(rows) >= 5
    for model, words, cells in rows:
        options = {k: v for word in words.split(", ") for k, v in flags[word].items()}
        parts = gsm.estimate_memory(*models[model], gsm.Settings(**options), 600)
        assert [float(cell) for cell in cells.split(" | ")] == [round(x / 1e9, 1) for x in parts.values()], (model, words)
    with torch.device("meta"):  # the two counts of parameters
        for config, count in models.values():
            assert sum(p.numel() for p in gsm.Qwen2ForCausalLM(config).parameters()) == count


@pytest.mark.parametrize("kind", gsm.LOSS_TYPES)
@pytest.mark.parametrize("level", gsm.LEVELS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_that_of_trl(kind, level, beta):
    """TRL's own _compute_loss, with a stub for a trainer. Runs where TRL is installed (1.16 was)."""
    trl = pytest.importorskip("trl")
    if kind == "cispo" and level == "sequence":
        pytest.skip("TRL has no such loss")
    from collections import defaultdict
    from unittest.mock import MagicMock

    log_probs, old, reference, advantages, mask = random_step()
    theirs_in = log_probs.detach().clone().requires_grad_()
    stub = MagicMock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, loss_type=kind,
        # TRL's cispo takes the ceiling of the weight itself, ours is 1 + epsilon_high
        epsilon_low=0.1, epsilon_high=1.3 if kind == "cispo" else 0.3, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, max_completion_length=9, current_gradient_accumulation_steps=1,
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
    )
    stub._get_per_token_logps_and_entropies = lambda *a, **k: (theirs_in, torch.zeros_like(theirs_in), None)
    stub.args.use_bias_correction_kl, stub.args.delta, stub.model.training = False, None, False
    stub.accelerator.num_processes, stub.accelerator.gather = 1, lambda x: x
    ones = torch.ones(4, 2).long()
    theirs = trl.GRPOTrainer._compute_loss(stub, None, {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": torch.ones_like(mask), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": torch.tensor(29),
    })
    ours, _ = gsm.grpo_loss(
        log_probs, old, reference, advantages, mask, epsilon=0.1, epsilon_high=0.3, beta=beta, loss_type=kind,
        importance_sampling_level=level, max_completion_length=9, num_items=29,
    )
    theirs.backward()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(log_probs.grad, theirs_in.grad, rtol=1e-9, atol=1e-12)


def lift(name):
    """The source of a function and of everything that its docstring says it needs, and no more."""
    tree, wanted, parts = ast.parse(GSM_SOURCE), [name], {}
    defined = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    defined[each.id] = node
    while wanted:
        current = wanted.pop()
        if current in parts or current not in defined:
            continue
        node = defined[current]
        parts[current] = ast.get_source_segment(GSM_SOURCE, node)
        if isinstance(node, ast.FunctionDef):
            needs = (ast.get_docstring(node) or "").partition("Needs:")[2]
            wanted += re.findall(r"\w+", needs)
    order = {key: defined[key].lineno for key in parts}
    decorators = "".join(dict.fromkeys(parts[key] + "\n\n" for key in sorted(parts, key=order.get)))
    imports = "import ast, itertools, math, re, torch\nfrom fractions import Fraction\nfrom operator import add, mul, neg, pos, sub, truediv\n"
    imports += "from torch.utils.checkpoint import checkpoint\n"
    space = {}
    exec(imports + decorators, space)
    return space[name]


def test_what_a_blog_post_would_quote_lifts_out():
    step = random_step()
    assert torch.equal(lift("grpo_loss")(*step)[0], gsm.grpo_loss(*step)[0])
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    for mode in gsm.ADVANTAGES:
        assert torch.equal(lift("compute_advantages")(rewards, mode), gsm.compute_advantages(rewards, mode))
    steps, mask = [[(1, 1.0)], [(2, 0.0)]], torch.ones(2, 4)
    assert torch.equal(lift("compute_process_advantages")(steps, mask), gsm.compute_process_advantages(steps, mask))
    assert lift("parse_number")("about $1,080.50") == Fraction(2161, 2)
    assert lift("wilson_interval")(15, 30) == gsm.wilson_interval(15, 30)
    ids = torch.tensor([[4, 1, 1]])
    assert lift("create_completion_mask")(ids, [1]).tolist() == [[1, 1, 0]]
    policy, ids = make_policy(10), torch.randint(10, (2, 6))
    lifted = lift("compute_log_probs")(policy, ids, torch.ones_like(ids), 3)
    assert torch.equal(lifted, gsm.compute_log_probs(policy, ids, torch.ones_like(ids), 3))
    text = "<reasoning>\n2*3 = 6\n</reasoning>\n<answer>\n6\n</answer>"
    assert lift("correctness_reward")([text], ["6"]) == [2.0]
    assert lift("step_rewards")(text, "6") == gsm.step_rewards(text, "6") == [(19, 1.0), (len(text), 1.0)]


def test_the_second_file_knows_what_it_needs_too():
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", GSM_SOURCE).group(1).replace("#", "")
    inline = ast.literal_eval(re.search(r"dependencies = (\[.*?\])", block, re.S).group(1))
    required = {line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().split("\n")}
    assert set(inline) == required - {""}


def test_the_glossary_of_the_readme_names_every_metric():
    for name in (*METRICS[1:], "accuracy", "skipped_updates", *EVALUATION[2:5]):
        assert f"`{name}`" in README, name
    section = GSM_SOURCE.partition("# 10. The training loop")[2].partition("# 11. ")[0]
    for name in METRICS[1:]:
        assert name in section, name


def test_the_committed_rehearsals_meet_the_targets():
    rows = json.loads((GSM_RESULTS / "results.json").read_text())["rows"]
    assert {(row["variant"], row["seed"]) for row in rows} == {(v, s) for v in VARIANTS for s in (0, 1, 2)}
    for row in rows:
        before, after = row["evaluations"][0], row["evaluations"][-1]
        assert before["strict"] <= 0.55 and before["examples"] == 222
        if row["variant"].startswith("GRPO as in the rehearsal"):
            assert after["strict"] >= 0.9
        if row["variant"].startswith("control"):
            assert after["strict"] <= 0.55
    assert format_study(rows) in (GSM_RESULTS / "tables.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Under load: killed, interrupted, out of disk, one process of two lost


def start_run(arguments, processes=1, code=None, **environment):
    """The script as a process of its own; `code` runs first, in the same interpreter."""
    script = [str(HERE / "grpo_gsm8k.py")]
    if code is not None:
        path = Path(arguments[arguments.index("--output-dir") + 1] + ".py")
        path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport grpo_gsm8k as gsm\n{code}\nsys.exit(gsm.main())\n")
        script = [str(path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


def wait_for(condition, process, seconds=120):
    started = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - started < seconds, "too slow"
        time.sleep(0.005)


def test_kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint(policy_folder, tmp_path):
    """Killed twice, in the middle of step 4 and with half of checkpoint 6 written; the metrics are
    those of a run that nobody disturbed."""
    options = ("--num-steps", "8", "--save-every", "1", "--beta", "0.1")
    assert gsm.main(flags(policy_folder, tmp_path / "whole", *options)) == 0
    out = tmp_path / "killed"
    kill = "gsm.os.kill(gsm.os.getpid(), gsm.signal.SIGKILL)"
    in_step = f"""
reward = gsm.combined_reward
calls = []
def dies(*arguments):
    calls.append(1)
    if len(calls) == 4:
        {kill}
    return reward(*arguments)
gsm.combined_reward = dies
"""
    in_save = f"""
save = gsm.torch.save
calls = []
def dies(state, path):
    save(state, path)
    calls.append(1)
    if len(calls) == 3:  # steps 4, 5 and 6
        {kill}
gsm.torch.save = dies
"""
    for code, last, resume in ((in_step, 3, ()), (in_save, 5, ("--resume",))):
        process = start_run(flags(policy_folder, out, *options, *resume), code=code)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == -signal.SIGKILL, printed
        assert gsm.find_checkpoint(gsm.Settings(**settings_of(out)))[1] == last
    assert list((out / "checkpoints").glob("incomplete.tmp/*"))
    assert gsm.main(flags(policy_folder, out, *options, "--resume")) == 0
    assert steady(out) == steady(tmp_path / "whole")
    for name in ("eval.jsonl", "samples.jsonl"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list((out / "checkpoints").glob("*.tmp"))


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["settings"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_saves_and_leaves(policy_folder, tmp_path, number):
    out = tmp_path / "run"
    process = start_run(flags(policy_folder, out, "--num-steps", "5000", "--eval-every", "0"))
    wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2, process)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, printed
    steps = len(steady(out))
    assert f"stopped after step {steps}" in printed and gsm.find_checkpoint(gsm.Settings(**settings_of(out)))[1] == steps


def test_one_process_that_dies_ends_the_other_with_a_message(policy_folder, tmp_path):
    code = """
step = gsm.take_step
def dies(*arguments):
    if gsm.get_rank() == 1 and arguments[5] == 2:
        raise RuntimeError("this process has had enough")
    return step(*arguments)
gsm.take_step = dies
"""
    process = start_run(flags(policy_folder, tmp_path / "run"), processes=2, code=code)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "this process has had enough" in printed


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt"])
def test_a_cut_off_checkpoint_is_refused_with_the_reason(policy_folder, tmp_path, damage, capsys):
    assert gsm.main(flags(policy_folder, tmp_path / "run")) == 0
    path = tmp_path / "run" / "checkpoints" / "step-000004" / damage
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit) as error:
        gsm.main(flags(policy_folder, tmp_path / "run", "--resume"))
    text = capsys.readouterr().err
    assert error.value.code == 1 and "step-000004 can't be loaded" in text and "delete it to use the one before" in text
    shutil.rmtree(path.parent)
    assert gsm.main(flags(policy_folder, tmp_path / "run", "--resume")) == 0


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    """Bytes kept for the backward pass, at 64 to 512 completion tokens: as many more as the hidden
    states need, not as the table of logits would."""
    policy, kept = make_policy(50_000), {}
    for tokens in (64, 128, 256, 512):
        ids, sizes = torch.randint(50_000, (2, tokens + 1)), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
        ):
            gsm.compute_log_probs(policy, ids, torch.ones_like(ids), tokens, chunk_size=32)
        kept[tokens] = sum(sizes.values())
    table = 4 * 2 * (512 - 64) * 50_000  # bytes
    assert 0 < kept[512] - kept[64] < 0.05 * table


# --------------------------------------------------------------------------------------------------
# Study of the rehearsal: python test_grpo.py --study; about half an hour. Every variant
# from the same start, for each seed; the changes are to the rehearsal's settings.

VARIANTS = {
    "GRPO as in the rehearsal": {},
    "process supervision": {"supervision": "process"},
    "loss type dapo": {"loss_type": "dapo"},
    "loss type dr_grpo": {"loss_type": "dr_grpo"},
    "loss type cispo": {"loss_type": "cispo"},
    "control: format reward only": {"reward": "format"},
    "control: more SFT, no GRPO": None,
}


def study(folder, results=GSM_RESULTS, seeds=(0, 1, 2), **changes):
    """Train every variant in `folder`; figures, table and plot go to `results`, rows as they come.

    With one thread, so that the figures do not depend on how many there are.
    """
    torch.set_num_threads(1)
    rows = []
    for seed in seeds:
        started = time.perf_counter()
        start, train_file, test_file = gsm.make_start(folder / f"start-{seed}", seed)
        start_seconds = time.perf_counter() - started
        train_rows, test_rows = gsm.load_problems(train_file), gsm.load_problems(test_file)
        for name, variant in VARIANTS.items():
            print(f"\nseed {seed}, {name}", flush=True)
            (tokenizer, _), model = gsm.load_tokenizer(start), gsm.load_policy(start, "cpu")
            out = folder / f"{seed} {name}".replace(":", "")
            its = gsm.REHEARSAL | dict(num_steps=80, seed=seed, output_dir=str(out)) | changes
            its = gsm.Settings(**its | (variant or {}))
            started = time.perf_counter()
            if variant is not None:
                gsm.train_with_grpo(model, tokenizer, train_rows, its, test_rows)
                evaluations = gsm.load_json_lines(out / "eval.jsonl")
            else:  # as many demonstrations as GRPO has completions
                sequences = its.num_steps * its.batch_size * its.num_generations
                before = gsm.evaluate_model(model, tokenizer, test_rows, its.max_completion_length, 256)
                demonstrations = gsm.load_json_lines(train_file)
                gsm.fine_tune(model, tokenizer, demonstrations, sequences // 32, seed + 1000)
                after = gsm.evaluate_model(model, tokenizer, test_rows, its.max_completion_length, 256)
                evaluations = [{"step": 0, **before}, {"step": its.num_steps, **after}]
            rows.append({
                "variant": name, "seed": seed, "evaluations": evaluations, "start_seconds": round(start_seconds, 1),
                "train_seconds": round(time.perf_counter() - started, 1),
                "settings": asdict(its) | {"output_dir": ""}, **gsm.versions(),
            })
            text = ",\n".join(json.dumps(row) for row in rows)
            (results / "results.json").write_text(f'{{"rows": [\n{text}\n]}}\n', encoding="utf-8")
    (results / "tables.md").write_text(f"# python test_grpo.py --study\n\n{format_study(rows)}\n", encoding="utf-8")
    draw_study(rows, results)
    print(format_study(rows))


def format_study(rows):
    """The Markdown table of a study: mean (lowest to highest seed) of each variant."""
    lines = [
        "| | strict before, % | strict after, % | lenient after, % | all tags, % | tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in VARIANTS:
        runs = [row["evaluations"] for row in rows if row["variant"] == name]
        cells = []
        for which, metric, factor in (
            (0, "strict", 100), (-1, "strict", 100), (-1, "lenient", 100), (-1, "format", 100),
            (-1, "mean_length", 1),
        ):
            x = [factor * run[which][metric] for run in runs]
            cells.append(f"{statistics.fmean(x):.1f} ({min(x):.1f} to {max(x):.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    n = rows[0]["evaluations"][0]["examples"]
    lines.append(f"\nMean of {len({row['seed'] for row in rows})} seeds (lowest to highest); {n} held-out problems.")
    return "\n".join(lines)


def draw_study(rows, folder):
    """study.png: held-out accuracy of four variants by step, mean and range over the seeds."""
    plt = gsm.load_pyplot()
    figure, axis = plt.subplots(figsize=(8, 4))
    names = list(VARIANTS)
    for name, colour, style, marker in zip(
        (names[0], names[1], names[5], names[6]),
        ("#0072B2", "#009E73", "#E69F00", "#D55E00"), ("-", "--", ":", " "), "os.^",  # SFT: two points
    ):
        runs = [row["evaluations"] for row in rows if row["variant"] == name]
        x = [record["step"] for record in runs[0]]
        y = [[100 * run[i]["strict"] for run in runs] for i in range(len(x))]  # [step][seed]
        middle = [statistics.fmean(v) for v in y]
        axis.plot(x, middle, style, color=colour, marker=marker, label=name)
        low, high = [min(v) for v in y], [max(v) for v in y]
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="step (256 completions, or as many demonstrations)", ylim=(-2, 102))
    axis.set(ylabel="held-out problems right, greedy, %", title="The rehearsal, 80 steps: mean and range of three seeds")
    axis.legend(loc="center right")
    figure.savefig(folder / "study.png")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# Benchmark against TRL: python test_grpo.py --benchmark, with GSM8K=DIR set and TRL installed.
# Every measurement is a process of its own, ours and theirs in turn; about ten minutes on two cores.


def make_benchmark_model(folder):
    """The model of the comparison: hidden 256, 4 layers, vocabulary 32,000, random weights."""
    lines = Path(GSM8K, "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["question"] + "\n" + row["answer"] for row in map(json.loads, lines)]
    tokenizer = gsm.Qwen2Tokenizer(eos_token="<|im_end|>").train_new_from_iterator(
        texts + [gsm.SYSTEM_PROMPT], vocab_size=32_000, new_special_tokens=["<|im_start|>"], show_progress=False
    )
    tokenizer.chat_template = gsm.CHAT_TEMPLATE
    torch.manual_seed(0)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    gsm.Qwen2ForCausalLM(qwen(256, 1024, 4, 4, 2, 32_000, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def noise(texts):
    """A reward for nothing, so that a random model has groups with a spread, and all is computed."""
    return [random.Random(text).random() for text in texts]


def measure(what, folder, length, steps):
    """Seconds of each step (4 prompts × 8 completions) and the peak memory of this process, in bytes."""
    rows = gsm.load_problems(f"{GSM8K}/train.jsonl")[: 4 * steps]
    tokenizer, _ = gsm.load_tokenizer(folder)
    policy, seconds = gsm.load_policy(folder, "cpu").train(), []
    prompts = [gsm.build_prompt(row["question"], tokenizer) for row in rows]
    settings = gsm.Settings(
        batch_size=4, num_generations=8, max_completion_length=length, beta=0.0, learning_rate=1e-6, loss_type="dapo"
    )
    clean = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if what == "ours":
        gsm.combined_reward = lambda texts, answers: noise(texts)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

        def step(i):
            record, _ = gsm.take_step(policy, None, tokenizer, optimizer, rows[4 * i : 4 * i + 4], i, settings)
            assert record["grad_norm"] > 0 and record["completion_length"] > 0.9 * length
    elif what == "TRL":
        import datasets
        import trl
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            def on_step_begin(self, *arguments, **options):
                self.started = time.perf_counter()

            def on_step_end(self, *arguments, **options):
                seconds.append(time.perf_counter() - self.started)

        policy.generation_config = gsm.transformers.GenerationConfig(**{k: v for k, v in clean.items() if "token_id" in k})
        config = trl.GRPOConfig(
            output_dir=str(Path(folder) / "trl"), per_device_train_batch_size=32, num_generations=8, max_completion_length=length,
            beta=0.0, learning_rate=1e-6, temperature=1.0, top_k=0, top_p=1.0, use_cpu=True, bf16=False, max_steps=steps,
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        )
        trl.GRPOTrainer(
            model=policy, args=config, train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer, reward_funcs=lambda prompts, completions, **rest: noise(completions), callbacks=[Clock()],
        ).train()
        step = None
    else:
        policy.eval()
        ids, mask = gsm.encode(tokenizer, prompts[:4])
        plain = [row[m == 1].tolist() for row, m in zip(ids, mask) for _ in range(8)]
        config = gsm.transformers.GenerationConfig(**clean)
        step = {
            "the loop of this script": lambda i: gsm.generate_completions(policy, tokenizer, prompts[:4], 8, length),
            "transformers, generate()": lambda i: policy.generate(
                ids, attention_mask=mask, generation_config=config, num_return_sequences=8
            ),
            "transformers, continuous batching": lambda i: policy.generate_batch(plain, generation_config=config),
        }[what]
    for i in range(steps if step else 0):
        started = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - started)
    import resource

    return {"what": what, "tokens": length, "seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def format_benchmark(rows):
    """The tables of the benchmark as Markdown."""

    def chosen(what, tokens):
        return [row for row in rows if row["what"] == what and row["tokens"] == tokens]

    def seconds(what):
        return statistics.median(x for row in chosen(what, 128) for x in row["seconds"][1:])

    def peak(what, tokens):
        return max(row["peak"] for row in chosen(what, tokens)) / 1e9

    lines = ["| 4 prompts × 8 completions × 128 tokens | one step, s | peak memory, GB |", "| --- | --- | --- |"]
    lines += [f"| {what} | {seconds(what):.1f} | {peak(what, 128):.2f} |" for what in ("ours", "TRL")]
    lines.append(f"| ours / TRL | {seconds('ours') / seconds('TRL'):.2f} | {peak('ours', 128) / peak('TRL', 128):.2f} |")
    lines += ["", "| peak memory of a step, GB | 64 tokens | 128 | 256 | 512 |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {what} | " + " | ".join(f"{peak(what, n):.2f}" if chosen(what, n) else "not run" for n in (64, 128, 256, 512)) + " |"
        for what in ("ours", "TRL")
    ]
    lines += ["", "| sampling 32 × 128 tokens | s |", "| --- | --- |"]
    samplers = ("the loop of this script", "transformers, generate()", "transformers, continuous batching")
    lines += [f"| {what} | {seconds(what):.1f} |" if chosen(what, 128) else f"| {what} | failed |" for what in samplers]
    return "\n".join(lines)


def benchmark(folder):
    """Measure everything; write results/gsm8k/benchmark.json and benchmark.md."""
    make_benchmark_model(folder)
    jobs = [(what, 128, 3) for _ in range(3) for what in ("ours", "TRL")]
    jobs += [(what, n, 1) for n in (64, 256, 512) for what in ("ours", "TRL") if (what, n) != ("TRL", 512)]  # 25 GB
    jobs += [(what, 128, 3) for _ in range(2) for what in
             ("the loop of this script", "transformers, generate()", "transformers, continuous batching")]
    rows = []
    for what, length, steps in jobs:
        arguments = [sys.executable, __file__, "--measure", what, str(folder), str(length), str(steps)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
        if done.returncode:
            print(f"{what}, {length} tokens: failed\n{done.stderr[-500:]}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    import trl

    out = GSM_RESULTS
    made = gsm.versions() | {"trl": trl.__version__}
    (out / "benchmark.json").write_text(json.dumps({"made_with": made, "rows": rows}, indent=1) + "\n")
    (out / "benchmark.md").write_text(f"# python test_grpo.py --benchmark\n\n{format_benchmark(rows)}\n", encoding="utf-8")
    print(format_benchmark(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    elif sys.argv[1:] == ["--study"]:
        with tempfile.TemporaryDirectory() as folder:
            study(Path(folder))
    elif sys.argv[1:] == ["--benchmark"] and GSM8K:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(folder)
    else:
        sys.exit(
            "python -m pytest test_grpo.py runs the tests; python test_grpo.py --study and "
            "GSM8K=DIR python test_grpo.py --benchmark make results/gsm8k/"
        )
