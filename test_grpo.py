# SPDX-License-Identifier: MIT
"""Tests of grpo_sort.py and grpo_gsm8k.py. Run with `python -m pytest test_grpo.py`.

Names and docstrings say which mistakes are guarded against. What is expected is worked out by hand,
by plain Python loops or by enumeration of all responses, not by the code under test.
Tests named test_erratum_N prove row N of the README's table of common mistakes.
"""

import ast
import copy
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import multiprocessing.dummy
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, the machine may be busy

import pytest
import torch
import transformers

import grpo_gsm8k as gsm
import grpo_sort as gs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sort"
sys.path.insert(0, str(RESULTS))
import study as sort_study

sys.path.insert(0, str(HERE / "results" / "gsm8k"))
import benchmark

# What libraries say of our calls is an error: so the next deprecation shows.
pytestmark = pytest.mark.filterwarnings("error:::(grpo_|study|benchmark)", "error::FutureWarning")
PROMPTS = torch.tensor(gs.CLASSIC_PROMPTS)  # [batch pos]
EVERYTHING = torch.tensor(list(itertools.product(range(5), repeat=3)))  # all responses: [trial pos]
README = (HERE / "README.md").read_text(encoding="utf-8")
ERRATA = README.partition("\n## Common mistakes, checked\n")[2].partition("\n## ")[0]
TOKENS, GROUP = torch.ones(2, 3, 4), torch.ones(2, 3)  # [batch trial pos], [batch trial]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(num_runs=None, init_scale=1.0):
    return gs.Model(5, 4, 3, 3, init_scale, num_runs, seeded())


def learn(**change):
    return gs.run_policy_gradient(**gs.RECIPE | change)


