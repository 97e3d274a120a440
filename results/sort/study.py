# SPDX-License-Identifier: MIT
"""Measures what the README says of grpo_sort.py, and makes everything else in this folder:

    python results/sort/study.py [DIR]      two processes; 9 minutes on two cores

Experiments: 1 classic, 2 from there to the recipe, 3 deltas and losses, 4 KL to PPO, 5 unseen
prompts, 6 theory by enumeration. Rows are written as they are measured. Shapes are written as in
grpo_sort.py; `params` are all parameters of a model in one vector.
"""

import itertools
import json
import math
import multiprocessing
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

import grpo_sort as gs

# Exact gradients (experiment 6) ===================================================================

# With 5 tokens and 3 positions there are 125 responses to a prompt: expectations are sums, without
# sampling error. A group of G responses gives the estimate g = 1/G Σ_i δ_i s_i with the score
# s = ∇log π(a). δ_i depends on the rewards of the batch only, so it is enough to enumerate these:
# given its reward R a response has the mean score m = E[s | R], and the scores are independent.

#     E[g]  = Σ over rewards R_1 … R_G  P(R) ·   1/G Σ_i δ_i m_i
#     E|g|² = Σ over rewards R_1 … R_G  P(R) · ( |1/G Σ_i δ_i m_i|² + 1/G² Σ_i δ_i² Var[s | R_i] )

# with Var[s | R] = E[|s|² | R] − |m|², and the same averaged over the prompts of a batch. Axes:
# `level` a value of the reward, `group` a multiset of G levels, `combo` a group for each prompt.


def enumerate_responses(vocab_size, length):
    """All vocab^length responses → int[trial pos]"""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)


def flat_gradient(objective, model):
    """∇ of float[run] by the model's parameters, in one vector → float[run params]"""
    gradients = torch.autograd.grad(objective.sum(), [*model.parameters()], retain_graph=True)
    return torch.cat([g.flatten(1) for g in gradients], dim=1)


def compute_scores(prompts, responses, model):
    """∇log π(response | prompt), the score, of the same responses to every prompt.

    A model with a run axis, int[batch pos], int[trial pos] → float[run batch trial params]
    """
    runs = len(model.embedding)
    everywhere = responses.expand(runs, len(prompts), -1, -1)  # [run batch trial pos]
    log_probs = gs.compute_log_probs(prompts, everywhere, model).sum(dim=-1)  # [run batch trial]
    scores = [flat_gradient(x, model) for x in log_probs.flatten(1).unbind(dim=1)]
    return torch.stack(scores, dim=1).unflatten(1, log_probs.shape[1:])


def expected_update(probs, rewards, scores, mode, group_size):
    """Mean and variance of the policy gradient that compute_deltas(·, mode) estimates, exactly.

    Of every possible response: probs float[run batch trial], rewards float[batch trial] and scores
    float[run batch trial params] → mean float[run params], variance float[run]
    """
    levels = rewards.unique()  # [level], the values that a reward can take
    # [run batch trial level], the probability of each response in the column of its reward
    member = (rewards.unsqueeze(-1) == levels) * probs.unsqueeze(-1)
    level_probs = member.sum(dim=-2)  # [run batch level]
    floor = level_probs.clamp(min=1e-30)  # [run batch level]
    mean_score = torch.einsum("rbtl,rbtp->rblp", member, scores) / floor.unsqueeze(-1)
    second_moment = torch.einsum("rbtl,rbt->rbl", member, scores.square().sum(dim=-1)) / floor
    score_variance = second_moment - mean_score.square().sum(dim=-1)  # [run batch level]

    # Every multiset of rewards that a group can have, and every combination of them over a batch.
    batch = rewards.shape[-2]
    groups = itertools.combinations_with_replacement(range(len(levels)), group_size)
    groups = torch.tensor(list(groups))  # [group trial]
    counts = F.one_hot(groups, len(levels)).sum(dim=1)  # [group level]
    orders = math.factorial(group_size) / torch.lgamma(counts + 1.0).sum(dim=-1).exp()  # [group]
    group_probs = orders * (level_probs.unsqueeze(-2) ** counts).prod(dim=-1)  # [run batch group]
    combos = torch.cartesian_prod(*[torch.arange(len(groups))] * batch).view(-1, batch)
    combo_probs = math.prod(group_probs[:, b, combos[:, b]] for b in range(batch))  # [run combo]

    deltas = gs.compute_deltas(levels[groups[combos]], mode)  # [combo batch trial]
    one_hot = F.one_hot(groups[combos], len(levels)).float()  # [combo batch trial level]
    scale = 1 / (batch * group_size)
    # [combo batch*level], over the responses to a prompt with the same reward: Σ δ / (batch·G) and
    # Σ δ² / (batch·G)²
    weight = scale * torch.einsum("cbt,cbtl->cbl", deltas, one_hot).flatten(1)
    square = scale**2 * torch.einsum("cbt,cbtl->cbl", deltas**2, one_hot).flatten(1)
    mean_score = mean_score.flatten(1, 2)  # [run batch*level params]
    gram = mean_score @ mean_score.mT  # [run batch*level batch*level]
    mean = torch.einsum("rk,rkp->rp", combo_probs @ weight, mean_score)  # [run params]
    within = ((combo_probs @ square) * score_variance.flatten(1)).sum(dim=-1)  # [run]
    squares = [((weight @ g) * weight).sum(dim=-1) @ p for g, p in zip(gram, combo_probs)]
    return mean, torch.stack(squares) + within - mean.square().sum(dim=-1)