def read_rows(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


# Rewards, model, sampling, log-probabilities ======================================================
def test_rewards_agree_with_plain_python_on_every_response():
    prompts, runs = [(3, 1, 0), (1, 1, 2), (4, 4, 4), (0, 3, 0)], EVERYTHING.view(5, 25, 3)

    def ordering(p, r):
        return sum(x in r for x in p) + sum(x <= y for x, y in zip(r, r[1:]))

    for reward, plain in (
        (gs.sort_step_rewards, lambda p, r: [x == y for x, y in zip(r, sorted(p))]),
        (gs.sort_distance_reward, lambda p, r: sum(x == y for x, y in zip(r, sorted(p)))),
        (gs.exact_sort_reward, lambda p, r: r == sorted(p)),
        (gs.sort_inclusion_ordering_reward, ordering),
    ):
        wanted = [[[plain(p, r) for r in run] for p in prompts] for run in runs.tolist()]
        assert reward(torch.tensor(prompts), runs[:, None].expand(5, 4, 25, 3)).tolist() == wanted


def test_the_model_is_the_formula_in_its_comment():
    model = make_model().double()
    E, A, B = model.embedding, model.encode_weights, model.decode_weights
    for prompt, logits in zip(PROMPTS.tolist(), model(PROMPTS)):
        h = sum(E[token] @ A[p] for p, token in enumerate(prompt))
        for q in range(3):
            assert torch.allclose(logits[q], h @ B[q] @ E.T, atol=1e-12)


@pytest.mark.parametrize("mode", [*gs.DELTAS, "process"])
def test_deltas_agree_with_plain_python(mode):
    rng = random.Random(1)
    runs = [[[float(rng.randint(0, 4)) for _ in range(5)] for _ in range(3)] for _ in range(4)]
    runs[0][1], runs[1][2] = [-2.0, 1.0, 0.0, -3.0, 0.0], [-1.0, 1.0, 0.0, -1.0, 1.0]  # mean ≤ 0
    compute = gs.compute_deltas if mode != "process" else lambda x, _: gs.compute_process_deltas(x)
    deltas = compute(torch.tensor(runs, dtype=torch.float64), mode)
    for n, b, i in itertools.product(range(4), range(3), range(5)):
        batch = sum(runs[n], [])  # of one run; for process the batch is the group
        group, r = (batch if mode == "process" else runs[n][b]), runs[n][b][i]
        mean, std = statistics.mean(group), statistics.stdev(group) + 1e-5
        wanted = {
            "rewards": r,
            "centered_rewards": r - mean,
            "normalized_rewards": (r - mean) / std,
            "max_rewards": r if r == max(group) else 0.0,
            "leave_one_out": r - statistics.mean(group[:i] + group[i + 1 :]),
            "batch_normalized": (r - mean) / (statistics.stdev(batch) + 1e-5),
            "max_likelihood": (r - mean) / mean if mean > 0 else 0.0,
            "process": sum((x - mean) / std for x in runs[n][b][i:]),
        }[mode]
        assert deltas[n, b, i].item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("mode", [*gs.DELTAS[1:], "process"])
def test_a_group_of_equal_rewards_has_no_signal_and_no_nan(mode):
    # (!1): the float32 mean of twelve times 2.8 is not 2.8; divided by 1e-5 that would be 0.05
    for reward, size in ((0.0, 3), (2.0, 3), (2.8, 12), (2.8, 4800)):
        rewards = torch.full((2, size), reward)
        if mode == "process":
            deltas = gs.compute_process_deltas(rewards.view(2, 3, -1))
        else:
            deltas = gs.compute_deltas(rewards, mode)
        assert deltas.abs().max() == (reward if mode == "max_rewards" else 0)


def plain_loss(log_probs, old, deltas, mode, low, high):
    """The loss of one run with math.exp and loops; deltas[b][i][t]."""
    terms = []
    for b, i in itertools.product(range(len(log_probs)), range(len(log_probs[0]))):
        new_row, old_row = log_probs[b][i], old[b][i]
        sequence = math.exp(statistics.mean(x - y for x, y in zip(new_row, old_row)))
        for x, y, d in zip(new_row, old_row, deltas[b][i]):
            ratio = sequence if mode == "gspo" else math.exp(x) / math.exp(y)
            clipped = min(max(ratio, 1 - low), 1 + high)
            values = dict(naive=x * d, unclipped=ratio * d, cispo=min(ratio, 1 + high) * d * x)
            terms.append(-values.get(mode, min(ratio * d, clipped * d)))
    return statistics.mean(terms)


@pytest.mark.parametrize("mode", gs.LOSSES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("high", [None, 0.5])
def test_losses_agree_with_plain_python(mode, per_token, high):
    shape, options = (2, 3, 4, 5), dict(generator=seeded(4), dtype=torch.float64)
    old = -torch.rand(shape, **options) - 0.5  # [run batch trial pos]
    new = old + 0.6 * torch.randn(shape, **options)
    deltas = torch.randn(shape if per_token else shape[:-1], **options)
    loss = gs.compute_loss(new, deltas, mode, old, epsilon=0.2, epsilon_high=high)
    full = deltas if per_token else deltas.unsqueeze(-1).expand(shape)
    rows = zip(new.tolist(), old.tolist(), full.tolist(), strict=True)
    assert loss.tolist() == pytest.approx([plain_loss(*x, mode, 0.2, high or 0.2) for x in rows])


@pytest.mark.parametrize("mode", gs.LOSSES)
def test_gradients_of_the_losses(mode):
    # (!2) On policy all have the policy gradient, also if old_log_probs have a gradient of their
    # own, as when one forgets to freeze them. The weight of cispo is a constant also off policy.
    old = (-torch.rand(1, 2, 3, generator=seeded(5)) - 0.5).double()
    deltas = torch.tensor([[1.5, -0.7]]).double()
    for shift in (0.0, 0.3) if mode == "cispo" else (0.0,):
        new = (old + shift).requires_grad_()
        gs.compute_loss(new, deltas, mode, old if shift else new * 1.0).backward()
        assert torch.allclose(new.grad, -min(math.exp(shift), 1.2) * deltas.unsqueeze(-1) / 6)


def test_the_worked_example_against_numbers_worked_out_by_hand():
    # Rewards 3, 2, 1, 0: mean 3/2, std √(5/3). Each of 12 tokens weighs 1/12 in the loss.
    head, *lines = gs.worked_example().split("\n")
    assert re.findall(r"\d", head) == [*"102012011021100"]
    assert [[float(x) for x in line[24:].split()] for line in lines[:6]] == [
        [3, 2, 1, 0], [1.5, 0.5, -0.5, -1.5],
        [1.162, 0.387, -0.387, -1.162],  # 1.5 / 1.29099, 0.5 / 1.29099
        [2, 0.667, -0.667, -2],  # 3 − (2 + 1 + 0)/3, 2 − (3 + 1 + 0)/3, …
        [1, 0.333, -0.333, -1], [-0.125, -0.042, 0.042, 0.125],  # −δ / 12
    ]  # fmt: skip
    text = " ".join(lines[6:])
    assert "= 0.0, as on the first step" in text and "its ratio is 1.35," in text  # e^0.3


def test_gae_is_the_discounted_sum_of_its_definition_and_gives_constants():
    # Constants, because token rewards may hold a KL penalty, and that a gradient.
    rewards, values = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    advantages, returns = gs.compute_gae(rewards, values, 0.9, 0.7)
    assert not advantages.requires_grad and not returns.requires_grad
    v = torch.cat([values, torch.zeros(2, 3, 1)], dim=-1)
    errors = rewards + 0.9 * v[..., 1:] - values
    for t in range(5):
        wanted = sum((0.9 * 0.7) ** (k - t) * errors[..., k] for k in range(t, 5))
        assert torch.allclose(advantages[..., t], wanted)
    assert torch.allclose(returns, advantages + values)


def test_the_critic_does_not_see_the_token_that_it_judges():
    critic = gs.Critic(5, 3, 2, seeded(0))
    critic.value_weights.data.normal_(generator=seeded(1))  # they start at 0
    responses = torch.zeros(2, 3, 4, 3, dtype=torch.long)
    before = critic(PROMPTS, responses)  # [run batch trial pos]
    after = critic(PROMPTS, responses.index_fill(-1, torch.tensor(1), 4))
    change = (after - before).abs().amax(dim=(0, 1, 2))
    assert change[0] == change[1] == 0 and change[2] > 1e-3


def test_the_critic_learns_the_mean_reward(monkeypatch):
    # With the value loss on the wrong side of the objective, V runs away from the rewards.
    critics, make = [], gs.Critic
    monkeypatch.setattr(gs, "Critic", lambda *a, **k: critics.append(make(*a, **k)) or critics[0])
    result = learn(deltas_mode="gae", num_runs=4, num_epochs=30)
    responses = gs.generate_responses(PROMPTS, result.model, 6, seeded())
    mean, value = result.records[-1]["mean_reward"], critics[0](PROMPTS, responses)[..., 0].mean()
    assert mean > 2.7 and abs(value - mean) < 0.2


@pytest.fixture(scope="module")
def gradients():
    return sort_study.measure_gradients(num_runs=4, seed=0)


def test_erratum_11_with_the_ratio_upside_down_k3_is_another_divergence(gradients):
    row = gradients["6c", "k3 with the ratio upside down"]
    assert row["value_to_chi2"].tolist() == pytest.approx([1] * 4, abs=2e-3)  # of χ² − KL
    assert row["error_chi2"].max() < 2e-3 < 0.1 < row["error_to_ref"].min()


@pytest.mark.parametrize("table, row, metric, wanted", [
    ("6a", "rewards", "cosine", 1), ("6a", "leave_one_out", "length", 1),
    ("6a", "centered_rewards", "cosine", 1), ("6a", "centered_rewards", "length", 3 / 4),
    ("6c", "k1", "value", 1), ("6c", "k1", "error_to_ref", 1),  # no gradient at all
    ("6c", "k2", "error_to_ref", 0), ("6c", "k3", "value", 1), ("6c", "k3", "error_from_ref", 0),
    ("6c", "k3_weighted", "error_to_ref", 0),
    ("6c", "k3_weighted, off policy", "error_to_ref", 0),
    ("6e", "E[(∇log π)² R] / E[(∇log π)²]", "baseline", 9.4),
    ("6e", "E[(∇log π)² R] / E[(∇log π)²]", "variance", 0),
])  # fmt: skip
def test_what_theory_says_of_the_study(table, row, metric, wanted, gradients):
    values = gradients[table, row][metric].tolist()
    assert values == pytest.approx([wanted] * len(values), abs=2e-3)


# Training =========================================================================================
def test_the_recipe_sorts_everything_in_every_run_and_the_classic_defaults_do_not():
    assert gs.run_policy_gradient(num_runs=32).exact_match.mean() < 0.3
    result = learn(num_runs=32)
    assert result.exact_match.tolist() == [1.0] * 32 and len(result.records) == 100
    assert result.records[-1]["batch_exact_match"] == 1.0 and result.records[-1]["step"] == 1000
    # A record is the mean over the runs of the curves.
    for name in ("loss", "mean_reward", "batch_exact_match", "entropy", "kl"):
        means = result.curves[name].mean(dim=1).tolist()  # of [epoch run]
        assert [record[name] for record in result.records] == pytest.approx(means)


def test_erratum_3_the_recipe_sorts_but_for_the_classic_start():
    stuck, free = (learn(num_runs=16, num_epochs=15, init_scale=s) for s in (1.0, 0.1))
    assert stuck.exact_match.mean() < 0.5 < 0.9 < free.exact_match.mean()


@pytest.mark.parametrize("optimizer, change", [
    # Plain gradient descent shows the scale of the gradient, which Adam hides.
    (torch.optim.SGD, dict(loss_mode="naive", num_steps_per_epoch=1, entropy_bonus=0.1)),
    (torch.optim.SGD, dict(kl_penalty=0.5, kl_estimator="k3_weighted", entropy_bonus=0.1)),
    (torch.optim.SGD, dict(kl_penalty=0.5, compute_ref_model_period=1)),
    (torch.optim.Adam, dict(learning_rate=5e-3)),
    (torch.optim.Adam, dict(learning_rate=5e-3, target_kl=0.01, num_steps_per_epoch=12)),
])  # fmt: skip
def test_every_run_trains_as_it_would_alone(optimizer, change, monkeypatch):
    # Each run is trained again, alone, on the samples that it had beside the others.
    change = dict(
        num_epochs=3, num_steps_per_epoch=4, compute_ref_model_period=2, learning_rate=0.5,
        loss_mode="clipped", kl_penalty=0.0, kl_estimator="k3", entropy_bonus=0.0, target_kl=1e9,
    ) | change  # fmt: skip
    settings, epochs, stops = SimpleNamespace(**change), [], set()
    monkeypatch.setattr(gs.torch.optim, "Adam", lambda p, lr, fused: optimizer(p, lr))
    result = learn(**change, num_runs=3, seed=7, on_epoch=lambda *args: epochs.append(args))
    start = gs.Model(5, 10, 3, 3, 0.1, 3, seeded(7)).state_dict()
    for run in range(3):
        model = gs.Model(5, 10, 3, 3)
        model.load_state_dict({name: p[run] for name, p in start.items()})
        alone = optimizer(model.parameters(), settings.learning_rate)
        for epoch, (_, prompts, responses, rewards, _, old) in enumerate(epochs):
            if epoch % settings.compute_ref_model_period == 0:
                ref_model = copy.deepcopy(model).requires_grad_(False)
            ref_log_probs = gs.compute_log_probs(prompts, responses[run], ref_model)
            deltas = gs.compute_deltas(rewards[run], "normalized_rewards")
            losses = []
            for _ in range(settings.num_steps_per_epoch):
                log_probs = gs.compute_log_probs(prompts, responses[run], model)
                loss = gs.compute_loss(log_probs, deltas, settings.loss_mode, old[run])
                loss = loss - settings.entropy_bonus * gs.compute_entropy(prompts, model)
                kl = log_probs, ref_log_probs, settings.kl_estimator, old[run]
                loss = loss + settings.kl_penalty * gs.compute_kl_penalty(*kl)
                losses.append(loss.item())
                x = (log_probs - old[run]).detach()  # of samples of π_old: k3 of KL(π_old ‖ π)
                if (x.exp() - x - 1).sum(-1).mean() > settings.target_kl:
                    loss = 0 * loss
                    stops.add((run, epoch))
                alone.zero_grad()
                loss.backward()
                alone.step()
            wanted = pytest.approx(statistics.mean(losses), abs=1e-5)
            assert result.curves["loss"][epoch, run].item() == wanted
        for p, trained in zip(model.parameters(), result.model.parameters()):
            assert torch.allclose(p, trained[run], atol=2e-5)
    assert bool(stops) == (settings.target_kl < 1)


@pytest.mark.parametrize("period", [1, 2, 10])
def test_erratum_4_the_recorded_kl_is_to_a_frozen_copy_that_is_renewed(period):
    # A reference that shares the model's tensors would give 0 throughout. With period 1 it is the
    # policy that sampled. All that is recorded is of each run, of the policy after the epoch.
    settings = dict(num_runs=3, compute_ref_model_period=period, kl_penalty=0.1)
    after = [learn(**settings, num_epochs=n) for n in (1, 2, 3, 4)]
    models = [gs.Model(5, 10, 3, 3, 0.1, 3, seeded(0)), *(result.model for result in after)]
    probs = [model(PROMPTS).softmax(dim=-1).detach() for model in models]  # [run batch pos vocab]
    for n, p in enumerate(probs[1:]):
        kl = (p * (p / probs[n // period * period]).log()).sum(dim=(-2, -1)).mean(dim=-1)  # [run]
        entropy = -(p * p.log()).sum(dim=-1).mean(dim=(-2, -1))  # [run]
        right = (p.argmax(-1) == PROMPTS.sort(-1).values).all(-1).float().mean(-1)  # [run]
        for name, wanted in dict(kl=kl, entropy=entropy, batch_exact_match=right).items():
            assert torch.allclose(after[-1].curves[name][n], wanted, atol=1e-5), name
        assert kl.min() > 1e-4


def test_erratum_6_the_penalty_pulls_to_the_reference_not_to_the_old_policy():
    settings = dict(num_runs=4, num_epochs=20, compute_ref_model_period=20)
    held, free = (learn(**settings, kl_penalty=k) for k in (10.0, 0.0))
    assert held.records[-1]["kl"] < 0.05 < free.records[-1]["kl"]  # to the policy of epoch 0


def test_gae_is_given_the_whole_reward_at_the_end_and_gamma_and_lambda(monkeypatch):
    seen, compute_gae = [], gs.compute_gae
    monkeypatch.setattr(gs, "compute_gae", spy := mock.Mock(wraps=compute_gae))
    settings = dict(deltas_mode="gae", gamma=0.9, lam=0.7, num_epochs=4, num_runs=3)
    learn(**settings, on_epoch=lambda *args: seen.append(args))
    for call, (*_, rewards, deltas, _) in zip(spy.call_args_list, seen, strict=True):
        token_rewards, _, *rest = call.args
        assert rest == [0.9, 0.7] and torch.equal(token_rewards[..., -1], rewards)
        x = compute_gae(*call.args)[0].flatten(1)  # normalised over a run's tokens
        wanted = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + 1e-5)
        assert torch.allclose(deltas.flatten(1), wanted, atol=1e-4)


def test_annealing_takes_learning_rate_and_entropy_bonus_down_to_zero(monkeypatch):
    rates = []
    step = lambda self: rates.append(self.param_groups[0]["lr"])  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    # The first loss with δ of mean 0 is minus the bonus times the entropy, here log 5.
    settings = dict(entropy_bonus=2.0, init_scale=1e-3, num_epochs=4, num_steps_per_epoch=1)
    losses = [
        x["loss"] for anneal in (True, False) for x in learn(**settings, anneal=anneal).records
    ]
    left = [1, 0.75, 0.5, 0.25, 1, 1, 1, 1]
    assert rates == pytest.approx([gs.RECIPE["learning_rate"] * x for x in left], abs=0)
    assert losses == pytest.approx([-2.0 * x * math.log(5) for x in left], abs=1e-3)


def test_prompts_of_ones_own_and_batches_of_them():
    train, unseen = sort_study.split_prompts(4, 3, num_train=40, num_runs=2, seed=0)
    settings = {k: x for k, x in sort_study.UNSEEN.items() if k != "split"}
    settings |= dict(prompts=train, batch_size=16, num_runs=2, num_epochs=200)
    batches = []
    assert learn(**settings, on_epoch=lambda *a: batches.append(a[1])).exact_match.min() > 0.7
    for run in range(2):  # draws from its own prompts only, in the end from all
        seen, rest = ({tuple(p) for p in x[run].tolist()} for x in (train, unseen))
        assert len(seen) == 40 and len(rest) == 24 and not seen & rest
        drawn = [{tuple(p) for p in batch[run].tolist()} for batch in batches]
        assert set.union(*drawn) == seen and drawn[0] != drawn[1]
    assert not torch.equal(batches[0][0], batches[0][1])


@pytest.mark.parametrize("call", [
    lambda: gs.compute_deltas(GROUP, "mean"), lambda: gs.compute_deltas(torch.ones(3), "rewards"),
    *(lambda m=m: gs.compute_deltas(torch.ones(2, 1), m) for m in gs.DELTAS[1:3] + gs.DELTAS[4:]),
    lambda: gs.compute_process_deltas(torch.ones(2, 1, 1)),
    lambda: gs.compute_process_deltas(GROUP), lambda: gs.compute_gae(TOKENS, GROUP),
    *(lambda x=x: gs.compute_loss(TOKENS, *x) for x in (
        (GROUP, "ppo", TOKENS), (GROUP, "clipped"), (GROUP.mT, "naive"),
        (GROUP[..., None], "naive"), (GROUP, "gspo", GROUP), (GROUP, "clipped", TOKENS[:1]),
    )),
    lambda: gs.compute_loss(GROUP, GROUP[:, 0], "naive"),
    lambda: gs.compute_kl_penalty(TOKENS, TOKENS, "k4"),
    lambda: gs.compute_kl_penalty(TOKENS, GROUP), lambda: gs.compute_kl_penalty(GROUP, GROUP),
    lambda: gs.compute_kl_penalty(TOKENS, TOKENS, "k3_weighted", GROUP),
    lambda: gs.sort_distance_reward(PROMPTS, torch.ones(3, 4, 1)),
    *(lambda x=x: gs.compute_reward(PROMPTS, EVERYTHING.expand(3, -1, -1), lambda *_: x) for x in (
        None, [[0.0] * 125] * 3, torch.zeros(3, 125, 3), torch.full((3, 125), math.nan))),
])  # fmt: skip
def test_functions_refuse_what_cannot_work(call):
    # What would otherwise be broadcast, or do something else in silence.
    with pytest.raises(ValueError, match="need|no mode|no estimator|fit|must"):
        call()


@pytest.mark.parametrize("arguments", [
    dict(prompts=[[0.5, 1.0]]), dict(prompts=[[-1, 2]]), dict(prompts=[]), dict(deltas_mode="ppo"),
    dict(prompts=[[[1, 2]]] * 3, num_runs=2), dict(prompts=[[1, 9]], vocab_size=9),
    dict(prompts=[[1, 2], [3]]), dict(kl_estimator="k4", kl_penalty=0.1), dict(num_responses=1),
    dict(learning_rate=math.nan), dict(deltas_mode="process", reward_fn=gs.exact_sort_reward),
    dict(reward_fn=gs.sort_step_rewards, num_responses=3),  # would take its positions for trials
    dict(learning_rate=1e30, num_epochs=5),  # found when the policy is no longer finite
], ids=str)  # fmt: skip
def test_training_refuses_what_cannot_work(arguments):
    with pytest.raises((ValueError, RuntimeError)):
        learn(**arguments)


# What a run shows, command line, study, README, results ===========================================
def test_the_interval_is_students_t():
    for n, t in ((8, 2.364624), (32, 2.039513)):  # t(0.975), 7 and 31 degrees of freedom: tables
        values = [float(i % 3) for i in range(n)]
        wanted = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)
        assert sort_study.mean_and_interval(values) == pytest.approx(wanted, rel=1e-3)
        assert gs.mean_and_interval(torch.tensor(values)) == pytest.approx(wanted, rel=5e-3)


def make_result(percents, solved_at, num_epochs=5):
    """What run_policy_gradient gives, of runs that sort all from an epoch on (0: never)."""
    epoch = torch.arange(1, num_epochs + 1)[:, None]  # [epoch 1]
    solved = torch.tensor([x or num_epochs + 1 for x in solved_at]) <= epoch  # [epoch run]
    curves = {"batch_exact_match": solved.float(), "loss": -solved.float()}
    curves["mean_reward"] = 1.0 + solved
    exact = torch.tensor(percents) / 100
    return SimpleNamespace(exact_match=exact, curves=curves, prompts=PROMPTS)


def test_a_table_trains_equal_rows_once(monkeypatch, capsys):
    results = {1: make_result([100, 50], [2, 0]), 2: make_result([0, 0], [0, 0])}
    train = mock.Mock(side_effect=lambda seed, lam=0: results[seed])
    monkeypatch.setattr(gs, "run_policy_gradient", train)
    gs.train.cache_clear()
    rows = {"one": dict(seed=1, lam=0.5), "two": dict(seed=2), "again": dict(lam=0.5, seed=1)}
    assert gs.train_table("A title", rows)["again"] == (rows["again"], results[1])
    gs.train.cache_clear()
    pattern = r"\| (\w+) +\| (\S+) ± \S+ +\| (\S+ of 2) +\| (\S+)"
    found = re.findall(pattern, capsys.readouterr().out)
    assert found == [  # epochs 2 and, for never, 5
        ("one", "75.0", "1 of 2", "3.5"), ("two", "0.0", "0 of 2", "never"),
        ("again", "75.0", "1 of 2", "3.5"),
    ]  # fmt: skip
    assert train.call_count == 2


def run_main(monkeypatch, arguments):
    calls, result = [], make_result([100, 100], [1, 1])
    monkeypatch.setattr(gs, "run_policy_gradient", lambda **s: calls.append(s) or result)
    monkeypatch.setattr(gs, "draw_curves", lambda results, out: None)
    gs.train.cache_clear()
    gs.main(arguments)
    gs.train.cache_clear()
    return [{k: x for k, x in call.items() if k != "on_epoch"} for call in calls]


def test_every_argument_is_a_flag_with_its_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(gs.run_policy_gradient).parameters
    assert [*gs.SETTINGS, "on_epoch"] == list(parameters)
    special = dict(
        deltas_mode=("gae", "gae"), loss_mode=("gspo", "gspo"), kl_estimator=("k2", "k2"),
        reward_fn=("exact", gs.exact_sort_reward), prompts=("3,2 1,0", ((3, 2), (1, 0))),
        anneal=("yes", True),
    )  # fmt: skip
    shown = dict(prompts="three classic", anneal="no", reward_fn="inclusion_ordering")
    arguments, wanted = [], {}
    for name, (kind, text) in gs.SETTINGS.items():
        given, wanted[name] = special.get(name, {int: ("7", 7), float: ("2", 2.0)}.get(kind))
        arguments += ["--" + name.replace("_", "-"), *given.split()]
        default = str(shown.get(name, parameters[name].default))
        assert re.search(rf"\w\w .*\(.*{re.escape(default)}", text), name
    (found,) = run_main(monkeypatch, arguments)
    assert found == wanted and all(type(found[k]) is type(x) for k, x in wanted.items())


def test_one_flag_changes_the_recipe_or_the_classic_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line, wanted in (
        ("--loss-mode cispo", gs.RECIPE | dict(num_runs=32, loss_mode="cispo")),
        ("--classic --seed 3 --num-runs 2", dict(num_runs=2, seed=3)),
    ):
        assert run_main(monkeypatch, line.split()) == [wanted]
    line = "--classic --compare num_responses 2 4 --loss-mode gspo --num-runs 4"
    wanted = [dict(num_runs=4, loss_mode="gspo", num_responses=n) for n in (2, 4)]
    assert run_main(monkeypatch, line.split()) == wanted


def test_a_plain_run_shows_all_and_writes_the_curves(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    train, short = gs.run_policy_gradient, dict(num_epochs=3, num_steps_per_epoch=2)
    calls = []
    spy = lambda **s: calls.append(s) or train(**s | short)  # noqa: E731
    monkeypatch.setattr(gs, "run_policy_gradient", spy)
    gs.train.cache_clear()
    gs.main("--num-runs 2 --seed 4".split())
    gs.train.cache_clear()
    out, files = capsys.readouterr().out, [x for x in tmp_path.rglob("*") if x.is_file()]
    assert out.startswith(gs.worked_example()) and files == [tmp_path / "runs/sort/curves.png"]
    assert all(label in out for label, _ in gs.LADDER)
    matrix = dict(re.findall(r"(?m)^(\w+) +([\d. ]+)$", out.split("## 3")[1]))
    lengths = {mode: len(row.split()) for mode, row in matrix.items()}
    assert lengths == dict.fromkeys(gs.DELTAS, 5) | {"process": 1, "gae": 1}
    assert len(re.findall(r"(?m)^    \[.*log π", out)) == 2 * 3 * 3  # 2 epochs, 3 of each prompt
    # The recipe that is shown, 3 classic rows, 4 more of the ladder, 37 − 1 of the matrix.
    assert len(calls) == 1 + 3 + 4 + 36 and calls[0].pop("on_epoch")
    assert calls[0] == gs.RECIPE | dict(num_runs=2, seed=4) in calls[1:]
    assert all(call["num_runs"] == 2 and call["seed"] == 4 for call in calls)


def test_classic_prints_every_response(tmp_path, capsys):
    calls, out = [], ["--out", str(tmp_path)]
    with mock.patch.object(gs, "show_epoch", lambda *a, s=gs.show_epoch: calls.append(a) or s(*a)):
        gs.main([*"--classic --num-epochs 2 --num-runs 3 --reward-fn distance".split(), *out])
    pattern = r"(\[.*?\])\s+reward (\S+)\s+delta (\S+)\s+log π (\S+)"
    found = re.findall(pattern, capsys.readouterr().out)
    responses, *numbers = zip(*([ast.literal_eval(x) for x in line] for line in found))
    _, _, *tensors, log_probs = calls[0]  # of epoch 0
    wanted = [x[0].flatten(0, 1).tolist() for x in (*tensors, log_probs.sum(-1))]  # of run 0
    assert list(responses) == wanted[0] and len(found) == 30
    assert all(list(x) == pytest.approx(y, abs=0.006) for x, y in zip(numbers, wanted[1:]))


@pytest.mark.parametrize("arguments, told", [
    ("--nonsense", "nonsense"), ("--loss-mode ppo", "--loss-mode"), ("--reward-fn x", "distance"),
    ("--prompts a,b", "a"), ("--prompts 3,2,4 1,2", "one length"), ("--prompts 3,-2", "negative"),
    ("--num-epochs 0", "num_epochs must be a finite number from 1 up"),
    ("--num-responses 1", "trial"),
    ("--kl-penalty nan", "kl_penalty"),
    ("--learning-rate 1e30 --num-runs 1", "lower learning_rate"), ("--num-runs 0", "num_runs"),
    ("--vocab-size 3 --prompts 3,1", "smaller than"),
    ("--deltas-mode process --reward-fn exact", "process"), ("--out /dev/null/x", "/dev/null/x"),
    ("--compare num_responses", "needs a setting and values"), ("--compare size 2", "num_runs"),
    ("--compare loss_mode ppo", "loss-mode"),
])  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        gs.main(arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(r".+\n", error) and told in error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command, shown", [
    ("grpo_sort.py --help", "KL(?_old ? ?)"), ("grpo_gsm8k.py --help", "?: weight of the KL"),
    ("grpo_sort.py --num-epochs 1 --num-runs 1", "log ? -4."),
])  # fmt: skip
def test_a_console_without_greek_letters_gets_replacements(command, shown, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    command = [sys.executable, *command.split()]
    done = subprocess.run(command, capture_output=True, cwd=HERE, env=environment)
    assert done.returncode == 0 and shown in done.stdout.decode(encoding), done.stderr


def test_the_study_runs_from_end_to_end(tmp_path, monkeypatch):
    threads = SimpleNamespace(get_context=lambda _: multiprocessing.dummy, parent_process=int)
    monkeypatch.setattr(sort_study, "multiprocessing", threads)
    tables = [x for x in sort_study.TABLES if x[0] != "5b"]
    sort_study.run_study(tmp_path, tables=tables, num_epochs=1, num_runs=2)
    rows = read_rows(tmp_path)
    assert {*os.listdir(tmp_path)} == {"results.json", "tables.md", "curves.png", "grid.png"}
    assert {row["table"] for row in rows} | {sort_study.TITLES["5b"]} == {
        *sort_study.TITLES.values()
    }
    assert len({(row["table"], row["label"]) for row in rows}) == len(rows) == 229


@pytest.mark.parametrize("expression, value", re.findall(r"`([^`]+)` → `([^`]+)`", ERRATA))
def test_what_the_errata_table_shows_is_so(expression, value):
    space = {"torch": torch, "gs": gs, "gsm": gsm, "study": sort_study}
    assert eval(expression, space) == ast.literal_eval(value)


def test_every_erratum_is_an_expression_or_has_a_test():
    names = " ".join(re.findall(r"(?m)^def (test_\w+)", Path(__file__).read_text(encoding="utf-8")))
    rows = re.findall(r"(?m)^\| \d+ \|.*", ERRATA)
    for number, line in enumerate(rows, start=1):
        assert line.split()[1] == str(number)
        assert "` → `" in line or f"test_erratum_{number}_" in names, line
    assert all(part in names for part in re.findall(r"pytest test_grpo.py -k (\w+)", README))


def test_every_command_of_the_readme_exists(monkeypatch, tmp_path):
    commands = re.findall(r"\.venv/bin/(?:python|torchrun) .*?(\S+\.py)([^`\n#]*)", README)
    assert len(commands) > 8 and all((HERE / name).exists() for name, _ in commands)
    monkeypatch.chdir(tmp_path)  # without runs/
    for name, after in commands:
        if name == "grpo_sort.py":
            gs.make_parser().parse_args(after.split())
        elif name == "grpo_gsm8k.py":
            arguments = after.replace("--resume", "").split()  # there is nothing to resume
            gsm.parse_settings(transformers.HfArgumentParser(gsm.Settings), arguments)


def test_the_committed_results_are_the_studys_and_meet_the_targets():
    text, rows = (RESULTS / "tables.md").read_text(encoding="utf-8"), read_rows(RESULTS)
    found = {(row["table"], row["label"]): row for row in rows}
    for title, label, _, written in sort_study.plan_rows(sort_study.TABLES, seed=0):
        assert json.loads(json.dumps(written)) == found[title, label]["settings"]
    for title in dict.fromkeys(row["table"] for row in rows):
        lines = sort_study.format_table([row for row in rows if row["table"] == title])
        assert "\n".join((f"## {title}", "", *lines, "")) in text
        least = {"5a": 8, "5b": 8, "6e": 1}.get(title.split(".")[0], 32)
        lists = [x for row in rows if row["table"] == title for x in row.values()]
        assert min(len(x) for x in lists if isinstance(x, list)) >= least
    recipe = found[sort_study.TITLES["2b"], "+ learning_rate 0.005"]
    assert recipe["exact_match"] == [1.0] * 32
    for name in ("5a", "5b"):
        assert statistics.mean(found[sort_study.TITLES[name], "base"]["unseen"]) >= 0.99


def test_the_readmes_ladder_and_rehearsal_are_those_of_the_results():
    ladder = [row for row in read_rows(RESULTS) if row["table"] == sort_study.TITLES["2b"]]
    for (label, _), row in zip(gs.LADDER, ladder, strict=True):
        cells = [sort_study.format_cell(row[x], x) for x in ("exact_match", "solved", "epochs")]
        cells[2] = cells[2] if any(row["solved"]) else "never"
        assert f"| {' | '.join([label, *cells])} |" in README
    text = (HERE / "results" / "gsm8k" / "tables.md").read_text(encoding="utf-8")
    cell = r" (\S+) \([^|]*\) \|"
    before, after = re.search(rf"\| GRPO as in the rehearsal \|{cell}{cell}", text).groups()
    for name in ("benchmark", "full_size"):
        made = json.loads((HERE / f"results/gsm8k/{name}.json").read_text(encoding="utf-8"))
        table = (HERE / f"results/gsm8k/{name}.md").read_text(encoding="utf-8")
        assert table == benchmark.format_benchmark(**made)
    assert f"| steps: 12 GB, host {made['rows'][5]['host_peak'] / 1e9:.0f} GB |" in README
    other = re.search(rf"\| control: more SFT, no GRPO \|{cell}{cell}", text)[2]
    numbers = f"from {before} % to {after} % right on held-out problems, more supervised "
    assert numbers + f"fine-tuning to {other} %" in " ".join(README.split())


def test_the_numbers_in_the_readme_are_those_of_the_results():
    number = r"-?\d[\d,]*(?:\.\d+)?"  # as in "62.5 ± 9.5" and "19 of 32"
    measured = re.compile(rf"{number} ± {number}|(?<![\d.,])\d+ of \d+(?![.\d])").findall
    tables, text = (RESULTS / "tables.md").read_text(encoding="utf-8"), README.replace("−", "-")
    blocks = re.findall(r"<!-- from (results/\S+) -->\n(.*?)<!-- end -->", text, re.S)
    assert len(blocks) == 3
    for source, block in blocks:
        lines = (HERE / source).read_text(encoding="utf-8").replace("−", "-")
        for line in filter(str.strip, block.split("\n")):
            prose = source == "results/sort/tables.md" and set(measured(line)) <= set(
                measured(tables)
            )
            assert prose or line in lines, f"README.md quotes {source}, which does not say: {line}"
    for x in measured(re.sub(r"<!-- from .*?<!-- end -->", "", text, flags=re.S)):
        assert x in measured(tables) or " of " in x, f"README.md says {x}, which results/ does not"
    table = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    for path in (HERE / "results").glob("*/*.*"):
        assert path.name in table or f"`*{path.suffix}`" in table, path


# grpo_gsm8k.py ====================================================================================

GSM8K = os.environ.get("GSM8K")  # a folder with the real train.jsonl and test.jsonl
needs_gsm8k = pytest.mark.skipif(not GSM8K, reason="set GSM8K to a folder with the real data")
MODES, LOSS_TYPES = gsm.ADVANTAGES.__args__, gsm.LOSS_TYPES.__args__
LEVELS = gsm.RATIO_LEVELS.__args__
LINES = json.loads((HERE / "results" / "gsm8k" / "graded_lines.json").read_text(encoding="utf-8"))
FULL = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>"
GSM_SOURCE = Path(gsm.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def problems():
    return gsm.make_problems(seed=0)


@pytest.fixture(scope="session")
def tokenizer(problems):
    return gsm.make_tokenizer(problems[0][:500])


def make_policy(vocab_size=450, seed=0, scale=1.0, kind="Qwen2", **changes):
    torch.manual_seed(seed)
    options = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, head_dim=8,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        ffn_dim=64, word_embed_proj_dim=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**options | changes)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    policy = getattr(transformers, name)(config)
    with torch.no_grad():
        policy.get_output_embeddings().weight *= scale
    return policy


def checkpoint(policy):
    new = getattr(policy, "activation_checkpointing_enable", None)  # renamed in transformers 5
    (new or policy.gradient_checkpointing_enable)({"use_reentrant": False})


class Words:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def __call__(self, texts, padding_side="left", **options):
        width = max(map(len, texts))
        ids = [[0] * (width - len(t)) + [2 + ord(c) % 8 for c in t] for t in texts]
        mask = [[0] * (width - len(t)) + [1] * len(t) for t in texts]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# Data ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("data, line", [
    (None, ""), (b"\n\n", ""), (b"[1]\n", "1:"), (b'{"question": ', "1:"), (b'"\xe9"', "1:"),
    (b'{"answer": "#### 1"}', "1:"), (b'{"question": "  ", "answer": "#### 1"}', "1:"),
    (b'{"question": "q", "answer": "18"}', "1:"), (b'{"question": 1, "answer": "#### 1"}', "1:"),
    (b'\n{"question": "q", "answer": "#### many"}', "2: .* no number .* 'many'.*README"),
], ids=lambda x: repr(x)[:40])  # fmt: skip
def test_bad_data_is_refused_with_file_and_line(tmp_path, data, line):
    if data is not None:
        (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises((ValueError, OSError), match=f"rows.jsonl.?:?{line}"):
        gsm.load_problems(tmp_path / "rows.jsonl")


def test_rows_keep_question_and_final_number(tmp_path, monkeypatch):
    row, path = {"question": "How\u2028many?", "answer": "2*3=6\n#### 1,080"}, tmp_path / "rows"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert gsm.load_problems(path) == [{"question": row["question"], "answer": "1,080"}]
    hub = {("openai/gsm8k", "main", "test"): [row]}
    datasets = SimpleNamespace(load_dataset=lambda name, part, split: hub[name, part, split])
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert gsm.load_problems(None, "test") == gsm.load_problems(path)


def test_erratum_8_the_prompt_is_the_tokenizers_own_template(tokenizer):
    """Another format than the model's own, and it does not know where its turn ends."""
    assert gsm.build_prompt("How many?", tokenizer) == (
        f"<|im_start|>system\n{gsm.SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert gsm.format_reward([gsm.SYSTEM_PROMPT]) == pytest.approx([0.8])  # it names every tag
    assert gsm.extract_answer_from_model_output(gsm.SYSTEM_PROMPT) is None  # no credit for echoing
    with pytest.raises(ValueError):
        gsm.build_prompt("How many?", transformers.Qwen2Tokenizer())


@needs_gsm8k
def test_erratum_8_93_gold_answers_have_a_comma():
    train, test = (gsm.load_problems(f"{GSM8K}/{split}.jsonl") for split in ("train", "test"))
    golds = [row["answer"] for row in train + test]
    assert (len(train), len(test), sum("," in gold for gold in golds)) == (7473, 1319, 93)
    assert all(gsm.parse_number(gold) == int(gold.replace(",", "")) for gold in golds)


# Outcome rewards ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text, answer", [
    ("<answer>\n 5 \n</answer>", "5"), ("<answer>4</answer> no, <answer>5</answer> done", "5"),
    ("5", None), ("5</answer>", None), ("<answer>5", None), ("<answer></answer>", None), ("", None),
    ("<answer> ... </answer>", None), ("</answer>5<answer>", None),
    ("<answer>4</answer><answer>5", None), ("so 2*3=6\n#### 6 ", "6"), ("#### \n", None),
])  # fmt: skip
def test_the_answer_is_what_stands_in_the_last_closed_tag(text, answer):
    kind = "dataset" if "#" in text else "model_output"
    assert getattr(gsm, f"extract_answer_from_{kind}")(text) == answer


def test_correctness_and_format_rewards():
    given = ["1,080", " 1,080\n", "1080", "$1080.00", "1081", "1,080 or 1,081", "many"]
    texts = [f"<answer>{x}</answer>" for x in given] + ["1,080"]
    answers = ["1,080"] * 6 + ["few", "1,080"]
    assert gsm.correctness_reward(texts, answers) == [2.0, 2.0, 1.5, 1.5, 0, 0, 0, 0]
    texts = ["", "<answer>", "</answer><answer>", full := FULL.format("", "1,080"), full + full]
    assert gsm.format_reward(texts) == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert gsm.combined_reward([full, "1,080"], ["1,080"] * 2) == pytest.approx([2.8, 0.0])


def test_step_ends_fall_on_the_right_tokens(tokenizer):
    """Against a plain search; the tokens are random, not what an encoder would make of the text."""
    draw, pieces = random.Random(0), [*"2* 3=6\né🙂x", "<answer>", "</answer>", "<|im_end|>"]
    pieces = [gsm.encode(tokenizer, [piece])[0][0].tolist() for piece in pieces]
    assert max(map(len, pieces)) == 4
    ends_of = [tokenizer.eos_token_id]
    for _ in range(200):
        ids = [token for piece in draw.choices(pieces, k=draw.randrange(1, 40)) for token in piece]
        begun = (gsm.decode_tokens(tokenizer, ids[: n + 1], ends_of) for n in range(len(ids)))
        *_, text = begun = list(begun)
        ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
        steps = [(end, i % 2) for i, end in enumerate(ends)] + [(len(text), 0.5)]
        hits = [[x[:end] == text[:end] for x in begun].index(True) for end in ends]
        wanted = [(hit, i % 2) for i, hit in enumerate(hits)] + [(len(ids) - 1, 0.5)]
        assert gsm.locate_steps(steps, ids, tokenizer, ends_of) == wanted


# Sampling -----------------------------------------------------------------------------------------
def test_the_mask_ends_with_the_first_of_several_end_tokens():
    """(!1): the end token stays inside, though it may be the pad token, or none is learned."""
    ids = torch.tensor([[5, 6, 0, 0], [5, 3, 0, 7], [5, 6, 7, 8], [0, 5, 5, 5]])
    mask = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert gsm.create_completion_mask(ids, [0, 3]).tolist() == mask


def test_erratum_8_samples_come_from_the_distribution_that_is_scored():
    """Under a generation_config that would cut it to two tokens. χ² of 20,000 samples against
    softmax(logits / T); 99.99 % of honest samplers stay below the bound."""
    policy, G, T = make_policy(10, scale=2.0), 20_000, 0.7
    policy.generation_config.update(do_sample=True, top_k=2, top_p=0.5, repetition_penalty=1.5)
    arguments = policy, Words(), ["abc"], G, 1, T
    ids, _, tokens, *_ = gsm.generate_completions(*arguments, generator=seeded())
    expected = G * (policy(ids[:1]).logits[0, -1] / T).softmax(-1)
    chi_squared = ((tokens[:, 0].bincount(minlength=10) - expected) ** 2 / expected).sum().item()
    assert chi_squared < 9 + 4 * math.sqrt(2 * 9)
    for temperature in (0, 1):  # on a GPU a device-side assert, which names no cause
        with pytest.raises(FloatingPointError):
            gsm.sample_tokens(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), temperature)


@pytest.mark.parametrize("kind", ["Qwen2", "GPT2"])
@pytest.mark.parametrize("decoder", [None, "sdpa", "eager"])
def test_left_padding_and_cache_change_no_log_probability(kind, decoder):
    """Each row alone, without padding or cache, has the log-probabilities that it was sampled with,
    also in changed weights and after NaN. Learned positions show whether padding counts."""
    policy, prompts, T = make_policy(10, scale=2.0, kind=kind).eval(), ["a", "bcdefgh", "hg"], 0.7
    if kind == "GPT2":
        policy.transformer.wpe.weight.data *= 50
    if decoder:
        policy.set_attn_implementation(decoder)
        decoder = gsm.GraphDecoder()
    for texts in (["hg"], *[["abcdefghi"] * 3] * 9, ["abcdefghi" * 20] * 3):
        gsm.generate_completions(policy, Words(), texts, 8, 40, T, decoder=decoder)
    policy.base_model.get_input_embeddings().weight.data *= 1.5
    for x in getattr(decoder, "keys_values", ()):
        x.fill_(math.nan)
    options = dict(generator=seeded(), decoder=decoder, temperature=T)
    sampled = gsm.generate_completions(policy, Words(), prompts, 8, 12, **options)
    ids, mask, completions, kept, log_probs = sampled
    assert len(ids) == 24 and kept.sum(-1).unique().numel() > 3
    whole, whole_mask = torch.cat([ids, completions], 1), torch.cat([mask, kept], 1)
    together = gsm.compute_log_probs(policy, whole, whole_mask, completions.shape[1], T)
    for row in range(24):
        prompt, n = ids[row][mask[row] == 1], kept[row].sum()
        assert torch.equal(prompt, Words()([prompts[row // 8]])["input_ids"][0])
        logits = policy(torch.cat([prompt, completions[row, :n]])[None]).logits[0] / T
        alone = logits[len(prompt) - 1 : -1].log_softmax(-1)[range(n), completions[row, :n]]
        for found in (together, log_probs):
            assert torch.allclose(found[row, :n], alone, atol=1e-5)
        assert (log_probs[row, n:] == 0).all() and (completions[row, n:] == 0).all()


# Log-probabilities --------------------------------------------------------------------------------
def test_log_probs_and_their_gradient_are_those_of_the_whole_table():
    """(!4): chunks, recomputation, shift by one, temperature: against all of log_softmax."""
    policy, T = make_policy(40).double(), 0.8
    ids, mask = torch.randint(40, (3, 11), generator=seeded()), torch.ones(3, 11, dtype=torch.long)
    mask[1, :3] = 0
    positions, weights = (mask.cumsum(-1) - 1).clamp(min=0), torch.randn(3, 6, generator=seeded(1))
    logits = policy(ids, attention_mask=mask, position_ids=positions).logits.float()
    expected = (logits / T).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, -6:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), list(policy.parameters()))
    for chunk in (1, 5, 1000):
        log_probs = gsm.compute_log_probs(policy, ids, mask, 6, T, chunk)
        assert log_probs.dtype == torch.float32 and torch.allclose(log_probs, expected, atol=1e-5)
        given = torch.autograd.grad((log_probs * weights).sum(), list(policy.parameters()))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, wanted))
    logits = 300 * logits.detach().bfloat16()
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # not in bfloat16
    assert torch.allclose(gsm.selective_log_softmax(logits, ids).double(), expected, atol=1e-4)
    with pytest.raises(RuntimeError):
        gsm.compute_log_probs(policy, ids, mask, 11)


def test_the_memory_of_log_probs_does_not_hold_the_whole_table():
    policy, kept, made, ids = make_policy(5000), [], [], torch.randint(5000, (4, 65))
    policy.get_output_embeddings().register_forward_hook(lambda *x: made.append(x[-1].shape[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape[-1:]) or x, id):
        gsm.compute_log_probs(policy, ids, torch.ones_like(ids), 64, chunk=16)
    assert kept and (5000,) not in kept and made == [16] * 16


# Checkpoints of other kinds ----------------------------------------------------------------------
FOR, SYSTEM = "{% for m in messages %}", "messages[0]['role'] == 'system'"
RAISES = "{% if " + SYSTEM + " %}{{ raise_exception('no') }}{% endif %}" + gsm.CHAT_TEMPLATE
DROPS = gsm.CHAT_TEMPLATE.replace(FOR, "{% for m in messages if m['role'] != 'system' %}")
THINKS = gsm.CHAT_TEMPLATE + "{% if enable_thinking|default(true) %}<think>{% endif %}"


@pytest.mark.parametrize("template", [RAISES, DROPS, THINKS], ids=["raises", "drops", "thinks"])
@pytest.mark.parametrize("example_turn", [False, True])
def test_templates_without_a_system_role_and_with_thinking(tokenizer, template, example_turn):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    prompt = gsm.build_prompt("How many?", tokenizer, example_turn)
    assert prompt.count(gsm.SYSTEM_PROMPT) == 1 and prompt.count("How many?") == 1
    assert prompt.endswith("<|im_start|>assistant\n")
    assert prompt.count(f"{gsm.EXAMPLE_ANSWER}<|im_end|>") == example_turn
    first = gsm.EXAMPLE_QUESTION if example_turn else "How many?"
    joined = f"<|im_start|>user\n{gsm.SYSTEM_PROMPT}\n\n{first}<|im_end|>"
    assert (joined in prompt) == (template != THINKS)


def test_the_end_of_a_turn_in_the_template_ends_a_completion(tokenizer):
    base = copy.deepcopy(tokenizer)
    base.add_special_tokens({"eos_token": "<|endoftext|>"})
    policy = make_policy(10, eos_token_id=base.eos_token_id)
    policy.generation_config.eos_token_id = None
    ends = sorted([base.eos_token_id, base.convert_tokens_to_ids("<|im_end|>")])
    assert gsm.get_eos_token_ids(policy, base) == ends and len(ends) == 2


def test_tags_that_are_special_tokens_stay_in_the_text(tokenizer):
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": [*gsm.TAGS]})
    text = FULL.format("2*3 = 6", 6)
    ids = special(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert special.decode(ids, skip_special_tokens=True) != text
    decoded = gsm.decode_tokens(special, ids, [special.eos_token_id])
    assert decoded == text and gsm.combined_reward([decoded], ["6"]) == [2.8]


@pytest.mark.parametrize("kind, changes, good", [
    ("Qwen2", {}, True), ("Llama", {}, True), ("OPT", {}, True), ("Mixtral", {}, True),
    ("Gemma2", {}, False), ("Granite", {"logits_scaling": 8.0}, False),
    ("Cohere", {"logit_scale": 0.0625}, False), ("Gemma2", {"final_logit_softcapping": None}, True),
])  # fmt: skip
def test_a_head_that_is_more_than_a_product_is_refused(kind, changes, good):
    model = make_policy(kind=kind, **changes).eval()
    if good:
        return gsm.check_model(model)
    with pytest.raises(ValueError, match=f"{kind}ForCausalLM.*capped or scaled"):
        gsm.check_model(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, changes", [
    ("Qwen2", {"attention_dropout": 0.5}), ("OPT", {"dropout": 0.5, "attention_dropout": 0.5}),
    ("OPT", {"layerdrop": 0.9}), ("GPT2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    ("Mixtral", {"router_jitter_noise": 0.5}),
])  # fmt: skip
def test_no_dropout_nor_other_noise_in_training(kind, changes, checkpointing):
    policy = make_policy(kind=kind, **changes).train()
    if checkpointing:
        checkpoint(policy)
    rollout = make_rollout(policy)
    _, metrics = update(policy, rollout, gradient_checkpointing=checkpointing, lr=0.0)
    assert metrics["logprob_gap"] < 1e-5


# Own tasks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("returned", [
    None, 5.0, [1.0], [1.0, math.nan], [1.0, None], torch.zeros(2, 3), ["a", "b"],
], ids=str)  # fmt: skip
def test_a_reward_function_that_returns_something_else_is_named(returned):
    def my_reward(completions, answers):
        return returned

    with pytest.raises(ValueError, match="my_reward must return 2 finite numbers"):
        gsm.checked_rewards(my_reward, ["a", "b"], ["1", "2"])
    assert gsm.checked_rewards(lambda x: torch.tensor([1, 2.5]), ["a", "b"]) == [1.0, 2.5]


# What a user sees ---------------------------------------------------------------------------------
def test_a_gpu_without_bfloat16_computes_in_float32(start_folder, monkeypatch):
    cuda = dict(is_available=True, set_device=None, is_bf16_supported=False)
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value, **o: value)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a: self)
    monkeypatch.setattr(gsm, "check_model", lambda model: None)
    model, _ = gsm.load_model(gsm.Settings(model=str(start_folder / "model")))
    assert model.dtype == torch.float32


def test_the_second_of_two_runs_in_a_folder_is_refused(start_folder, tmp_path, monkeypatch, capsys):
    config, load = tmp_path / "config.json", gsm.load_model
    begin = lambda settings: config.write_text("the other's") and load(settings)  # noqa: E731
    monkeypatch.setattr(gsm, "load_model", begin)
    status, line = refused(flags(start_folder, tmp_path), capsys)
    assert status == 2 and f"File exists: '{config}'" in line and config.stat().st_size == 11


def test_the_readmes_own_task_and_use_of_a_final_model_run_as_printed(start_folder, tmp_path):
    own, use = re.findall(r"```python\n(.*?)```", README, re.S)[::-1]
    data = tmp_path / "capitals.jsonl"
    data.write_text((json.dumps({"question": "Capital?", "answer": "Paris"}) + "\n") * 8)
    (tmp_path / "own.py").write_text(own)
    options = dict(num_steps=1, num_iterations=1, batch_size=2, train_file=data, eval_file=data)
    run = tmp_path / "runs/gsm8k"
    in_shell(str(tmp_path / "own.py"), *flags(start_folder, run, **options))
    assert read(run / "eval.jsonl")[0]["examples"] == 5
    assert read(run / "samples.jsonl")[0]["answer"] == "Paris"
    assert in_shell("-c", use.replace("runs/gsm8k", str(run))).strip()