def expected_gradient(per_response, probs, model):
    """∇ of the mean of a quantity over samples whose probabilities are held fixed.

    per_response, probs float[run batch trial], of every possible response → float[run params]
    """
    return flat_gradient((probs * per_response).sum(dim=-1).mean(dim=-1), model)


def compute_exact_kl(prompts, model, ref_model):
    """KL(π ‖ π_ref) of a response in nats: int[batch pos] → float[run], the mean over prompts"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [run batch pos vocab]
    ref_log_probs = ref_model(prompts).log_softmax(dim=-1)  # [run batch pos vocab]
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=(-2, -1)).mean(dim=-1)


def measure_ratios(log_probs, probs, rewards, exact, model):
    """Table 6b: where a loss with the ratio, and one with the quotient of logarithms, leads.

    Of every possible response: log_probs float[run batch trial pos], probs float[run batch trial],
    rewards float[batch trial]; exact is ∇J, float[run params]
    """
    # compute_loss on each response alone, as a batch of one in a run of its own
    alone = log_probs[..., None, None, :]  # [run batch trial 1 1 pos]
    advantages = rewards - (probs * rewards).sum(dim=-1, keepdim=True)  # [run batch trial], exact
    ratio = gs.compute_loss(alone, advantages[..., None, None], "unclipped", alone.detach())
    quotient = -(log_probs / log_probs.detach() * advantages.unsqueeze(-1)).mean(dim=-1)
    rows = {}  # both losses: [run batch trial]
    for label, loss in (("exp(log π − log π_old)", ratio), ("log π / log π_old", quotient)):
        update = -expected_gradient(loss, probs, model)  # [run params]
        rows["6b", label] = {"cosine": F.cosine_similarity(update, exact, dim=-1)}
    return rows


def measure_estimators(prompts, responses, old_model, model, ref_model):
    """Table 6c: the KL estimators on samples of old_model; on policy that is the same as model.

    Samples do not move with the parameters: as a loss an estimator has the gradient of
    E_{π_old}[estimator] with π_old held fixed. responses are all, int[run batch trial pos].

    The last one, a slip found in the wild, is k3 of y = log π − log π_ref, minus x: e^y − y − 1. It
    looks right, for its minimum is at 0 too. But E[e^y] is 1 + χ² where that of k3 is 1, with
    χ² = Σ_v π(v)² / π_ref(v) − 1 of a token, summed over pos. So on policy its mean is χ² − KL, and
    its gradient E[(e^y − 1) ∇log π] = ∇χ²/2.
    """
    models = old_model, model, ref_model
    every = [gs.compute_log_probs(prompts, responses, m) for m in models]  # [run batch trial pos]
    probs = every[0].detach().sum(dim=-1).exp()  # [run batch trial], of π_old
    # [run batch trial 1 1 pos], every response alone, as in measure_ratios
    old, new, ref = (log_probs[..., None, None, :] for log_probs in every)
    estimates = {k: gs.compute_kl_penalty(new, ref, k, old) for k in gs.KL_ESTIMATORS}
    y = every[1] - every[2].detach()  # [run batch trial pos]
    estimates["k3 with the ratio upside down"] = (y.exp() - y - 1).sum(dim=-1)  # [run batch trial]
    log_probs, ref_log_probs = (m(prompts).log_softmax(dim=-1) for m in (model, ref_model))
    chi2 = (2 * log_probs - ref_log_probs).exp().sum(dim=-1) - 1  # [run batch pos]
    chi2 = chi2.sum(dim=-1).mean(dim=-1)  # [run], χ²(π ‖ π_ref)
    kl = compute_exact_kl(prompts, model, ref_model)  # [run], KL(π ‖ π_ref)
    reverse = compute_exact_kl(prompts, ref_model, model)  # [run], KL(π_ref ‖ π)
    targets = {"error_to_ref": kl, "error_from_ref": reverse, "error_chi2": chi2 / 2}
    targets = {name: flat_gradient(x, model) for name, x in targets.items()}  # each [run params]
    rows = {}
    for label, estimate in estimates.items():
        value = (probs * estimate).sum(dim=-1)  # [run batch]
        variance = (probs * estimate**2).sum(dim=-1) - value**2  # [run batch]
        gradient = expected_gradient(estimate, probs, model)  # [run params]
        row = {name: (gradient - x).norm(dim=-1) / x.norm(dim=-1) for name, x in targets.items()}
        row["moved"] = compute_exact_kl(prompts, old_model, model)  # [run], as all of row
        row["value"], row["value_to_chi2"] = (value.mean(dim=-1) / x for x in (kl, chi2 - kl))
        row["spread"] = variance.mean(dim=-1).sqrt() / kl
        rows["6c", label + (", off policy" if old_model is not model else "")] = row
    return rows


def measure_baselines():
    """Table 6e: the baseline of least variance, for two actions whose policy has a single logit.

    The variance of (R − b) s with the score s = ∇log π is E[s² (R − b)²] − (∇J)². Its derivative by
    b is 0 at b = E[s² R] / E[s²]. With ∇π, as it is often quoted, it is another number.
    """
    probs, rewards = torch.tensor([0.8, 0.2]), torch.tensor([11.0, 9.0])  # both [action]
    score = torch.tensor([0.2, -0.8])  # [action], ∇log π by the logit: 1 − π and −π
    weights = {"0": torch.zeros(2), "E[R]": torch.ones(2)}  # each [action]
    weights |= {"E[(∇π)² R] / E[(∇π)²]": (probs * score) ** 2}
    weights |= {"E[(∇log π)² R] / E[(∇log π)²]": score**2}
    rows = {}
    for label, weight in weights.items():  # b = E[weight · R] / E[weight]
        b = (probs * weight) @ rewards / (probs @ weight).clamp(min=1e-30)
        update = (rewards - b) * score  # [action], the estimate from one sample
        variance = probs @ (update - probs @ update) ** 2
        rows["6e", label] = {"baseline": b.view(1), "variance": variance.view(1)}
    return rows


def measure_gradients(num_runs, seed, group_size=4):
    """All of experiment 6 → {(table, label): {metric: float[run]}}.

    The policies are those of `num_runs` recipes stopped after five epochs, when the prompts have
    come to differ in difficulty; the reference is each run's initial policy. Off policy, π is the
    policy one epoch later: after ten inner steps on responses sampled by π_old.
    """
    prompts = torch.tensor(gs.CLASSIC_PROMPTS)  # [batch pos]
    recipe = gs.RECIPE | dict(num_runs=num_runs, seed=seed)
    model, later = (gs.run_policy_gradient(**recipe, num_epochs=n).model for n in (5, 6))
    generator = torch.Generator().manual_seed(seed)  # as those trainings began
    initial = gs.Model(5, 10, 3, 3, gs.RECIPE["init_scale"], num_runs, generator)
    responses = enumerate_responses(5, 3)  # [trial pos]
    everywhere = responses.expand(num_runs, len(prompts), -1, -1)  # [run batch trial pos]
    rewards = gs.sort_distance_reward(prompts, everywhere[0])  # [batch trial]
    log_probs = gs.compute_log_probs(prompts, everywhere, model)  # [run batch trial pos]
    probs = log_probs.sum(dim=-1).exp().detach()  # [run batch trial], sums to 1 over trial
    scores = compute_scores(prompts, responses, model)  # [run batch trial params]
    exact = torch.einsum("rbt,rbtp->rp", probs * rewards, scores) / len(prompts)  # [run params], ∇J

    rows = {}
    for mode in gs.DELTAS:
        mean, variance = expected_update(probs, rewards, scores, mode, group_size)
        cosine = F.cosine_similarity(mean, exact, dim=-1)  # [run]
        length, noise = mean.norm(dim=-1) / exact.norm(dim=-1), variance.sqrt() / mean.norm(dim=-1)
        rows["6a", mode] = {"cosine": cosine, "length": length, "noise": noise}
    rows |= measure_ratios(log_probs, probs, rewards, exact, model)
    rows |= measure_estimators(prompts, everywhere, model, model, initial)
    rows |= measure_estimators(prompts, everywhere, model, later, initial)
    return rows | measure_baselines()


# Untrained policies and unseen prompts (experiments 2a and 5) =====================================


def measure_starts(num_runs, seed):
    """Table 2a: how decided the untrained policy is, at two embedding scales, as in 6."""
    prompts, rows = torch.tensor(gs.CLASSIC_PROMPTS), {}
    for scale in (1.0, 0.1):
        model = gs.Model(5, 10, 3, 3, scale, num_runs, torch.Generator().manual_seed(seed))
        top = model(prompts).softmax(dim=-1).amax(dim=-1)  # [run batch pos], the likeliest token
        entropy = gs.compute_entropy(prompts, model)  # [run]
        rows["2a", f"init_scale {scale}"] = {"entropy": entropy, "top": top.mean(dim=(-2, -1))}
    return rows


CROSS_ENTROPY, EXPECTED_REWARD = "cross-entropy on the answers", "exact expected reward"


def train_on_answers(prompts, objective, num_epochs, batch_size, entropy_bonus, seed, **_):
    """The model of UNSEEN, shown the sorted answers: steps without any sampled response.

    objective CROSS_ENTROPY is the mean log π(right token); EXPECTED_REWARD is the mean π(right
    token), the expected distance reward / n: what RL climbs, without its noise.
    prompts int[run prompt pos], from which batches are drawn → Model
    """
    num_runs, _, length = prompts.shape
    generator = torch.Generator().manual_seed(seed)
    dim, scale = UNSEEN["embedding_dim"], UNSEEN["init_scale"]
    model = gs.Model(int(prompts.max()) + 1, dim, length, length, scale, num_runs, generator)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for epoch in range(num_epochs):
        remaining = 1 - epoch / num_epochs
        optimizer.param_groups[0]["lr"] = UNSEEN["learning_rate"] * remaining
        batch = gs.draw_batch(prompts, batch_size, num_runs, generator)  # [run batch pos]
        answers = batch.sort(dim=-1).values.unsqueeze(-2)  # [run batch 1 pos]
        log_probs = gs.compute_log_probs(batch, answers, model)  # [run batch 1 pos]
        climbed = log_probs if objective == CROSS_ENTROPY else log_probs.exp()
        climbed = climbed.mean(dim=(-3, -2, -1))  # [run]
        if entropy_bonus:
            climbed = climbed + entropy_bonus * remaining * gs.compute_entropy(batch, model)
        optimizer.zero_grad()
        (-climbed).sum().backward()
        optimizer.step()
    return model


@torch.no_grad()
def describe_errors(train, model):
    """What a model still has wrong: int[run prompt pos] → {"left": text, "worst": text}.

    left: how likely is the right token where the likeliest is another, on the training prompts?
    worst: which numbers, of all prompts, are sorted wrongly in most runs and orders?
    """
    probs = model(train).softmax(dim=-1)  # [run prompt pos vocab]
    answers = train.sort(dim=-1).values.unsqueeze(-1)  # [run prompt pos 1]
    wrong = probs.argmax(dim=-1, keepdim=True) != answers  # [run prompt pos 1]
    left = probs.gather(-1, answers)[wrong]  # float[any number]
    prompts = enumerate_responses(probs.shape[-1], train.shape[-1])  # [prompt pos]
    wrong_in = 1 - gs.sorts_greedily(prompts, model).float().mean(dim=0)  # [prompt], share of runs
    # All orders of the same numbers are one kind: [kind pos], [prompt]
    kinds, kind = prompts.sort(dim=-1).values.unique(dim=0, return_inverse=True)
    rate = torch.zeros(len(kinds)).index_add(0, kind, wrong_in) / kind.bincount()  # [kind]
    top = [i for i in rate.argsort(descending=True).tolist()[:4] if rate[i] > 0]
    worst = [f"{' '.join(map(str, kinds[i].tolist()))} ({rate[i]:.0%})" for i in top]
    left = f"{left.median():.0e}" if len(left) else "none"
    return {"left": left, "worst": ", ".join(worst) or "none"}


def split_prompts(vocab_size, length, num_train, num_runs, seed):
    """All vocab^length prompts, split at random: int[run num_train pos], int[run rest pos].

    The prompts of zeros only and of largest numbers only are in the first. Otherwise 0 never
    appears as a right last token and cannot be learned.
    """
    prompts = enumerate_responses(vocab_size, length)  # [prompt pos]
    extreme = (prompts == 0).all(dim=-1) | (prompts == vocab_size - 1).all(dim=-1)  # [prompt]
    order = torch.rand(num_runs, len(prompts), generator=torch.Generator().manual_seed(seed))
    order = (order - extreme.float()).argsort(dim=-1)  # [run prompt], the extremes first
    return prompts[order[:, :num_train]], prompts[order[:, num_train:]]


def measure_unseen(split, settings, objective=None):
    """A row of experiment 5 → {metric: list[run]} and what is left wrong; split: of split_prompts.

    With an objective the model is trained on the answers instead of rewards.
    """
    parts = split_prompts(*split, settings["num_runs"], settings["seed"])
    if objective is None:
        model = gs.run_policy_gradient(**settings, prompts=parts[0]).model
    else:
        model = train_on_answers(parts[0], objective, **settings)
    right = [gs.sorts_greedily(x, model).float().mean(dim=-1) for x in parts]  # each [run]
    row = {"exact_match": as_list(right[0]), "unseen": as_list(right[1])}
    return row | describe_errors(parts[0], model)


def measure(settings):
    """Train one row of a table → {metric: list[run]}, and "curves" of run_policy_gradient"""
    settings = dict(settings)
    if split := settings.pop("split", None):
        return measure_unseen(split, settings, settings.pop("objective", None))
    result = gs.run_policy_gradient(**settings)
    solved = result.curves["batch_exact_match"] == 1  # bool[epoch run]
    # [run], the first epoch that sorts all, even if that is lost again; the last if none does
    first = ((solved.cumsum(dim=0) == 0).sum(dim=0) + 1).clamp(max=len(solved))
    row = {"exact_match": result.exact_match, "solved": (result.exact_match == 1).float()}
    row |= {"epochs": first.float(), "entropy": result.curves["entropy"][-1]}
    row = {name: as_list(values) for name, values in row.items()}
    return row | {"curves": {name: curve.tolist() for name, curve in result.curves.items()}}


def as_list(values):
    """float[run] → the same numbers, rounded to six decimals, for JSON"""
    return [round(x, 6) for x in values.tolist()]


# The plan =========================================================================================
# A table is data: (title, base settings, changes). Each change of the base makes a row of 32 runs.
# Where the base is None, each change is added to the row above.
# fmt: off

# The best settings found for unseen prompts. split: of split_prompts
UNSEEN = gs.RECIPE | dict(
    embedding_dim=32, deltas_mode="centered_rewards", num_responses=64, num_steps_per_epoch=1,
    learning_rate=3e-3, entropy_bonus=0.25, anneal=True,
    split=(5, 3, 100), num_epochs=1000, batch_size=32, num_runs=16)
EXACT = dict(reward_fn=gs.exact_sort_reward)
MAX_LIKELIHOOD = EXACT | dict(deltas_mode="max_likelihood")
NORMALIZED = dict(deltas_mode="normalized_rewards")
ALL_DELTAS = (*gs.DELTAS, "process", "gae")
# of table 3: how the label of a row ends, with each reward
LABELS = {r: "" if r == "distance" else f", {f.__name__}" for r, f in gs.REWARDS.items()}
GRID = [
    dict(deltas_mode=d, loss_mode=m) | (dict(reward_fn=gs.REWARDS[r]) if LABELS[r] else {})
    for r in LABELS for d in ALL_DELTAS for m in gs.LOSSES if d in gs.DELTAS or r == "distance"
]
# The base of rows that are trained on the answers, without sampling.
SUPERVISED = {k: UNSEEN[k] for k in ("split", "num_epochs", "batch_size", "num_runs")}
SUPERVISED |= dict(entropy_bonus=0.0)
ANSWERS = [
    dict(objective=CROSS_ENTROPY), dict(objective=EXPECTED_REWARD),
    dict(objective=EXPECTED_REWARD, entropy_bonus=0.25),
]
LARGE = dict(split=(10, 5, 20_000), num_epochs=5000, batch_size=128, num_runs=8)
TITLES = {title.split(".")[0]: title for title in (
    "1. The classic experiment: naive loss, 100 epochs",
    "2a. The untrained policy",
    "2b. From the classic settings to the recipe",
    "2c. The recipe with one setting changed",
    "3. The recipe with every delta and loss: exact match, %",
    "4a. KL penalty",
    "4b. Group size",
    "4c. Loss and inner steps on the same samples",
    "4d. Clip range, at learning rate 1e-2",
    "4e. Outcome and process supervision, and PPO with a critic",
    "4f. Target KL",
    "5a. 3 numbers from 5: train on 100 prompts, test on the other 25",
    "5b. 5 numbers from 10: train on 20,000 prompts, test on the other 80,000",
    "6a. The expected update of each delta against the true gradient ∇J, exact, G = 4",
    "6b. The expected update with each ratio, exact",
    "6c. KL estimators, exact: mean and std as multiples of KL(π ‖ π_ref), gradient error",
    "6e. The optimal baseline: two actions, π = 0.8 and 0.2, rewards 11 and 9, exact",
)}
TABLES = [  # the slowest first
    ("5b", SUPERVISED | LARGE, ANSWERS),
    ("5b", UNSEEN | LARGE, [{}, dict(entropy_bonus=0.0), NORMALIZED]),
    ("5a", SUPERVISED, ANSWERS),
    ("5a", UNSEEN,
     [{}, dict(entropy_bonus=0.0), NORMALIZED, EXACT, EXACT | dict(entropy_bonus=0.0),
      MAX_LIKELIHOOD, MAX_LIKELIHOOD | dict(entropy_bonus=0.0),
      NORMALIZED | dict(entropy_bonus=0.5), dict(embedding_dim=10),
      dict(deltas_mode="process"), dict(deltas_mode="process", entropy_bonus=2.0),
      dict(num_steps_per_epoch=10, num_epochs=100)]),  # as many steps, on a tenth of the samples
    ("1", {}, [dict(deltas_mode=d) for d in gs.DELTAS[:3]]),
    ("2b", None, [change for _, change in gs.LADDER]),
    ("2c", gs.RECIPE,
     [dict(deltas_mode="rewards"), dict(init_scale=1.0),
      dict(reward_fn=gs.sort_inclusion_ordering_reward), EXACT, dict(loss_mode="naive"),
      dict(loss_mode="unclipped"), dict(learning_rate=1e-2), dict(learning_rate=2e-2)]),
    ("3", gs.RECIPE, GRID),
    ("4a", gs.RECIPE,
     [dict(kl_estimator=k, kl_penalty=b) for k in gs.KL_ESTIMATORS for b in (0.01, 0.1, 1.0)]
     + [dict(kl_penalty=b, compute_ref_model_period=n) for n in (100, 1) for b in (0.1, 1.0)]),
    ("4b", gs.RECIPE, [dict(num_responses=G) for G in (2, 4, 8, 16, 32, 64)]),
    ("4c", gs.RECIPE,
     [dict(loss_mode=m, num_steps_per_epoch=n)
      for m in ("clipped", "naive") for n in (1, 2, 5, 10, 20)]),
    ("4d", gs.RECIPE | dict(learning_rate=1e-2),
     [dict(epsilon=low) for low in (0.05, 0.1, 0.2, 0.4, 0.8)]
     + [dict(epsilon_high=high) for high in (0.28, 0.5, 1.0)]),
    ("4e", gs.RECIPE,
     [NORMALIZED | dict(num_responses=G) for G in (2, 4, 10)]
     + [dict(deltas_mode=d, num_responses=G) for d in ("process", "gae") for G in (1, 2, 4, 10)]
     + [dict(deltas_mode="gae", lam=lam) for lam in (0.0, 0.95, 1.0)]),
    ("4f", gs.RECIPE, [dict(target_kl=kl) for kl in (0.01, 0.03, 0.1)]),
]
COLUMNS = {  # metric: (heading, factor, decimals)
    "exact_match": ("exact match, %", 100, 1),
    "unseen": ("unseen, %", 100, 2),
    "solved": ("sort all, runs", 1, 0),
    "epochs": ("epochs to it", 1, 1),  # num_epochs if it never does
    "entropy": ("entropy, nats", 1, 2),
    "top": ("likeliest token, %", 100, 0),
    "cosine": ("cosine with ∇J", 1, 4), "length": ("length / that of ∇J", 1, 3),
    "noise": ("noise / length", 1, 2), "moved": ("KL(π_old ‖ π), nats", 1, 2),
    "value": ("mean", 1, 3), "value_to_chi2": ("mean / (χ² − KL)", 1, 3), "spread": ("std", 1, 2),
    "error_to_ref": ("off ∇KL(π ‖ π_ref)", 1, 3), "error_from_ref": ("off ∇KL(π_ref ‖ π)", 1, 3),
    "error_chi2": ("off ∇χ²(π ‖ π_ref)/2", 1, 3),
    "baseline": ("b", 1, 1), "variance": ("variance of the update", 1, 2),
}
# fmt: on


def plan_rows(tables, **common):
    """The rows of tables → (title, label, settings to train with, the same to write down)"""
    plan = []
    for number, base, changes in tables:
        settings = {}
        for change in changes:
            settings = (settings if base is None else base) | change
            full = dict(num_runs=32) | settings | common
            written = {k: getattr(x, "__name__", x) for k, x in sorted(full.items())}
            words = [written[k] if isinstance(written[k], str) else f"{k} {written[k]}"
                     for k in change]  # fmt: skip
            label = ("+ " if base is None else "") + ", ".join(words) if change else "base"
            plan.append((TITLES[number], label, full, written))
    return plan


# Tables ===========================================================================================


def mean_and_interval(values):
    """Mean of independent runs, and half its 95 % interval (Student's t; 0 for a single run)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, 0.0
    # The quantile by Abramowitz and Stegun 26.7.5, right to 0.001 from 8 runs up.
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return mean, t * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / v / n)