# Advantages ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_advantages_are_those_of_the_first_file(mode):
    """… which are compared with plain Python. (!3): equal rewards teach exactly nothing."""
    groups = [[2.8, 0.8, 0.8, 0.0, 0.6, 0.0, 0.8], [0.0, 0.0, 0.6, 0.0, 0.0, 0.0, 0.0]]
    groups = torch.tensor(groups + [[reward] * 7 for reward in (0.0, 0.1, 0.6, 0.8, 2.8)])
    given = gsm.compute_advantages(groups, mode)
    other = next(x for x in gs.DELTAS if mode in x)
    assert torch.allclose(given, gs.compute_deltas(groups, other), rtol=1e-3)
    assert (given[2:] == 0).all()


STEPS = [[(1, 1.0), (3, 0.0)], [(4, 1.0)], [(0, 0.0), (2, 1.0), (4, 1.0)], [(2, 0.0)]]
NAN, INF = math.nan, math.inf
MASK = (torch.arange(5) < torch.tensor([4, 5, 5, 2])[:, None]).long()


def test_process_advantages_sum_the_normalised_rewards_of_later_steps():
    rewards = [reward for row in STEPS for _, reward in row]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards) + 1e-4
    scores = [[(end, (reward - mean) / std) for end, reward in row] for row in STEPS]
    expected = [[sum(x for end, x in row if end >= t) for t in range(5)] for row in scores]
    given = gsm.compute_process_advantages(STEPS, MASK)
    assert torch.allclose(given, torch.tensor(expected) * MASK, atol=1e-5)
    others = [[(end, 5 * reward + 3) for end, reward in row] for row in STEPS[::-1]]
    both = gsm.compute_process_advantages(STEPS + others, torch.cat([MASK, MASK.flip(0)]), 4)
    assert torch.equal(both[:4], given) and torch.allclose(both[4:], given.flip(0), atol=1e-3)
    assert not gsm.compute_process_advantages([[(0, 0.7)], [(1, 0.7), (2, 0.7)]], MASK[:2]).any()


# The loss -----------------------------------------------------------------------------------------
def random_step(rows=4, length=6, seed=0, per_token=False, dtype=torch.float64):
    """log_probs, old and ref_log_probs, advantages, mask; off policy, the last row is empty."""
    x = torch.rand(4, rows, length, generator=seeded(seed), dtype=dtype)
    log_probs, advantages = -3 * x[0], 2 * x[1] - 1 if per_token else 2 * x[1, :, 0] - 1
    old, reference = log_probs + 0.6 * (x[2] - 0.5), log_probs + x[3] - 0.5
    mask = (torch.arange(length) < torch.tensor([length, 2, 4, 0])[:rows, None]).long()
    return log_probs.requires_grad_(), old, reference, advantages, mask


def loss_by_hand(step, kind, level, epsilon, high, beta, estimator, constant, items):
    rows = []
    for lp, op, rp, a, m in zip(*step):
        n, tokens = int(m.sum()), []
        for t in range(n):
            ratio = ((lp - op)[:n].mean() if level == "sequence" else lp[t] - op[t]).exp()
            A = a[t] if a.dim() else a
            if kind == "cispo":
                token = -min(ratio.item(), 1 + high) * A * lp[t]
            else:
                clipped = min(max(ratio, lp.new_tensor(1 - epsilon)), lp.new_tensor(1 + high))
                token = -min(ratio * A, clipped * A)
            k3 = (rp[t] - lp[t]).exp() - (rp[t] - lp[t]) - 1
            weight = (lp[t] - op[t]).exp() if estimator == "k3_weighted" else 1  # its own ratio
            tokens.append(token + beta * k3 * weight)
        rows.append(tokens)
    if kind == "grpo":
        return sum(sum(tokens) / len(tokens) for tokens in rows if tokens) / len(rows)
    normaliser = len(rows) * constant if kind == "dr_grpo" else items or sum(map(len, rows))
    return sum(map(sum, rows)) / normaliser


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta, estimator, high, items, per_token", [
    (0, "k3", 0.1, None, False), (0.3, "k3", 0.25, 29, True), (1, "k3_weighted", None, 29, False),
])  # fmt: skip
def test_the_loss_is_its_formula(kind, level, beta, estimator, high, items, per_token):
    step = random_step(per_token=per_token)
    ours, _ = gsm.grpo_loss(
        *step, epsilon=0.1, epsilon_high=high, beta=beta, loss_type=kind, kl_estimator=estimator,
        importance_sampling_level=level, max_completion_length=9, num_items=items,
    )  # fmt: skip
    by_hand = loss_by_hand(step, kind, level, 0.1, high or 0.1, beta, estimator, 9, items)
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-9)
    assert torch.allclose(*(torch.autograd.grad(loss, step[0])[0] for loss in (ours, by_hand)))


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_neither_padding_nor_micro_batches_change_the_loss(kind, level):
    """(!5): the two invariances that catch wrong normalisers; the padding may hold anything."""
    *step, advantages, mask = everything = [x.detach() for x in random_step()]
    options = dict(loss_type=kind, importance_sampling_level=level, kl_estimator="k3_weighted")
    options["max_completion_length"] = 9
    loss, metrics = gsm.grpo_loss(*everything, **options)
    garbage = torch.tensor([math.inf, -math.inf, math.nan]).expand(4, 3)
    wide = [torch.cat([x, garbage], dim=1).requires_grad_() for x in step]
    wide_mask = torch.cat([mask, torch.zeros_like(garbage)], dim=1)
    padded, padded_metrics = gsm.grpo_loss(*wide, advantages, wide_mask, **options)
    padded.backward()
    assert padded.item() == pytest.approx(loss.item()) and torch.isfinite(wide[0].grad).all()
    assert all(torch.allclose(padded_metrics[name], metrics[name]) for name in metrics)
    options |= dict(num_items=mask.sum().item(), num_rows=4)
    parts = [gsm.grpo_loss(*(x[r] for x in everything), **options)[0] for r in ([0, 2], [1], [3])]
    assert sum(parts).item() == pytest.approx(loss.item())
    loss, metrics = gsm.grpo_loss(*step, advantages, mask * 0, **options | dict(num_items=None))
    assert loss == 0 and all(math.isfinite(x) for x in metrics.values())


def test_the_metrics_count_what_the_clip_cuts():
    ratio = torch.tensor([[0.5, 0.5, 1.0, 1.5, 1.5, 9.0]])
    advantages, mask = torch.tensor([[-1.0, 1, 1, 1, -1, 1]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    step = ratio.log(), torch.zeros(1, 6), ratio.log() + math.log(2), advantages, mask
    names = "clip_fraction_low", "clip_fraction_high", "ratio", "kl"
    metrics = gsm.grpo_loss(*step, beta=0.1)[1]  # 0.5 with −1, 1.5 with +1
    assert [metrics[n].item() for n in names] == pytest.approx([1 / 5, 1 / 5, 1, 1 - math.log(2)])
    metrics = gsm.grpo_loss(*step, beta=0, loss_type="cispo")[1]
    assert [metrics[n].item() for n in names[:3]] == pytest.approx([0, 2 / 5, 1])


@pytest.mark.parametrize("function, change", [
    *((gsm.grpo_loss, change) for change in (
        *(dict(loss_type=x) for x in ("ppo", "dr_grpo")), dict(importance_sampling_level="word"),
        dict(kl_estimator="k4"), dict(ref_log_probs=None), dict(ref_log_probs=torch.zeros(4, 1)),
        dict(old_log_probs=torch.zeros(4, 1)), dict(advantages=torch.zeros(4, 1)),
        dict(advantages=torch.zeros(3)), dict(completion_mask=torch.zeros(1, 6)))),
    *((gsm.compute_advantages, dict(rewards=torch.zeros(x))) for x in [(3, 1), 3, (2, 3, 4)]),
    *((gsm.compute_advantages, dict(rewards=torch.tensor([[0.0, x]]))) for x in (NAN, -INF)),
    (gsm.compute_advantages, dict(rewards=torch.zeros(3, 2), mode="best")),
    *((gsm.compute_process_advantages, dict(step_rewards=x, completion_mask=MASK[:n])) for x, n in [
        (STEPS, 3), ([[(19, 1.0)], [], [], []], 4), ([[(0, NAN)], [], [], []], 4)]),
])  # fmt: skip
def test_what_does_not_fit_is_refused(function, change):
    names = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "completion_mask")
    step = dict(zip(names, random_step())) if function is gsm.grpo_loss else {}
    with pytest.raises(ValueError):
        function(**step | change)


@pytest.mark.parametrize("kind", (*LOSS_TYPES, "bnpo"))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta, estimator", [(0.0, "k3"), (0.3, "k3"), (0.3, "k3_weighted")])
def test_erratum_7_the_loss_is_that_of_trl(kind, level, beta, estimator):
    """TRL's own _compute_loss (1.16), with a stub for a trainer. bnpo is dapo without num_items."""
    trl, mock = pytest.importorskip("trl"), pytest.importorskip("unittest.mock")
    log_probs, old, reference, advantages, mask = random_step()
    theirs_in = log_probs.detach().clone().requires_grad_()
    stub = mock.MagicMock(
        loss_type=kind, importance_sampling_level=level, beta=beta, max_completion_length=9,
        # TRL's cispo takes the ceiling of the weight itself, ours is 1 + epsilon_high
        epsilon_low=0.1, epsilon_high=1.3 if kind == "cispo" else 0.3, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics={"eval": mock.MagicMock()},
    )  # fmt: skip
    stub._get_per_token_logps_and_entropies.return_value = theirs_in, theirs_in.detach(), None
    assert trl.GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default  # k3_weighted
    stub.args.use_bias_correction_kl = estimator == "k3_weighted"
    stub.args.delta, stub.model.training = None, False
    stub.accelerator.num_processes, stub.accelerator.gather = 1, lambda x: x
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), mask)
    inputs |= dict(advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference)
    inputs["num_items_in_batch"] = torch.tensor(29)
    theirs = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    ours, _ = gsm.grpo_loss(
        log_probs, old, reference, advantages, mask, epsilon=0.1, epsilon_high=0.3, beta=beta,
        loss_type=kind.replace("bnpo", "dapo"), importance_sampling_level=level,
        kl_estimator=estimator, max_completion_length=9, num_items=None if kind == "bnpo" else 29,
    )  # fmt: skip
    (theirs + ours).backward()
    if level == "sequence" and estimator == "k3_weighted":  # other versions may have mended it
        assert trl.__version__[:4] != "1.16" or ours.item() != pytest.approx(
            theirs.item(), rel=1e-6
        )
        return
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(log_probs.grad, theirs_in.grad, rtol=1e-9, atol=1e-12)


def test_erratum_10_k3_is_weighted_by_the_ratio_of_its_own_token():
    """By enumeration of two tokens, samples from π_old: the gradient is that of KL(π ‖ π_ref)."""
    logits, old, ref = torch.randn(3, 2, 3, generator=seeded(), dtype=torch.float64)
    tables = [x.log_softmax(-1) for x in (logits.requires_grad_(), old, ref)]
    kl = (tables[0].exp() * (tables[0] - tables[2])).sum() / 2  # a token
    wanted = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    pairs = torch.tensor([*itertools.product(range(3), repeat=2)])  # [row pos]
    policy, old, ref = (table[range(2), pairs] for table in tables)  # log π, each [row pos]
    advantages = (9 * old.sum(-1).exp()).detach()  # used as weights: ∂/∂ratio of nothing else
    for level in ("token", "sequence"):
        options = dict(kl_estimator="k3_weighted", importance_sampling_level=level, beta=1.0)
        rows = [gsm.grpo_loss(*(x[[i]] for x in (policy, old, ref)), torch.zeros(1),
                              torch.ones(1, 2), **options)[0] for i in range(9)]  # fmt: skip
        loss = (torch.stack(rows) * advantages / 9).sum()
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        assert torch.allclose(gradient, wanted, atol=1e-9), level
    k3, mean_ratio = (ref - policy).exp() - (ref - policy) - 1, (policy - old).mean(-1).exp()
    wrong = (advantages * mean_ratio * k3.sum(-1)).sum() / 9 / 2
    gradient = torch.autograd.grad(wrong, logits)[0]
    assert (gradient - wanted).norm() > 0.1 * wanted.norm()


def test_the_second_worked_example_is_what_the_functions_give():
    """And the most asked question, why the loss is 0: its gradient is −advantage / tokens."""
    steps = ("48/2 = 24\n48+24 = 72", "48/2 = 24\n48+24 = 73", "48/2 = 26\n48+26 = 74")
    texts = [FULL.format(step, step[-2:]) for step in steps] + ["72"]
    rewards = torch.tensor([gsm.combined_reward(texts, ["72"] * 4)])
    table = {mode: gsm.compute_advantages(rewards, mode)[0].tolist() for mode in MODES}
    table |= {"reward": rewards[0].tolist(), "format": gsm.format_reward(texts)}
    table |= {"correctness": gsm.correctness_reward(texts, ["72"] * 4)}
    ends = [[(end - 1, r) for end, r in gsm.step_rewards(text, "72")] for text in texts]
    process = gsm.compute_process_advantages(ends, torch.ones(4, 80))  # a character a token
    table["step rewards"] = [r for row in ends for _, r in row]
    table["process"] = [process[i, end].item() for i, row in enumerate(ends) for end, _ in row]
    found = dict(re.findall(r"(?m)^(\w+|step rewards)  +([-\d. ]+)", gsm.EXAMPLE))
    for name in {*table} - {"batch_normalized"}:
        numbers = [float(x) for x in found.pop(name).split()]
        assert numbers == pytest.approx(table[name], abs=0.051 if name == "process" else 0.006)
    assert {*found} == {"answer", "reasoning"}
    assert f"mean {rewards.mean():.2f}, std {rewards.std():.2f}" in gsm.EXAMPLE
    x, advantages = torch.zeros(4, 5, requires_grad=True), torch.tensor(table["normalized"])
    loss, _ = gsm.grpo_loss(x, x, None, advantages, torch.ones(4, 5), beta=0)
    gradient, wanted = torch.autograd.grad(loss, x)[0], -advantages[:, None].expand(4, 5) / (4 * 5)
    assert abs(loss.item()) < 1e-6 and torch.allclose(gradient, wanted)