def format_cell(values, name):
    """A metric of the runs as text: mean ± interval, or the number of runs that sort everything."""
    if name == "solved":
        return f"{sum(values):.0f} of {len(values)}"
    _, factor, digits = COLUMNS[name]
    mean, half = mean_and_interval(values)
    interval = f" ± {factor * half:.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean:.{digits}f}{interval}"


def format_lines(cells):
    """Cells as the lines of a Markdown table that reads well in a terminal too."""
    return [f"| {label:<36} |" + "".join(f" {x:<14} |" for x in row) for label, *row in cells]


def find_grid(rows):
    """Exact match in experiment 3 → {reward: {delta: [values of each loss]}}"""
    found = {row["label"]: row["exact_match"] for row in rows if row["table"] == TITLES["3"]}
    return {
        reward: {
            d: [found[f"{d}, {m}{end}"] for m in gs.LOSSES if f"{d}, {m}{end}" in found]
            for d in ALL_DELTAS
        }
        for reward, end in LABELS.items()
    }


def format_table(rows):
    """The lines of a table: a row each, in experiment 5 with texts; in 3 a matrix a reward."""
    if rows[0]["table"] == TITLES["3"]:
        lines = []
        for reward, deltas in find_grid(rows).items():
            cells = [[f"{reward.replace('_', '-')} reward", *gs.LOSSES], ["---"] * 6]
            for delta, values in deltas.items():
                numbers = [format_cell(x, "exact_match") for x in values]
                cells += [[delta, *numbers]] if numbers else []
            lines += format_lines(cells) + [""]
        return lines
    names = [name for name in COLUMNS if name in rows[0]]
    cells = [["", *(COLUMNS[name][0] for name in names)], ["---"] * (len(names) + 1)]
    cells += [[row["label"], *(format_cell(row[name], name) for name in names)] for row in rows]
    if rows[0]["table"][0] != "5":
        return format_lines(cells)
    texts = [("median π(right token) where wrong", "most often wrong"), ("---", "---")]
    texts += [(row["left"], row["worst"]) for row in rows]
    return [f"{line} {a} | {b} |" for line, (a, b) in zip(format_lines(cells), texts)]