# Evaluation ---------------------------------------------------------------------------------------
def test_evaluation_counts_strict_and_lenient(tokenizer, monkeypatch):
    texts = [FULL.format("", 7), "<answer>\n5\n</answer> 6", "it is 5"]
    texts = [text + "<|im_end|>" for text in texts] + ["it is 8", FULL.format("", 3) + " and"]
    rows = [{"question": "?" * (9 - i), "answer": str(7 - i)} for i in range(5)]
    written = {gsm.build_prompt(r["question"], tokenizer): text for r, text in zip(rows, texts)}

    def generate(model, tokenizer, prompts, *options, temperature, decoder):
        assert len(prompts) <= 2 and options == (1, 50) and temperature == 0
        return None, None, *gsm.encode(tokenizer, [written[x] for x in prompts], "right"), None

    monkeypatch.setattr(gsm, "generate_completions", generate)
    result = gsm.evaluate_model(make_policy(), tokenizer, rows, 50, 2)
    length = statistics.mean(gsm.encode(tokenizer, [text])[0].shape[1] for text in texts)
    expected = dict(examples=5, strict=2 / 5, lenient=3 / 5, format=2 / 5, finished_fraction=3 / 5)
    expected |= dict(strict_low=0.1176, strict_high=0.7693, mean_length=length)  # statsmodels'
    assert result == pytest.approx(expected, abs=1e-4)


# The graders -------------------------------------------------------------------------------------
def judge(line):
    """The verdict on one line of finished reasoning: 1.0, 0.0, or None where it is left alone."""
    steps = gsm.step_rewards(f"<reasoning>\n{line}\n</reasoning>\n<answer>7</answer>", "7")
    assert len(steps) <= 2 and steps[-1][1] == 1.0
    return steps[0][1] if len(steps) == 2 else None


@pytest.mark.parametrize("text, number", LINES["answers"])
def test_an_answer_is_a_number_by_the_grammar_or_none(text, number):
    assert gsm.parse_number(text) == (None if number is None else Fraction(number))


def test_the_last_number_of_a_text():
    texts = "1,080, I think; It is $1,080.; 5 - 7 = -2; 3/4 of it; **18**; none; x = 9 apples"
    wanted = [1080, 1080, -2, Fraction(3, 4), 18, None, 9]
    assert [gsm.last_number(text) for text in texts.split("; ")] == wanted


@pytest.mark.parametrize("line, label", LINES["steps"])
def test_no_line_is_blamed_or_praised_falsely(line, label):
    assert judge(line) in {"right": (1.0, None), "wrong": (0.0, None), "leave": (None,)}[label]


@pytest.mark.parametrize("text", LINES["cut"])
def test_a_completion_cut_in_the_middle_of_a_number_is_not_judged(text):
    """12 * 15 = 18 may go on as 180. With a line end after it, it is what it says."""
    assert gsm.step_rewards(f"<reasoning>\n{text}", "7")[:-1] == []


def test_steps_are_lines_of_the_reasoning_and_the_answer():
    text = (
        "<reasoning>\nI think.\n\\(2\\times3 = **6**\\)\nThen 6+1 = 8, 1+1 = 2.\n"
        "6+1=<<6+1=7>>7\n</reasoning>\n1+1 = 3\n<answer>7</answer> bye"
    )
    steps = gsm.step_rewards(text, "7")
    assert [reward for _, reward in steps] == [1.0, 0.0, 1.0, 1.0]
    ends = [text[:end].split("\n")[-1] for end, _ in steps]
    shown = ["\\(2\\times3 = **6**\\)", "Then 6+1 = 8, 1+1 = 2.", "6+1=<<6+1=7>>7"]
    assert ends == [*shown, "<answer>7</answer> bye"]
    assert gsm.step_rewards("<answer>1080</answer>", "1,080") == [(21, 0.75)]
    assert gsm.step_rewards("", "7") == [(0, 0.0)]


def test_arithmetic_is_that_of_python_on_random_expressions():
    draw = random.Random(0)
    for _ in range(300):
        numbers = [str(draw.randrange(1, 20)) for _ in range(draw.randrange(2, 7))]
        text = "".join(draw.choice("+-*") + number for number in numbers)[1:]
        exact = eval(text)
        assert judge(f"{text} = {exact}") == 1.0 and judge(f"{text} = {exact + 1}") == 0.0, text
    lines = "7/2 = 3.5", "100/3 = 33.33", "100/3 = 33.4", "2/3 = 0", "1+" * 900 + "1 = 901"
    assert [judge(line) for line in lines] == [1, 1, 0, None, 1]


@needs_gsm8k
@pytest.mark.parametrize("split", ["train", "test"])
def test_step_checker_on_the_reasoning_of_gsm8k(split):
    """A mistake planted in the last result of a line counts as caught only if it is judged."""
    draw, verdicts, spoiled = random.Random(0), [], []
    for row in Path(GSM8K, f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        text = re.sub("<<.*?>>", "", json.loads(row)["answer"].partition("\n####")[0])
        for line in (line for line in text.split("\n") if "=" in line):
            verdicts.append(judge(line))
            wrong = lambda m: m[1] + str(int(m[2]) + draw.choice([1, 2, 10]))  # noqa: E731
            planted = re.sub(r"(.*=\s*\$?\s*)([0-9]+)(?![0-9,])", wrong, line, count=1)
            if verdicts[-1] == 1 and planted != line:
                spoiled.append(judge(planted))
    judged = [x for x in verdicts if x is not None]
    share, caught = len(judged) / len(verdicts), spoiled.count(0) / len(spoiled)
    blamed = judged.count(0) / len(judged)
    print(f"{split}: judged {share:.4f}, blamed {blamed:.5f}, caught {caught:.4f}")
    assert share >= 0.6 and blamed <= 0.002 and caught >= 0.97 and len(spoiled) > 2000


HOSTILE = "9|1,|1=|(|(1|(1+1)=|\\frac{|\\boxed{|<|<<|<answer>|.|-|<reasoning>|\ud800|1/|٣|$|1%|*|**"
HOSTILE += "|1:|+=|1+|1.1|half|x| |1 |= =|\n|\t|1=1\n|1+1=2 |1 apple * |1 of |1\u202f"


@pytest.mark.parametrize("piece", HOSTILE.split("|"))
def test_hostile_text_is_linear_and_raises_nothing(piece):
    def seconds(size):
        text, started = piece * (size // len(piece)), time.process_time()
        block = "\n".join([piece * (1990 // len(piece))] * (size // 1990))
        for hostile in (text, f"1{text}a", f"{text}1 = 2", block):
            assert gsm.parse_number(hostile) is None and [gsm.last_number(hostile)]
            gsm.step_rewards(f"<reasoning>{hostile}</reasoning><answer>{hostile}</answer>", "7")
        return time.process_time() - started

    short = seconds(10_000)
    assert seconds(30_000) < 6 * short + 0.3  # three times the time, not nine


@pytest.fixture(scope="session")
def start_folder(tmp_path_factory, problems, tokenizer):
    folder = tmp_path_factory.mktemp("start")
    for name, rows in zip(("train", "test"), problems):
        text = "".join(json.dumps(row) + "\n" for row in rows[:60])
        (folder / f"{name}.jsonl").write_text(text)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    make_policy(len(tokenizer), scale=4.0, **ends).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:  # half the time of a run so short
        patch.setattr(gsm, "draw_curves", lambda *arguments: None)
        yield folder


# One step -----------------------------------------------------------------------------------------
def make_rollout(policy, seed=0, silent=()):
    """Three groups of four completions, as of generate_completions, and random advantages, or 0."""
    lot, prompts = torch.Generator().manual_seed(seed), ["abc", "abcdefgh", "a"]
    sampled = gsm.generate_completions(policy, Words(), prompts, 4, 12, generator=lot)
    advantages = torch.randn(sampled[3].shape, generator=lot) * sampled[3]
    for group in silent:
        advantages[group * 4 : group * 4 + 4] = 0
    return sampled, advantages


def make_settings(**changes):
    return gsm.Settings(**dict(beta=0.0, max_grad_norm=1e9, max_completion_length=12) | changes)


def update(policy, rollout, reference=None, lr=100.0, by_hand=False, sizes=None, **changes):
    """Plain gradient steps on a copy → (the change of all weights, what update_policy returns)"""
    moved, settings = copy.deepcopy(policy), make_settings(**changes)
    optimizer = torch.optim.SGD(list(moved.parameters()), lr=lr)
    optimizer.step = mock.Mock(wraps=optimizer.step)
    if by_hand:
        metrics = update_by_hand(moved, reference, optimizer, rollout, settings)
    else:
        sampled, advantages = rollout
        sizes = sizes or dict(num_rows=len(advantages), num_items=int(sampled[3].sum()))
        silent = settings.beta > 0
        batches = gsm.make_micro_batches(
            sampled, advantages, 4, settings.micro_batch_size, keep_silent=silent
        )
        reference = reference if settings.beta else None
        metrics = gsm.update_policy(moved, reference, optimizer, batches, settings, **sizes)
    metrics["steps"] = optimizer.step.call_count
    assert by_hand or all(p.grad is None for p in moved.parameters())  # for the next step
    pairs = zip(moved.parameters(), policy.parameters())
    return torch.cat([(a - b).detach().flatten() for a, b in pairs]), metrics


def update_by_hand(policy, reference, optimizer, rollout, settings):
    """The same without sharing prompts, trimming or splitting: all rows with their prompts and
    padding, one call of the loss"""
    (prompt_ids, prompt_mask, completions, mask, sampled), advantages = rollout
    whole = torch.cat([prompt_ids, completions], 1), torch.cat([prompt_mask, mask], 1)
    inputs = *whole, mask.shape[1], settings.temperature
    names = "epsilon epsilon_high beta loss_type importance_sampling_level kl_estimator".split()
    options = {name: getattr(settings, name) for name in [*names, "max_completion_length"]}
    old, ref = [gsm.compute_log_probs(x, *inputs).detach() for x in (policy, reference)]
    weight = (old - sampled).exp().clamp(max=settings.sampler_cap or 1e9)
    weight = weight if settings.sampler_cap else torch.ones_like(old)
    logged = []
    for _ in range(settings.mu):
        log_probs = gsm.compute_log_probs(policy, *inputs)
        loss, seen = gsm.grpo_loss(log_probs, old, ref, advantages * weight, mask, **options)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item()
        optimizer.step()
        clipped = (seen["clip_fraction_low"] + seen["clip_fraction_high"]).item()
        logged.append([loss.item(), clipped, norm, float(seen.get("kl", 0))])
    names = ("loss", "clip_fraction", "grad_norm", "kl")
    return dict(zip(names, map(statistics.fmean, zip(*logged))))


def agree(given, expected):
    (change, metrics), (other, numbers) = given, expected
    assert other.norm() > 0 and (change - other).norm() <= 1e-5 * other.norm()
    for name, number in numbers.items():
        assert (metrics[name] or 0.0) == pytest.approx(number or 0.0, rel=1e-4, abs=1e-6), name


OPTIONS = [
    *({"loss_type": kind} for kind in gsm.LOSS_TYPES.__args__),
    {"importance_sampling_level": "sequence", "temperature": 0.7},
    {"beta": 0.3, "max_grad_norm": 0.01},
    {"beta": 0.3, "kl_estimator": "k3_weighted", "mu": 2, "lr": 0.05},
    {"mu": 3, "lr": 0.3, "epsilon": 0.05, "epsilon_high": 0.1, "loss_type": "dapo"},
    {"sampler_cap": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_the_loss_on_all_rows_at_once(options):
    """Normalisers; an old policy that moves with µ (!6); settings that do not reach the loss."""
    policy, reference = make_policy(10, scale=2.0), make_policy(10, seed=1, scale=2.0)
    rollout = make_rollout(policy, silent=[1])
    if "sampler_cap" in options:  # a sampler that is not the scorer: ratios from 0.4 to 2.7
        noise = torch.rand(rollout[1].shape, generator=seeded(5)) * 2 - 1
        rollout[0][4].add_(noise * rollout[0][3])
    expected = update(policy, rollout, reference, by_hand=True, **options)
    assert (expected[1]["clip_fraction"] > 0.1) == (options.get("mu") == 3)
    for size in (1, 5, 100):
        given = update(policy, rollout, reference, micro_batch_size=size, **options)
        agree(given, expected)
        assert (given[1]["kl"] is None) == ("beta" not in options)


def test_silent_groups_cost_nothing_and_prompts_are_read_once(monkeypatch):
    policy, reference = make_policy(10), make_policy(10, seed=1)
    forward = mock.Mock(wraps=gsm.compute_group_log_probs)
    monkeypatch.setattr(gsm, "compute_group_log_probs", forward)
    for silent, beta, rows in (([0, 2], 0, 8), ([0, 1, 2], 0, 0), ([0, 1, 2], 0.1, 24 + 12)):
        rollout = make_rollout(policy, silent=silent)
        change, metrics = update(policy, rollout, reference, beta=beta, mu=2, micro_batch_size=3)
        assert sum(len(call.kwargs["mask"]) for call in forward.call_args_list) == rows
        assert change.any() == (rows > 0) and metrics["steps"] == 2 * (rows > 0)
        forward.reset_mock()
    monkeypatch.setattr(policy.model, "forward", read := mock.Mock(wraps=policy.model.forward))
    gsm.compute_group_log_probs(policy, torch.ones(5).long(), *torch.ones(2, 4, 7).long())
    shapes = [tuple(call.kwargs["input_ids"].shape) for call in read.call_args_list]
    assert shapes == [(1, 5), (4, 6)]


@pytest.mark.parametrize("config", [
    {}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "checkpointing",
], ids=str)  # fmt: skip
def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(config):
    policy = make_policy(10, scale=2.0, **({} if config == "checkpointing" else config))
    if config == "checkpointing":
        checkpoint(policy)
        gsm.switch_on_checkpointing(policy)
    prompt, parameters = torch.randint(2, 10, (7,), generator=seeded()), [*policy.parameters()]
    for width in (1, 6):
        completions = torch.randint(2, 10, (5, width), generator=seeded(1))
        mask = torch.ones_like(completions)
        mask[3, 4:] = 0  # padding: 0, without a gradient
        ids = torch.cat([prompt.expand(5, -1), completions], dim=1)
        alone = policy(ids).logits[:, 6:-1].log_softmax(-1).gather(-1, completions[..., None])
        both = alone[..., 0] * mask, gsm.compute_group_log_probs(policy, prompt, completions, mask)
        assert torch.allclose(*both, atol=1e-5)
        weights = torch.randn(5, width, generator=seeded(2))
        gradients = [torch.autograd.grad((x * weights).sum(), parameters) for x in both]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_a_hint_when_the_format_is_learned_and_the_answers_are_not(capsys):
    record = dict(reward_std=0.1, logprob_gap=0.0, format=0.8, accuracy=0.05)
    sample = {"question": "q", "answer": "1", "completions": [{"reward": 1.0, "text": "a\nb\x1b"}]}
    gsm.comment_on(10, [record] * 10, sample)
    gsm.comment_on(31, [record | dict(accuracy=0.2)] * 10, sample)
    hint, *shown = capsys.readouterr().out.split("\n")
    assert hint.endswith("may help: --example-turn, --advantage centered, --loss-type dapo")
    assert shown == ["", "step 31: q (answer: 1)", "  reward 1.0: a", "    b\\x1b", ""]


def test_every_epoch_is_a_new_order_of_all_rows():
    drawn = [i for step in range(10) for i in gsm.step_indices(step, 3, 10, seed=0)]
    epochs = {tuple(drawn[i : i + 10]) for i in (0, 10, 20)}
    assert len(epochs) == 3 and all(sorted(epoch) == list(range(10)) for epoch in epochs)


WRITTEN = [("2*3 = 6\n6+1 = 7", 7), ("2*3 = 6\n6+1 = 8", 8), ("2*3 = 7\n7+1 = 8", 8)]
TEXTS = [FULL.format(*line) + "<|im_end|>" for line in WRITTEN]
TEXTS += ["<answer>\n7\n</answer>"] * 3
TWO = [{"question": "first", "answer": "7"}, {"question": "second", "answer": "7"}]


def write_texts(tokenizer, problems, mode):
    """The rollout of a model that writes TEXTS, every token with probability 1/√e."""
    options = dict(add_special_tokens=False, padding=True, padding_side="right")
    ids, mask = (torch.tensor(x) for x in tokenizer(TEXTS, **options).values())

    def generate(model, tokenizer, prompts, *arguments, **options):
        rows = slice(0 if "first" in prompts[0] else 3, 6 if "second" in prompts[-1] else 3)
        prompt = torch.full((3 * len(prompts), 2), 5)
        return prompt, torch.ones_like(prompt), ids[rows], mask[rows], -0.5 * mask[rows]

    policy, settings = make_policy(9), make_settings(num_generations=3, **mode)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsm, "generate_completions", generate)
        return gsm.collect_rollout(policy, tokenizer, problems, settings, None)


@pytest.mark.parametrize("supervision", ["outcome", "process"])
def test_rewards_reach_the_tokens_that_earned_them(tokenizer, supervision):
    options = dict(supervision=supervision, beta=0.1)  # with β silent groups are kept
    batches, record, sample = write_texts(tokenizer, TWO, options)
    advantages, mask = batches[0]["advantages"], batches[0]["mask"]
    tokens = sum(batch["mask"].sum().item() for batch in batches)
    assert record == pytest.approx(dict(
        reward_mean=(2.8 + 2 * 0.8 + 3 * 2.4) / 6, reward_std=statistics.stdev([2.8, 0.8, 0.8]) / 2,
        correctness=8 / 6, format=3.6 / 6, accuracy=4 / 6, completion_length=tokens / 6,
        finished_fraction=0.5, zero_std_groups=1, entropy=0.5, num_rows=6, num_items=tokens,
    ))  # fmt: skip
    assert [c["reward"] for c in sample["completions"]] == pytest.approx([2.8, 0.8])
    assert sample["answer"] == "7" and sample["completions"][0]["advantage"] > 0
    values = [1, 1, 1, 1, 0, 0, 0, 1, 0] if supervision == "process" else [2.8, 0.8, 0.8]
    mean, std, k = statistics.mean(values), statistics.stdev(values), len(values) // 3
    for row in range(3):  # step by step: the sum over this and all later steps
        normalised = [(v - mean) / (std + 1e-4) for v in values[k * row : k * row + k]]
        expected = [sum(normalised[i:]) for i in range(k)]
        given = advantages[row][mask[row] == 1].unique_consecutive().tolist()
        assert given == pytest.approx(expected, abs=1e-4)
    assert not batches[1]["advantages"].any() and not advantages[mask == 0].any()


# Several processes, forked: importing torch again for each would take most of the time ------------
def fork(function, number=1, seconds=60):
    """`function` in so many processes, as by torchrun → their exit statuses: −9 says that a process
    was killed, None that it hung."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def target(rank):
        gsm.RANK, gsm.WORLD_SIZE = rank, number
        torch.set_num_threads(1)  # the first threads after a fork would race for torch's pool
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=number, MASTER_PORT=port)
        os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="localhost")
        sys.exit(function())

    make = multiprocessing.get_context("fork").Process
    processes = [make(target=target, args=(rank,)) for rank in range(number)]
    [process.start() for process in processes]
    [process.join(seconds) for process in processes]
    statuses = [process.exitcode for process in processes]
    [process.kill() for process in processes]
    return statuses


def test_two_processes_learn_what_one_learns(tmp_path, tokenizer):
    cases = [*zip(OPTIONS, itertools.repeat([])), ({}, [0]), ({}, [1, 2])]
    cases += [({"beta": 0.1}, [0, 1, 2]), ({}, [0, 1, 2])]

    def work():
        if gsm.WORLD_SIZE > 1:
            gsm.dist.init_process_group("gloo")
        mode, learned = dict(advantage="batch_normalized", beta=0.1), []
        batches, record, _ = write_texts(tokenizer, gsm.my_share(TWO), mode)
        for options, silent in cases:
            policy, reference = make_policy(10, scale=2.0), make_policy(10, seed=1, scale=2.0)
            rows = [4 * g + i for g in gsm.my_share(range(3)) for i in range(4)]
            sampled, advantages = make_rollout(policy, silent=silent)
            sizes = dict(num_rows=12, num_items=int(sampled[3].sum()))
            mine = [x[rows] for x in sampled], advantages[rows]
            learned.append(
                update(policy, mine, reference, micro_batch_size=3, sizes=sizes, **options)
            )
        advantages = [batch["advantages"] for batch in batches]
        torch.save((learned, record, advantages), tmp_path / f"{gsm.RANK}{gsm.WORLD_SIZE}")

    assert fork(work) + fork(work, 2) == [0, 0, 0]
    (one, expected, advantages), *two = (torch.load(tmp_path / name) for name in ("01", "02", "12"))
    assert all(map(torch.equal, two[0][2] + two[1][2], advantages)) and len(two[0][2]) == 1
    for learned, record, _ in two:
        assert record == pytest.approx(expected) and learned[-1][1]["steps"] == 0
        [agree(given, other) for given, other in zip(learned[:-1], one)]


# Whole runs: what they leave, how they resume -----------------------------------------------------
def flags(folder, out, *extra, **changes):
    options = dict(
        device="cpu", model=folder / "model", train_file=folder / "train.jsonl",
        eval_file=folder / "test.jsonl", output_dir=out, num_iterations=2, num_steps=3,
        batch_size=3, num_generations=4, max_completion_length=16, beta=0.1, mu=2,
        learning_rate=1e-3, micro_batch_size=3, eval_examples=5, save_every=2, eval_every=2,
    )  # fmt: skip
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (options | changes).items()]
    return [*itertools.chain(*pairs), *extra]


def resume(out, *extra):
    return ["--resume", "--output-dir", str(out), *extra]  # all else is in config.json


def read(path, name=None):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines] if name else lines


METRICS = (
    "loss reward_mean reward_std correctness format accuracy kl entropy logprob_gap clip_fraction "
    "grad_norm completion_length finished_fraction zero_std_groups skipped_updates learning_rate "
    "num_rows num_items tokens_per_second step_seconds peak_memory_bytes"
).split()


def steady(out):
    metrics = read(out / "metrics.jsonl")
    kept = [{k: v for k, v in line.items() if k not in METRICS[-3:]} for line in metrics]
    texts = [(out / name).read_text() for name in ("eval.jsonl", "samples.jsonl")]
    return kept, texts, (out / "final" / "model.safetensors").read_bytes()


def checkpoints(out):
    files = sorted((out / "checkpoints").glob("step-*.pt"))
    return {int(x.stem[5:]): torch.load(x, weights_only=True)["masters"] for x in files}


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def finished_run(request, start_folder, tmp_path_factory):
    out, options = tmp_path_factory.mktemp("trained") / "run", ("--dtype", request.param)
    assert gsm.main(flags(start_folder, out, *options)) == 0
    return out, lambda out: flags(start_folder, out, *options), getattr(torch, request.param)


def test_a_run_leaves_everything_behind(finished_run):
    """Also: float32 masters, but a final model in the precision that was evaluated."""
    out, _, dtype = finished_run
    loop = GSM_SOURCE.partition("# 10. The training loop")[2].partition("# 11. ")[0]
    assert all(f'"{name}"' in loop for name in METRICS)
    for line in read(out / "metrics.jsonl"):
        assert {*METRICS, "step"} == {*line} and line.pop("peak_memory_bytes") is None  # no GPU
        assert None not in line.values() and line["learning_rate"] == 1e-3 and line["entropy"] > 1
        assert 0 <= line["logprob_gap"] < (1e-5 if dtype == torch.float32 else 0.05)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read(out / name, "step") == [*range(1, 7)]
    assert read(out / "eval.jsonl", "step") == [0, 2, 4, 6] and [*checkpoints(out)] == [4, 6]
    assert json.loads((out / "config.json").read_text())["settings"]["mu"] == 2
    final = gsm.AutoModelForCausalLM.from_pretrained(out / "final")  # in the file's precision
    for parameter, master in zip(final.parameters(), checkpoints(out)[6], strict=True):
        assert parameter.dtype == dtype and master.dtype == torch.float32
        assert torch.equal(parameter, master.to(dtype))


def at_call(n, owner, name, then):
    """From its n-th call on, owner.name is then(original, *arguments)."""
    original, calls = getattr(owner, name), itertools.count(1)

    def replaced(*arguments, **options):
        call = functools.partial(then, original) if next(calls) >= n else original
        return call(*arguments, **options)

    setattr(owner, name, replaced)


def kill(_, path, *arguments, **options):
    """… and leave half a file, if one is being written."""
    if isinstance(path, Path) and path.suffix:
        path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = [  # when a run is killed, and the steps of its checkpoints then
    ((3, gsm, "update_policy", kill), [2]), ((1, torch, "save", kill), [2]),
    ((4, gsm.Path, "replace", kill), [2]), ((4, gsm, "update_policy", kill), [2, 4]),
    ((1, gsm, "draw_curves", kill), [4, 6]), ((4, gsm.Path, "write_text", kill), [4, 6]),
]  # fmt: skip


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(finished_run, tmp_path):
    out, arguments = tmp_path / "run", finished_run[1](tmp_path / "run")
    for moment, steps in MOMENTS:
        assert fork(lambda m=moment, a=arguments: at_call(*m) or gsm.main(a)) == [-9]
        assert [*checkpoints(out)] == steps
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
        arguments = resume(out)
    assert gsm.main(arguments) == 0
    assert steady(out) == steady(finished_run[0]) and [*checkpoints(out)] == [4, 6]


@pytest.mark.parametrize("number, count, status, saved", [
    (signal.SIGTERM, 2, 143, [1]), (signal.SIGINT, 1, 130, [1]), (signal.SIGINT, 2, -2, []),
])  # fmt: skip
def test_a_signal_saves(number, count, status, saved, start_folder, tmp_path, capfd):
    """… without the evaluation that is due."""
    arguments = flags(start_folder, tmp_path, num_iterations=1, num_steps=2, eval_every=1)
    raised = lambda *a, **k: [signal.raise_signal(number) for _ in range(count)]  # noqa: E731
    hit = lambda learn, *a, **k: raised() and learn(*a, **k)  # noqa: E731
    assert fork(lambda: at_call(1, gsm, "update_policy", hit) or gsm.main(arguments)) == [status]
    assert "stopping after this step" in capfd.readouterr().out
    assert [*checkpoints(tmp_path)] == saved and not (tmp_path / "final").exists()
    assert read(tmp_path / "eval.jsonl", "step") == [0]
    assert gsm.main(resume(tmp_path)) == 0
    assert read(tmp_path / "eval.jsonl", "step") == [0, 1, 2]


def test_resume_takes_other_settings(finished_run, start_folder, tmp_path, capsys):
    out = shutil.copytree(finished_run[0], tmp_path / "run")
    data = Path(shutil.copy(start_folder / "train.jsonl", out))
    changes = "--num-steps", "4", "--learning-rate", "1e-30", "--eval-every", "5"
    assert gsm.main(resume(out, *changes)) == 0
    assert read(out / "eval.jsonl", "step") == [0, 2, 4, 6, 8]  # the former last one is kept
    assert read(out / "metrics.jsonl", "learning_rate") == [1e-3] * 6 + [1e-30] * 2
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["num_steps"] == 4 and settings["batch_size"] == 3
    assert all(map(torch.equal, checkpoints(finished_run[0])[6], checkpoints(out)[8]))
    for change in ("--batch-size", "4"), ("--seed", "1"), ("--train-file", str(data)):
        status, line = refused(resume(out, *change), capsys)  # the steps' problems would change
        assert status == 2 and change[0].replace("-", "_")[2:] in line
    assert gsm.main(["--eval-only", "--output-dir", str(out)]) == 0
    with pytest.raises(SystemExit):
        gsm.main(["--eval-only", "--model", "x", "--output-dir", str(out)])


def test_the_loop_runs_from_python_too(start_folder, tmp_path):
    options = dict(device="cpu", num_steps=1, batch_size=2, max_completion_length=4, beta=0.0)
    out, model = str(tmp_path / "new" / "folder"), str(start_folder / "model")
    settings = gsm.Settings(model=model, output_dir=out, **options)
    rows = gsm.load_problems(start_folder / "train.jsonl")
    assert gsm.train_with_grpo(*gsm.load_model(settings), rows, settings) == 0
    assert read(Path(out) / "metrics.jsonl", "step") == [1]


def test_a_penalty_needs_a_second_model(start_folder, tmp_path, monkeypatch):
    seen, learn = [], gsm.update_policy

    def look(*inputs, **sizes):
        seen.append([copy.deepcopy(model and [*model.parameters()]) for model in inputs[:2]])
        return learn(*inputs, **sizes)

    monkeypatch.setattr(gsm, "update_policy", look)
    rollout = mock.Mock(wraps=gsm.collect_rollout)
    monkeypatch.setattr(gsm, "collect_rollout", rollout)
    for beta in (0.1, 0):
        assert gsm.main(flags(start_folder, tmp_path / f"{beta}", beta=beta, eval_examples=0)) == 0
    assert [reference for _, reference in seen[6:]] == [None] * 6
    seeds = [call.args[4].initial_seed() for call in rollout.call_args_list]
    assert len({*seeds[:6]}) == 6 and seeds[:6] == seeds[6:]  # other samples at each step
    for i, (policy, reference) in enumerate(seen[:6]):  # against the policy at the round's start
        assert all(map(torch.equal, reference, seen[i // 3 * 3][0]))
        assert all(map(torch.equal, reference, policy)) == (i % 3 == 0)
        assert not any(p.requires_grad for p in reference)


# What goes wrong ----------------------------------------------------------------------------------
def refused(arguments, capsys):
    """main must end with a single line → (exit status, the line)"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        gsm.main(arguments)
    printed = capsys.readouterr().err
    line = printed[printed.rindex("grpo_gsm8k.py: ") :]
    assert line.count("\n") == 1 and len(line) > 30
    return error.value.code, line


def test_three_steps_without_numbers_end_the_run(start_folder, tmp_path, monkeypatch):
    changes = dict(num_iterations=1, eval_examples=0, mu=1, num_steps=9, save_every=1)
    changes |= dict(micro_batch_size=4, batch_size=1, beta=1)  # one loss a step
    factors, compute = iter([1, *[math.nan] * 2, 1, *[math.nan] * 3]), gsm.grpo_loss

    def scaled(*arguments, **options):
        loss, metrics = compute(*arguments, **options)
        return loss * next(factors), metrics

    monkeypatch.setattr(gsm, "grpo_loss", scaled)
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        gsm.main(flags(start_folder, tmp_path, **changes))
    skipped = read(tmp_path / "metrics.jsonl", "skipped_updates")
    assert skipped == [0, 1, 1, 0, 1, 1, 1]
    assert [x is None for x in read(tmp_path / "metrics.jsonl", "loss")] == [
        x == 1 for x in skipped
    ]
    five, six = (checkpoints(tmp_path)[step] for step in (5, 6))
    assert all(map(torch.equal, five, six)) and all(x.isfinite().all() for x in six)


@pytest.mark.parametrize("where", ["from_pretrained", "compute_group_log_probs"])
def test_out_of_memory_names_what_helps(where, start_folder, tmp_path, monkeypatch, capsys):
    owner = gsm if hasattr(gsm, where) else gsm.AutoModelForCausalLM
    for i, error in enumerate((
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory"),
    )):  # fmt: skip
        monkeypatch.setattr(owner, where, mock.Mock(side_effect=error))
        status, line = refused(flags(start_folder, tmp_path / f"{i}"), capsys)
        assert status == 1 and {"--micro-batch-size", "--gradient-checkpointing"} < {
            *line.replace(",", "").split()
        }
    monkeypatch.setattr(owner, where, mock.Mock(side_effect=RuntimeError("illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        gsm.main(flags(start_folder, tmp_path / "other"))


@pytest.mark.parametrize("arguments, words", [
    ("--num-generations 1", "at least 2"), ("--batch-size 0", "at least 1"),
    ("--output-dir /dev/null/x", "/dev/null"), ("--learning-rate nan", "--learning-rate"),
    ("--epsilon 0", "--epsilon"), ("--beta -0.1", "--beta"), ("--temperature 0", "--temperature"),
    ("--loss-type ppo", "--loss-type"), ("--num-steps many", "--num-steps"), ("--no 1", "--no"),
    ("--reward format --supervision process", "--supervision"), ("--batch-size 61", "--batch-size"),
    ("--train-file no.jsonl", "no.jsonl"), ("--train-file {tmp}/empty.jsonl", "empty.jsonl"),
    ("--train-file {tmp}/broken.jsonl", "broken.jsonl:2"), ("--eval-file {tmp}/broken.jsonl", ":2"),
    ("--eval-only --eval-examples 0", "--eval-examples"), ("--output-dir {tmp}/held", "--resume"),
    ("--resume", "config.json"), ("--model {tmp}/no", "--model"),
    pytest.param("--device auto", "--rehearsal", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
])  # fmt: skip
def test_refusals_come_early(arguments, words, start_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "held").mkdir()
    row = (start_folder / "train.jsonl").read_text().split("\n")[0]
    files = {"empty.jsonl": "\n", "broken.jsonl": row + "\n{", "held/config.json": "{}"}
    [(tmp_path / name).write_text(text) for name, text in files.items()]
    loaded = mock.Mock(side_effect=lambda *a, **o: pytest.fail("the model was loaded"))
    monkeypatch.setattr(gsm.AutoModelForCausalLM, "from_pretrained", loaded)
    before, extra = sorted(tmp_path.rglob("*")), arguments.format(tmp=tmp_path).split()
    status, line = refused(flags(start_folder, tmp_path / "new", *extra), capsys)
    after = [path for path in sorted(tmp_path.rglob("*")) if path.name != "new"]
    assert status == 2 and words in line and after == before


# Precision and memory -----------------------------------------------------------------------------
def test_bfloat16_learns_with_masters_and_not_without():
    """20 updates. The masters' change has a cosine of 0.9998 with a float32 model's; of bfloat16
    weights alone 95 % stay where they were."""
    policy = make_policy(10, scale=2.0, hidden_size=16, intermediate_size=32).bfloat16().float()
    rollouts, moved = [make_rollout(policy, seed=seed) for seed in range(20)], {}
    for name in ("float32", "masters", "alone"):
        model = copy.deepcopy(policy).to(torch.float32 if name == "float32" else torch.bfloat16)
        optimizer = gsm.make_optimizer(model, lr := gsm.Settings.learning_rate)
        if name == "alone":
            model = copy.deepcopy(policy).bfloat16()
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        weights = optimizer.param_groups[0]["params"]
        addresses = [p.data_ptr() for p in model.parameters()]
        for sampled, advantages in rollouts:
            batches = gsm.make_micro_batches(sampled, advantages, 4, 4, keep_silent=False)
            sizes = dict(num_rows=12, num_items=int(sampled[3].sum()))
            gsm.update_policy(model, None, optimizer, batches, make_settings(), **sizes)
            assert all(torch.equal(p, w.to(p.dtype)) for p, w in zip(model.parameters(), weights))
        assert addresses == [p.data_ptr() for p in model.parameters()]  # for CUDA graphs
        pairs = zip(weights, policy.parameters())
        moved[name] = torch.cat([(w.detach().float() - p.detach()).flatten() for w, p in pairs])
    assert torch.cosine_similarity(moved["masters"], moved["float32"], dim=0) > 0.95
    still = {name: (change == 0).float().mean() for name, change in moved.items()}
    assert still["alone"] > 0.9 and still["masters"] < 0.02


def test_neither_offloading_nor_checkpointing_changes_the_training(finished_run, tmp_path):
    """With checkpointing every row reads its prompt: equal but for rounding in the first step."""
    (out, arguments, dtype), a, b = finished_run, tmp_path / "a", tmp_path / "b"
    assert gsm.main([*arguments(a), "--offload-optimizer"]) == 0 and steady(a) == steady(out)
    (a / "checkpoints" / "step-000006.pt").unlink()
    assert gsm.main(resume(a, "--offload-optimizer", "False")) == 0 and steady(a) == steady(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gsm.main([*arguments(b), "--gradient-checkpointing"]) == 0
    rounding = 1e-5 if dtype == torch.float32 else 5e-3
    assert steady(b)[0][0] == pytest.approx(steady(out)[0][0], rel=0.02, abs=rounding)


# The rehearsal and the command line ---------------------------------------------------------------
def test_the_rehearsals_rows_are_right_and_new(start_folder):
    loaded = gsm.AutoTokenizer.from_pretrained(start_folder / "model")
    train, unseen = gsm.make_problems(seed=3)
    shown, kept = ({row["question"] for row in rows} for rows in (train, unseen))
    assert not shown & kept and len({re.sub(r"\d", "", x) for x in kept}) == len(gsm.TEMPLATES)
    assert "What is 25 + 5?" in shown
    for row in unseen + train[:200]:
        answer, text = gsm.extract_answer_from_dataset(row["answer"]), gsm.demonstrate(row)
        assert {reward for _, reward in gsm.step_rewards(text, answer)} == {1.0}
        assert gsm.combined_reward([text], [answer]) == pytest.approx([2.8])
        text = gsm.build_prompt(row["question"], loaded) + text + loaded.eos_token
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    short = gsm.demonstrate(unseen[-1], keep_steps=1, tags=False)
    assert short.count("=") == 1 and "<reasoning>" not in short and "</answer>" in short


QUIET = "-W error::FutureWarning -W error::DeprecationWarning:grpo_gsm8k".split()
BRIEF = """import sys, grpo_sort, grpo_gsm8k as gsm
assert not {"matplotlib", "datasets"} & {*sys.modules}  # importing does no work
gsm.make_start.__defaults__ = (2, "cpu")
sys.exit(gsm.main())"""


def in_shell(*command):
    environment = os.environ | {"PYTHONPATH": str(Path(gsm.__file__).resolve().parent)}
    command = [sys.executable, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not re.search("(?i)warning|deprecat|traceback", done.stdout + done.stderr), done.stderr
    return done.stdout


def test_a_brief_rehearsal_and_its_evaluation(tmp_path, capsys):
    out, again = tmp_path / "run", tmp_path / "again"
    tiny = "--num-steps 2 --batch-size 2 --num-generations 2 --eval-examples 3 --output-dir".split()
    assert gsm.EXAMPLE in in_shell(*QUIET, "-c", BRIEF, "--rehearsal", *tiny, str(out))
    assert (out / "curves.png").stat().st_size > 10_000
    gsm.make_start(again, 0, 2)
    made, remade = (x / "model" / "model.safetensors" for x in (out / "start", again))
    before = remade.stat().st_mtime_ns
    gsm.make_start(again, 0, 2)
    assert made.read_bytes() == remade.read_bytes() and remade.stat().st_mtime_ns == before
    capsys.readouterr()
    assert gsm.main(["--eval-only", "--output-dir", str(out)]) == 0  # final/, with its settings
    *_, trained, only = read(out / "eval.jsonl")
    assert only == {**trained, "model": str(out / "final")} and only["step"] == 2
    assert f"{out / 'final'}, step 2: examples 3, strict" in capsys.readouterr().out
    assert gsm.main(["--eval-only", "--resume", "--output-dir", str(out)]) == 0
    assert read(out / "eval.jsonl")[-1] == trained  # the newest checkpoint of the trained model
    (first, *others), names = read(out / "completions-000002.jsonl"), {*os.listdir(out)}
    assert len(others) == 2 and {"question", "answer", "completion"} < {*first}
    notes = json.loads((out / "final" / "grpo.json").read_text())
    assert notes["system_prompt"] == gsm.SYSTEM_PROMPT and notes["step"] == 2
    assert {"checkpoints", "config.json", "final", "metrics.jsonl", "start"} < names
    assert len(names) == 10 and not any("tmp" in name for name in names)


def test_torchrun_trains_evaluates_and_saves_once(start_folder, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    in_shell(*launcher, gsm.__file__, *flags(start_folder, tmp_path, num_steps=1))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["processes"] == 2 and [*checkpoints(tmp_path)] == [2]
    for name, steps in (("metrics", [1, 2]), ("samples", [1, 2]), ("eval", [0, 2])):
        assert read(tmp_path / f"{name}.jsonl", "step") == steps
    settings = gsm.Settings(**config["settings"] | dict(eval_file=None, eval_examples=None))
    train, test = gsm.load_data(settings)
    assert (len(train), len(test)) == (54, 6)  # without --eval-file a tenth is held out
    settings = gsm.Settings(**config["settings"])
    _, test = gsm.load_data(settings)
    alone = gsm.evaluate_model(*gsm.load_model(settings), test, 16)
    first = {"step": 0, "model": settings.model, **alone}
    assert read(tmp_path / "eval.jsonl")[0] == first and alone["examples"] == 5