def write_results(results, out):
    """All rows to out/results.json and out/tables.md; temporary files, so never half a file."""
    rows = [{name: x for name, x in row.items() if name != "curves"} for row in results]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = {"results.json": f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n'}
    text["tables.md"] = ""
    for title in dict.fromkeys(row["table"] for row in rows):
        lines = format_table([row for row in rows if row["table"] == title])
        text["tables.md"] += "\n".join((f"## {title}", "", *lines, "", ""))
    for name, content in text.items():
        (out / f"{name}.tmp").write_text(content, encoding="utf-8")
        (out / f"{name}.tmp").replace(out / name)


# The run and its plots ============================================================================


def draw_learning(rows, out):
    """curves.png of experiment 2 by gs.draw_curves"""
    import matplotlib.pyplot as plt

    # the palette of Okabe and Ito, distinguishable with every kind of colour vision
    colours = ["#999999", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#D55E00"]
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=colours)
    results, settings, prompts = {}, {}, torch.tensor(gs.CLASSIC_PROMPTS)
    ladder = [row for row in rows if row["table"] == TITLES["2b"]]
    for (label, change), row in zip(gs.LADDER, ladder):
        settings = settings | change
        curves = {name: torch.tensor(curve) for name, curve in row["curves"].items()}
        results[label] = settings, SimpleNamespace(prompts=prompts, curves=curves)
    gs.draw_curves(results, out)


def draw_grid(rows, out):
    """grid.png of experiment 3"""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.6, 3.8), sharey=True, layout="constrained")
    for axis, (reward, deltas) in zip(axes, find_grid(rows).items()):
        cells = [[100 * mean_and_interval(x)[0] for x in row] for row in deltas.values()]
        cells = [row or [math.nan] * len(gs.LOSSES) for row in cells]  # not measured
        for y, x in itertools.product(range(len(deltas)), range(len(gs.LOSSES))):
            colour = "white" if cells[y][x] < 60 else "black"
            text = f"{cells[y][x]:.0f}".replace("nan", "")
            axis.text(x, y, text, ha="center", va="center", color=colour)
        image = axis.imshow(cells, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        axis.set_xticks(range(len(gs.LOSSES)), gs.LOSSES, rotation=30)
        axis.set_yticks(range(len(deltas)), deltas)
        axis.set(title=f"{reward.replace('_', '-')} reward", xlabel="loss")
    axes[0].set_ylabel("delta")
    figure.colorbar(image, ax=axes, label="sorted after 100 epochs, greedy, %")
    figure.savefig(out / "grid.png", dpi=150)


def prepare():
    """What each process needs."""
    torch.set_num_threads(1)  # the tensors are small: on a busy machine two threads are far slower
    torch.set_flush_denormal(True)  # a converged policy has denormal gradients, which are slow
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that prints


def run_tables(tables, out, results, train=map, **common):
    """Measure the rows of tables, equal ones once; print, write and add them to results.

    train: a map, such as that of a pool; common: settings for all rows, such as seed
    """
    plan, known = plan_rows(tables, **common), {}
    new = {str(written): full for *_, full, written in plan}
    measured = train(measure, new.values())
    for title, label, _, written in tqdm(plan, unit="row", disable=None):
        if str(written) not in known:  # then it is the next of those measured
            known[str(written)] = next(measured) | {"settings": written}
        row = known[str(written)] | {"table": title, "label": label}
        results.append(row)
        write_results(results, out)
        tqdm.write(f"{title[:2]} {label}: {format_cell(row['exact_match'], 'exact_match')}")


def run_study(out, processes=2, tables=TABLES, **common):
    """Measure everything and write it to the folder `out`; common: settings for all rows."""
    out.mkdir(parents=True, exist_ok=True)
    common = dict(seed=0) | common
    exact = dict(num_runs=common.get("num_runs", 32), seed=common["seed"])
    results = []
    with multiprocessing.get_context("spawn").Pool(processes, prepare) as pool:
        for (key, label), row in (measure_starts(**exact) | measure_gradients(**exact)).items():
            values = {name: as_list(x.double()) for name, x in row.items()}
            settings = {"settings": exact | {"trained": False}}
            results.append({"table": TITLES[key], "label": label} | values | settings)
        run_tables(tables, out, results, pool.imap, **common)
    results.sort(key=lambda row: row["table"])
    write_results(results, out)
    draw_learning(results, out)
    draw_grid(results, out)


if __name__ == "__main__":
    prepare()
    run_study(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
