# SPDX-License-Identifier: MIT
"""GRPO and its relatives from first principles, on a task small enough to check by enumeration.

A tiny model learns to sort a few numbers. It is never shown a right answer: it samples responses,
each gets a reward, and the policy gradient makes the better ones more likely. GRPO, Group Relative
Policy Optimization, samples a group of responses to each prompt (section 3), weighs each by how
much better it is than its group (4), takes several steps on the same samples with a clipped ratio
(6), and stays close to a reference model (8). Its relatives change one of these; PPO (9) learns a
value network in place of the group. Task, model and function names are those of lecture 17 of
Stanford's CS336 (2025), and so are the settings called "classic" here.

    python grpo_sort.py                      watch it learn, then experiments 1 to 3: 1 to 2 minutes
    python grpo_sort.py --quick              watch it learn, then experiment 1: ten seconds
    python grpo_sort.py --experiment 4 5     KL, group size, clip, PPO; prompts never trained on
    python grpo_sort.py --preset classic     the classic settings alone, with what they sample
    python grpo_sort.py --loss-mode cispo    the recipe with one setting changed (--help: all)

    1 task and rewards     4 deltas               7 worked example     10 training loop
    2 model                5 log-probabilities    8 KL, entropy        11 experiments
    3 sampling             6 losses               9 PPO                12 command line

Shapes are written [batch trial pos]: prompts, responses to each prompt (its group), tokens; `vocab`
different tokens, `dim` the model's width. → means "returns". Axes are counted from the end, because
any tensor may have one more in front: `run`, many trainings side by side. (!1) to (!7) mark lines
that are easy to get wrong. A function that says "Needs: torch" can be copied alone. Measured
numbers and the tables named, such as 6a, are in results/sort/.
"""

import argparse
import copy
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import re
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# 1. The task and its rewards ======================================================================

# The prompt is n numbers; the response should be the same numbers in ascending order. The model is
# the policy π: π(a | s) is its probability of answering the prompt s (the state) with the response
# a (the action). A reward R(s, a) says how good that was. For the prompt [3 2 4]:

#     response     distance     inclusion_ordering     exact
#     [2 3 4]          3                 5               1
#     [2 3 3]          2                 4               0
#     [3 2 4]          1                 4               0
#     [0 1 1]          0                 2               0

# What a reward gives for partial success decides what can be learned from it: the recipe of section
# 10 sorts 100 %, 77 % and 67 % of its prompts with the three. They judge the whole response
# (outcome supervision), sort_step_rewards judges each position (process supervision).


def sort_step_rewards(prompts, responses):
    """1 for each right position: int[batch pos], int[batch trial pos] → float[batch trial pos]"""
    if responses.shape[-1] != prompts.shape[-1]:  # would be broadcast
        raise ValueError(f"responses have {responses.shape[-1]} tokens, not {prompts.shape[-1]}")
    return (responses == prompts.sort(dim=-1).values.unsqueeze(-2)).float()


def sort_distance_reward(prompts, responses):
    """Right positions, 0 … n: int[batch pos], int[batch trial pos] → float[batch trial]"""
    return sort_step_rewards(prompts, responses).sum(dim=-1)


def sort_inclusion_ordering_reward(prompts, responses):
    """A point for each prompt token in the response and each pair of neighbours x ≤ y: 0 … 2n − 1.

    A prompt token counts as found however often it occurs, so this can be gamed: the wrong response
    [1 2 2] to [1 1 2] earns all 5 points. int[batch pos], int[batch trial pos] → float[batch trial]
    """
    equal = prompts[..., None, :, None] == responses[..., None, :]  # [batch trial pos pos]
    inclusion = equal.any(dim=-1).float().sum(dim=-1)  # [batch trial], over the prompt's tokens
    ordering = (responses[..., :-1] <= responses[..., 1:]).float().sum(dim=-1)  # [batch trial]
    return inclusion + ordering


def exact_sort_reward(prompts, responses):
    """All right, 1 or 0, mostly 0: int[batch pos], int[batch trial pos] → float[batch trial]"""
    return sort_step_rewards(prompts, responses).amin(dim=-1)


def compute_reward(prompts, responses, reward_fn):
    """The reward of every response: int[batch pos], int[batch trial pos] → float[batch trial].

    Raises ValueError for another shape: rewards for tokens would train without a word, and wrongly.
    """
    rewards = reward_fn(prompts, responses).float()
    if rewards.shape != responses.shape[:-1]:
        shapes = f"{list(rewards.shape)} for responses {list(responses.shape)}"
        raise ValueError(f"reward_fn must give one reward for a response, not {shapes}")
    return rewards


REWARDS = {
    "distance": sort_distance_reward,
    "inclusion_ordering": sort_inclusion_ordering_reward,
    "exact": exact_sort_reward,
}
CLASSIC_PROMPTS = ((1, 0, 2), (3, 2, 4), (1, 2, 3))

# 2. The model =====================================================================================

# One vector h summarises the prompt. Unlike in a language model, every position of the response is
# decided from h alone, not from the positions before it:

#     h        = Σ_p E[prompt_p] A_p     one encoding matrix A_p for each prompt position
#     logits_q = h B_q Eᵀ                one decoding matrix B_q for each response position

# E is the embedding [vocab dim], used at both ends. π(a | s) = Π_q softmax(logits_q)[a_q].

# init_scale, the standard deviation of E, matters more than any algorithm below. At 1 the untrained
# policy puts 85 % on one token, and what is never sampled is never rewarded. At 0.1 it is nearly
# uniform. This alone lifts exact match, the share of prompts that the trained model's likeliest
# response sorts, from 10 % to 62 % (table 2b).


class Model(nn.Module):
    """The policy. With `num_runs`, that many independent models on a leading run axis."""

    def __init__(
        self,
        vocab_size,
        embedding_dim,
        prompt_length,
        response_length,
        init_scale=1.0,
        num_runs=None,
        generator=None,
    ):
        super().__init__()
        runs = () if num_runs is None else (num_runs,)
        dim = embedding_dim

        def normal(*shape, scale):
            return nn.Parameter(scale * torch.randn(*runs, *shape, generator=generator))

        self.embedding = normal(vocab_size, dim, scale=init_scale)  # [vocab dim]
        self.encode_weights = normal(prompt_length, dim, dim, scale=dim**-0.5)  # [pos dim dim]
        self.decode_weights = normal(response_length, dim, dim, scale=dim**-0.5)  # [pos dim dim]

    def forward(self, prompts):
        """prompts int[batch pos] → logits float[batch pos vocab]"""
        E, A, B = self.embedding, self.encode_weights, self.decode_weights
        one_hot = F.one_hot(prompts, E.shape[-2]).to(E)  # [batch pos vocab]
        embedded = torch.einsum("...bpv,...vd->...bpd", one_hot, E)  # [batch pos dim]
        h = torch.einsum("...bpd,...pde->...be", embedded, A)  # [batch dim]
        # the same as h B_q Eᵀ for every q, in two large products
        decoded = h @ B.transpose(-3, -2).flatten(-2)  # [batch pos*dim]
        decoded = decoded.unflatten(-1, (-1, E.shape[-1])).flatten(-3, -2)  # [batch*pos dim]
        return (decoded @ E.mT).unflatten(-2, (-1, B.shape[-3]))  # [batch pos vocab]


# 3. Sampling ======================================================================================

# From the policy itself, no temperature, no top-k: section 5 gives log π of exactly this.


@torch.no_grad()
def generate_responses(prompts, model, num_responses, generator=None):
    """Sample `num_responses` responses to each prompt, each position from softmax(logits).

    prompts int[batch pos] → int[batch trial pos]
    """
    probs = model(prompts).softmax(dim=-1)  # [batch pos vocab]
    rows = probs.flatten(0, -2)  # [batch*pos vocab]
    samples = torch.multinomial(rows, num_responses, replacement=True, generator=generator)
    return samples.unflatten(0, probs.shape[:-1]).mT  # [batch trial pos]


@torch.no_grad()
def sorts_greedily(prompts, model):
    """Is the likeliest response to each prompt the sorted prompt? int[batch pos] → bool[batch]"""
    return (model(prompts).argmax(dim=-1) == prompts.sort(dim=-1).values).all(dim=-1)


# 4. From rewards to advantages (deltas) ===========================================================

# We climb the expected reward J = E_{a∼π}[R(s, a)] = Σ_a π(a | s) R(s, a). Sampling cannot be
# differentiated, but ∇π = π ∇log π makes the gradient a mean over samples, the policy gradient:

#     ∇J = Σ_a ∇π(a | s) R(s, a) = E_{a∼π}[ R(s, a) ∇log π(a | s) ]           (REINFORCE)

# "Make each sampled response more likely in proportion to its reward." Right on average, but noisy:
# if all rewards are positive, whatever happens to be sampled is pushed up. Subtracting a baseline
# b(s) changes nothing on average, because E[∇log π] = Σ_a ∇π = ∇1 = 0, and removes much of the
# noise. δ = R − b estimates the advantage: how much better than usual was this response?

# GRPO takes the mean of the group of G responses as baseline. That contains the response's own
# reward, which only scales the expected gradient by (G − 1)/G. RLOO takes the mean of the others;
# Adam cancels a constant factor, so here both train alike. GRPO then divides by the group's
# standard deviation: every prompt counts alike, whatever the scale and spread of its rewards. The
# price: the update no longer points exactly along ∇J (cosine 0.997, table 6a), and tiny differences
# become full-size δ. MaxRL (max_likelihood) divides by the mean instead, the success rate if
# rewards are 0 and 1. Rarely solved prompts then weigh more: large groups climb log J.

# With the recipe of section 10 a baseline lifts exact match from 75 % to 100 %. Which baseline it
# is hardly matters (table 3).


def compute_deltas(rewards, mode):
    """The weight δ of each response, from the rewards r of its group (the trial axis).

    rewards float[batch trial] → float[batch trial]; std divides by G − 1; the 1e-5 is ours.
    Raises ValueError for an unknown mode, or a group too small to compare. Needs: torch.
    """
    if rewards.dim() < 2 or (rewards.shape[-1] < 2 and mode not in ("rewards", "max_rewards")):
        raise ValueError(f"{mode} needs rewards [batch trial ≥ 2], not {list(rewards.shape)}")
    top, mean = rewards.amax(dim=-1, keepdim=True), rewards.mean(dim=-1, keepdim=True)  # [batch 1]
    # (!1) Equal rewards teach nothing: exactly 0, even if the mean is off by rounding.
    equal = top == rewards.amin(dim=-1, keepdim=True)  # [batch 1]
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]

    if mode == "rewards":  # REINFORCE, Williams 1992
        return rewards
    if mode == "centered_rewards":  # r − mean: Dr. GRPO, arXiv 2503.20783
        return centered
    if mode == "normalized_rewards":  # (r − mean) / std: GRPO, arXiv 2402.03300, section 4.1.2
        return centered / (rewards.std(dim=-1, keepdim=True) + 1e-5)
    if mode == "max_rewards":  # r if it is the group's maximum, else 0: CS336, lecture 17
        return torch.where(rewards == top, rewards, 0.0)
    if mode == "leave_one_out":  # r − mean of the others: RLOO, arXiv 2402.14740
        return centered * rewards.shape[-1] / (rewards.shape[-1] - 1)
    if mode == "batch_normalized":  # with the std of the whole batch: Lite PPO, arXiv 2508.08221
        return centered / (rewards.std(dim=(-2, -1), keepdim=True) + 1e-5)
    if mode == "max_likelihood":  # (r − mean) / mean, 0 if mean ≤ 0: MaxRL, arXiv 2602.02710
        return torch.where(mean > 0, centered / mean, 0.0)
    raise ValueError(f"{mode!r} is no mode of compute_deltas")


DELTAS = (
    "rewards", "centered_rewards", "normalized_rewards", "max_rewards", "leave_one_out",
    "batch_normalized", "max_likelihood",
)  # fmt: skip


def compute_process_deltas(step_rewards):
    """Process supervision, GRPO section 4.1.3: a δ for every token, from a reward for every token.

    Rewards are normalised over all steps of the group. δ sums them from a token's own step to the
    end: a token of a language model influences what follows, not what came before.
    step_rewards float[batch trial pos] → the same. Raises ValueError below two steps. Needs: torch.
    """
    if step_rewards.dim() < 3 or step_rewards.shape[-2:].numel() < 2:
        raise ValueError(f"a group needs two steps; step_rewards is {list(step_rewards.shape)}")
    group = dict(dim=(-2, -1), keepdim=True)  # over trial and pos: [batch 1 1]
    mean, std = step_rewards.mean(**group), step_rewards.std(**group)
    equal = step_rewards.amax(**group) == step_rewards.amin(**group)
    normalized = ((step_rewards - mean) / (std + 1e-5)).masked_fill(equal, 0.0)  # [batch trial pos]
    return normalized.flip(-1).cumsum(dim=-1).flip(-1)  # [batch trial pos]


# 5. Log-probabilities =============================================================================

# The sampled tokens are constants. Their log-probabilities depend on the parameters: every gradient
# of the policy flows through here. log π(a | s) is the sum over the tokens of a.


def compute_log_probs(prompts, responses, model):
    """log π of each token: int[batch pos], int[batch trial pos] → float[batch trial pos]"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    tokens = responses.mT  # [batch pos trial]
    if log_probs.shape[:-1] != tokens.shape[:-1]:  # only one of them has a run axis
        shape = torch.broadcast_shapes(log_probs.shape[:-1], tokens.shape[:-1])
        log_probs, tokens = log_probs.expand(*shape, -1), tokens.expand(*shape, -1)
    return log_probs.gather(-1, tokens).mT


# 6. Losses ========================================================================================

# Descent on −δ log π climbs J while the policy is the one that sampled (on policy). Sampling is
# expensive, so several gradient steps are made on the same samples. After the first, π differs from
# π_old, which sampled (off policy). The ratio ρ = π(a | s) / π_old(a | s) = exp(log π − log π_old)
# reweights these samples into a mean over π (importance sampling). Since ∇ρ = ρ ∇log π, the
# gradient can be pulled out:

#     ∇J = E_{a∼π}[δ ∇log π] = E_{a∼π_old}[ρ δ ∇log π] = ∇ E_{a∼π_old}[ρ δ]

# So the loss is −ρ δ. The ratio of a response is the product over its tokens, which swings wildly
# if they are many. PPO and GRPO give each token its own ratio: the same gradient at π = π_old, an
# approximation away from it. It can still grow, so PPO clips it: −min(ρ δ, clip(ρ, 1−ε, 1+ε) δ).

#     δ > 0    ρ > 1 + ε: raised enough, no gradient     ρ < 1 − ε: it fell instead, full gradient
#     δ < 0    ρ < 1 − ε: lowered enough, no gradient    ρ > 1 + ε: it rose instead, full gradient

# The right half is the work of the minimum. With ten steps on the same samples 32 of 32 runs learn
# to sort everything with the clip, 29 with −ρ δ, 19 with −δ log π (experiment 2).

# A common mistake is log π / log π_old. It is 1 at the start too, but both logarithms are negative:
# its gradient is −∇log π / |log π_old|, and it lowers what δ says to raise. The cosine of its mean
# update with ∇J is −0.995, that of ρ is 1 (table 6b).


def compute_loss(log_probs, deltas, mode, old_log_probs=None, epsilon=0.2, epsilon_high=None):
    """The policy loss to minimise, averaged over batch, trial and pos: a scalar, or float[run].

    log_probs, old_log_probs float[batch trial pos], all of one length, without padding; deltas
    float[batch trial], one for a response, or float[batch trial pos], one for a token; mode is one
    of LOSSES. Raises ValueError for an unknown mode or shapes that do not fit. Needs: torch.
    """
    if log_probs.dim() < 3 or deltas.shape not in (log_probs.shape[:-1], log_probs.shape):
        shapes = f"{list(deltas.shape)} with log_probs {list(log_probs.shape)}"
        raise ValueError(f"deltas must be [batch trial] or [batch trial pos], not {shapes}")
    if deltas.shape != log_probs.shape:
        deltas = deltas.unsqueeze(-1)  # [batch trial 1]: every token gets its response's δ
    if mode == "naive":  # −δ log π: REINFORCE
        return -(log_probs * deltas).mean(dim=(-3, -2, -1))
    if old_log_probs is None or old_log_probs.shape != log_probs.shape:
        raise ValueError(f"mode {mode!r} needs old_log_probs of the same shape as log_probs")

    # (!2) π_old is a constant. At π = π_old a gradient through both would cancel to zero.
    log_ratio = log_probs - old_log_probs.detach()  # [batch trial pos]
    if mode == "gspo":  # one ratio for a response, the geometric mean: GSPO, arXiv 2507.18071
        log_ratio = log_ratio.mean(dim=-1, keepdim=True)  # [batch trial 1]
    ratio = log_ratio.exp()  # (!3) never the quotient of the logarithms
    ceiling = 1 + (epsilon if epsilon_high is None else epsilon_high)  # DAPO, arXiv 2503.14476
    if mode == "unclipped":  # PPO, arXiv 1707.06347, eq. 6
        objective = ratio * deltas
    elif mode in ("clipped", "gspo"):  # PPO, eq. 7. (!4) the minimum: clips only where δ pushes on
        objective = torch.minimum(ratio * deltas, ratio.clamp(1 - epsilon, ceiling) * deltas)
    elif mode == "cispo":  # the clipped ratio as a constant weight: CISPO, arXiv 2506.13585
        objective = ratio.detach().clamp(max=ceiling) * deltas * log_probs
    else:
        raise ValueError(f"{mode!r} is no mode of compute_loss")
    return -objective.mean(dim=(-3, -2, -1))


LOSSES = ("naive", "unclipped", "clipped", "gspo", "cispo")

# 7. A worked example, to follow with a pencil =====================================================

EXAMPLE = """\
prompt [1 0 2], to be sorted; four responses, from a policy still uniform over three tokens

                       [0 1 2]   [0 1 1]   [0 2 1]   [1 0 0]
distance reward           3.00      2.00      1.00      0.00    right positions; mean 1.50, std 1.29
centered_rewards          1.50      0.50     -0.50     -1.50
normalized_rewards        1.16      0.39     -0.39     -1.16
leave_one_out             2.00      0.67     -0.67     -2.00
max_likelihood            1.00      0.33     -0.33     -1.00
max_rewards               3.00      0.00      0.00      0.00
gradient, centered     -0.1250   -0.0417    0.0417    0.1250    ∂ loss / ∂ log π of each token

Every token had probability 1/3 and has just been sampled, so every ratio is 1. The clipped loss
with centred rewards is minus the mean of δ: 0, as on the first step of every batch. Its gradient is
not 0: −δ / 12, for 12 tokens, raises the first two responses and lowers the others. The loss does
not measure progress, the reward does. When a token's log-probability has risen from −1.10 to −0.80,
its ratio is 1.35, above 1 + ε = 1.2. With δ > 0 it is not raised any further, with δ < 0 it is
still pushed down."""

# 8. The KL penalty and the entropy bonus ==========================================================

# The penalty ties the policy to a reference π_ref, so that it does not forget what the reward does
# not ask for. π_ref is the model before training or, where that is random as here, a copy of the
# policy, renewed now and then. (Renewed every epoch it is π_old. Some texts write the penalty that
# way, but keeping π near π_old is the clip's work.) The recipe needs no penalty. The divergence
# KL(π ‖ π_ref) = E_{a∼π}[log π − log π_ref] is 0 if both agree, and not symmetric. It is estimated
# from samples of π, with x = log π_ref − log π of a token:

#                              as an estimate                 as a loss it has the gradient of
#     k1 = −x                  unbiased, may be negative      only noise: E[∇log π] = 0
#     k2 = x²/2                biased, never negative         KL(π ‖ π_ref)
#     k3 = eˣ − x − 1          unbiased and never negative    KL(π_ref ‖ π), the other direction
#     k3_weighted = ρ k3       the same, off policy too       KL(π ‖ π_ref), off policy too

# The names are J. Schulman's ("Approximating KL divergence", 2020). The gradient of k3_weighted is
# ρ (k3 + 1 − eˣ) ∇log π = −ρ x ∇log π. The right column holds for independent tokens, as here (by
# enumeration, table 6c). Otherwise it misses what a token does to later ones (arXiv 2506.09477).
# Mind the sign of x: with log π − log π_ref "k3" estimates χ²(π ‖ π_ref) − KL(π ‖ π_ref), another
# divergence, and has the gradient of χ²/2.


def compute_kl_penalty(log_probs, ref_log_probs, estimator="k3", old_log_probs=None):
    """An estimate of KL(π ‖ π_ref) of a response: summed over pos, averaged over batch and trial.

    log_probs, ref_log_probs, old_log_probs float[batch trial pos] → scalar, or float[run]. Without
    old_log_probs ρ is 1, but keeps its gradient. For GRPO's β (eq. 3 is a mean over pos) use
    β / pos. Raises ValueError for an unknown estimator or other shapes. Needs: torch.
    """
    given = [x for x in (log_probs, ref_log_probs, old_log_probs) if x is not None]
    if log_probs.dim() < 3 or any(x.shape != log_probs.shape for x in given):
        raise ValueError(f"all must be [batch trial pos], not {[list(x.shape) for x in given]}")
    x = ref_log_probs.detach() - log_probs  # [batch trial pos]
    if estimator == "k1":
        kl = -x
    elif estimator == "k2":
        kl = x**2 / 2
    elif estimator == "k3":  # GRPO, arXiv 2402.03300, eq. 4
        kl = x.exp() - x - 1
    elif estimator == "k3_weighted":  # DeepSeek-V3.2, arXiv 2512.02556
        old_log_probs = log_probs if old_log_probs is None else old_log_probs
        kl = (log_probs - old_log_probs.detach()).exp() * (x.exp() - x - 1)
    else:
        raise ValueError(f"{estimator!r} is no estimator of compute_kl_penalty")
    return kl.sum(dim=-1).mean(dim=(-2, -1))


KL_ESTIMATORS = ("k1", "k2", "k3", "k3_weighted")


def compute_entropy(prompts, model):
    """Mean entropy of a token in nats, PPO's bonus (eq. 9): int[batch pos] → scalar, float[run]"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=(-2, -1))


# 9. PPO, which GRPO simplifies ====================================================================

# PPO needs no group. It learns the baseline: a second network, the critic V, predicts the reward
# still to come. Each token is now an action; V_t is V(prompt, tokens before t). How much the
# expected reward changed when token t appeared is the temporal-difference error e_t. A token's
# advantage is its own error plus those of the later tokens, discounted:

#     e_t = r_t + γ V_{t+1} − V_t
#     Â_t = Σ_{l≥0} (γλ)^l e_{t+l}        generalized advantage estimation (GAE); the token's δ

# r_t is the reward given with token t (here R with the last, else 0), V is 0 after the end, γ < 1
# makes later rewards count less. λ trades noise for trust in V: 1 telescopes to the reward to come
# minus V_t, unbiased and noisy; 0 trusts V completely. PPO maximises L_CLIP − c₁ L_VF + c₂ H (arXiv
# 1707.06347, eq. 9): the clipped objective, minus the squared error of V, plus the entropy.


class Critic(nn.Module):
    """V(prompt, tokens so far): one hidden layer over one-hot tokens. `num_runs` as in Model."""

    def __init__(
        self, vocab_size, prompt_length, response_length, hidden=64, num_runs=None, generator=None
    ):
        super().__init__()
        runs = () if num_runs is None else (num_runs,)
        features = (prompt_length + response_length) * vocab_size + response_length
        weights = torch.randn(*runs, features, hidden, generator=generator)
        self.hidden_weights = nn.Parameter(weights * (prompt_length + response_length) ** -0.5)
        self.value_weights = nn.Parameter(torch.zeros(*runs, hidden))  # so that V starts at 0
        self.vocab_size = vocab_size

    def forward(self, prompts, responses):
        """V before each token. int[batch pos], int[batch trial pos] → float[batch trial pos]"""
        length = responses.shape[-1]
        prompt = F.one_hot(prompts, self.vocab_size).flatten(-2).float()  # [batch pos*vocab]
        tokens = F.one_hot(responses, self.vocab_size).float()  # [batch trial pos vocab]
        # (!5) before[t, j] = 1 for j < t: V may not see the token whose advantage it is to give.
        before = torch.ones(length, length).tril(-1)  # [pos pos]
        prefix = torch.einsum("tj,...jv->...tjv", before, tokens)  # [batch trial pos pos vocab]
        position = torch.eye(length)  # [pos pos]
        parts = prompt[..., None, None, :], prefix.flatten(-2), position
        features = [x.expand(*responses.shape, -1) for x in parts]  # each [batch trial pos ·]
        weights = self.hidden_weights  # [feature hidden]
        hidden = torch.einsum("...btpf,...fh->...btph", torch.cat(features, dim=-1), weights).tanh()
        return torch.einsum("...btph,...h->...btp", hidden, self.value_weights)  # [batch trial pos]


def compute_gae(token_rewards, values, gamma=1.0, lam=0.95):
    """Generalized advantage estimation, arXiv 1506.02438, eq. 16; V after the last token is 0.

    token_rewards, values float[batch trial pos] → (advantages, returns), constants; returns are the
    critic's targets. With padding, mask both. Raises ValueError for other shapes. Needs: torch.
    """
    if token_rewards.shape != values.shape:
        shapes = f"{list(token_rewards.shape)}, {list(values.shape)}"
        raise ValueError(f"token_rewards and values must be [batch trial pos], not {shapes}")
    token_rewards, values = token_rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)  # [batch trial pos]
    next_value = advantage = torch.zeros_like(values[..., 0])  # [batch trial]
    for t in reversed(range(values.shape[-1])):
        error = token_rewards[..., t] + gamma * next_value - values[..., t]  # [batch trial]
        advantage = error + gamma * lam * advantage
        advantages[..., t] = advantage
        next_value = values[..., t]
    return advantages, advantages + values


# 10. The training loop ============================================================================

# Every epoch samples a group of responses to every prompt with the current policy, π_old, turns
# their rewards into deltas, and takes several gradient steps on these same samples. All runs are
# trained at once, on the sum of their losses; none influences another.

# What experiment 2 arrives at. The defaults of run_policy_gradient are the classic settings.
RECIPE = dict(
    init_scale=0.1, deltas_mode="normalized_rewards", loss_mode="clipped",
    reward_fn=sort_distance_reward, learning_rate=5e-3,
)  # fmt: skip
CHOICES = dict(
    deltas_mode=(*DELTAS, "process", "gae"), loss_mode=LOSSES, kl_estimator=KL_ESTIMATORS
)


def check_settings(prompts, **settings):
    """Raise ValueError for a setting that would silently break the training."""
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} {settings[name]!r} is unknown: {', '.join(choices)}")
    may_be_0 = "kl_penalty entropy_bonus value_coefficient gamma lam seed anneal".split()
    for name, value in settings.items():
        lowest = 0 if name in may_be_0 else 1e-12
        if isinstance(value, (int, float)) and not lowest <= value < math.inf:
            bound = "above 0" if lowest else "at least 0"
            raise ValueError(f"{name} must be {bound}, not {value}")
    prompts = torch.as_tensor(prompts)
    if prompts.dim() not in (2, 3) or prompts.numel() == 0 or prompts.is_floating_point():
        raise ValueError("prompts must be whole numbers, [batch pos] or [run batch pos]")
    if prompts.dim() == 3 and len(prompts) != settings["num_runs"]:
        raise ValueError(f"prompts has {len(prompts)} runs, num_runs is {settings['num_runs']}")
    if prompts.min() < 0 or prompts.max() >= (settings["vocab_size"] or math.inf):
        raise ValueError("prompts must hold numbers from 0 up, below vocab_size")


def draw_batch(prompts, batch_size, num_runs, generator):
    """Prompts for an epoch, drawn for each run: int[(run) prompt pos] → int[run batch pos]"""
    if batch_size is None:
        return prompts
    drawn = torch.randint(prompts.shape[-2], (num_runs, batch_size, 1), generator=generator)
    every = prompts.expand(num_runs, -1, -1)  # [run prompt pos]
    return every.gather(1, drawn.expand(-1, -1, prompts.shape[-1]))


def get_deltas(mode, prompts, responses, rewards, critic=None, gamma=1.0, lam=0.95):
    """(float[run batch trial], or for process and gae [run batch trial pos]; critic's targets)"""
    if mode == "process":
        return compute_process_deltas(sort_step_rewards(prompts, responses)), None
    if mode != "gae":
        return compute_deltas(rewards, mode), None
    token_rewards = torch.zeros(responses.shape)  # [run batch trial pos]
    token_rewards[..., -1] = rewards  # the whole reward comes with the last token
    with torch.no_grad():
        values = critic(prompts, responses)  # [run batch trial pos]
    advantages, returns = compute_gae(token_rewards, values, gamma, lam)
    # Normalised over all tokens of a run: not in the paper, but in most implementations.
    over_run = dict(dim=(-3, -2, -1), keepdim=True)
    mean, std = advantages.mean(**over_run), advantages.std(**over_run, correction=0)  # [run 1 1 1]
    return (advantages - mean) / (std + 1e-5), returns


def take_step(optimizer, loss, stopped):
    """A gradient step on loss float[run], for every run but those in stopped bool[run]."""
    optimizer.zero_grad()
    loss.sum().backward()  # (!6) not the mean, which would divide each gradient by num_runs
    # A stopped run keeps its parameters and Adam's moments. (Adam's step count is shared.)
    parameters = optimizer.param_groups[0]["params"] if stopped.any() else []
    moving = [x for p in parameters for x in (p.data, *optimizer.state[p].values()) if x.dim()]
    before = [x[stopped] for x in moving]
    optimizer.step()
    for x, kept in zip(moving, before):
        x[stopped] = kept


@torch.no_grad()
def measure_epoch(losses, rewards, prompts, model, ref_model):
    """What is recorded of an epoch → {name: float[run]}; names as in run_policy_gradient."""
    log_probs, ref_log_probs = (m(prompts).log_softmax(dim=-1) for m in (model, ref_model))
    probs = log_probs.exp()  # [run batch pos vocab], as those two
    right = log_probs.argmax(dim=-1) == prompts.sort(dim=-1).values  # [run batch pos]
    measured = {
        "loss": torch.stack(losses).mean(dim=0),
        "mean_reward": rewards.mean(dim=(-2, -1)),
        "exact_match": right.all(dim=-1).float().mean(dim=-1),
        "entropy": -(probs * log_probs).sum(dim=-1).mean(dim=(-2, -1)),
        "kl": (probs * (log_probs - ref_log_probs)).sum(dim=(-2, -1)).mean(dim=-1),
    }
    if not measured["entropy"].isfinite().all():
        raise ValueError("the policy is no longer finite: lower learning_rate")
    return measured


def run_policy_gradient(
    num_epochs=100,  # rounds of sampling
    num_steps_per_epoch=10,  # inner steps: gradient steps on the same samples
    compute_ref_model_period=10,  # epochs until π_ref is renewed; with 1 it is π_old
    num_responses=10,  # the group size G
    deltas_mode="rewards",  # of compute_deltas, or process (sort_step_rewards), or gae (PPO)
    loss_mode="naive",  # of compute_loss: naive is REINFORCE, clipped PPO and GRPO
    kl_penalty=0.0,  # coefficient β of the KL penalty
    reward_fn=sort_inclusion_ordering_reward,  # a function like those of section 1
    *,
    prompts=CLASSIC_PROMPTS,  # int[batch pos], or int[run batch pos] if they differ between runs
    batch_size: int = None,  # prompts drawn for an epoch; None: all of them
    vocab_size: int = None,  # None: the largest token of the prompts + 1
    embedding_dim=10,  # the model's width
    init_scale=1.0,  # standard deviation of the initial embedding
    learning_rate=1e-3,  # of Adam
    epsilon=0.2,  # clip range ε
    epsilon_high: float = None,  # upper clip range; None: epsilon
    target_kl: float = None,  # a run past this KL(π_old ‖ π), in nats, takes no more inner steps
    kl_estimator="k3",  # of compute_kl_penalty, with kl_penalty
    entropy_bonus=0.0,  # coefficient of the entropy
    anneal=False,  # learning rate and entropy bonus fall linearly to 0
    gamma=1.0,  # γ of gae
    lam=0.95,  # λ of gae
    value_coefficient=1.0,  # of the critic's loss; has little effect, as Adam rescales it
    num_runs=1,
    seed=0,
    on_epoch=None,  # called as on_epoch(record, prompts, responses, rewards, deltas, log_probs)
):
    """Train models side by side → an object with model, prompts, exact_match float[run] (greedy, on
    all prompts), records (a dict an epoch, means over runs), curves {name: float[epoch run]}.
    Names: epoch, step (gradient steps so far), loss (mean over inner steps), mean_reward; after it
    exact_match, entropy (nats a token), kl (exact KL(π ‖ π_ref) of a response, nats). Raises
    ValueError for settings that cannot work.
    """
    check_settings(**locals())
    prompts = torch.as_tensor(prompts)  # [batch pos] or [run batch pos]
    vocab_size, length = vocab_size or int(prompts.max()) + 1, prompts.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    model = Model(vocab_size, embedding_dim, length, length, init_scale, num_runs, generator)
    parameters, critic = list(model.parameters()), None
    if deltas_mode == "gae":
        critic = Critic(vocab_size, length, length, num_runs=num_runs, generator=generator)
        parameters += critic.parameters()
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    records, history = [], []

    for epoch in range(num_epochs):
        remaining = 1 - epoch / num_epochs if anneal else 1.0
        optimizer.param_groups[0]["lr"] = learning_rate * remaining
        if epoch % compute_ref_model_period == 0:  # (!7) frozen, and not the model's own tensors
            ref_model = copy.deepcopy(model).requires_grad_(False)

        batch = draw_batch(prompts, batch_size, num_runs, generator)  # [run batch pos]
        responses = generate_responses(batch, model, num_responses, generator)
        rewards = compute_reward(batch, responses, reward_fn)  # [run batch trial]
        deltas, returns = get_deltas(deltas_mode, batch, responses, rewards, critic, gamma, lam)
        if kl_penalty:
            ref_log_probs = compute_log_probs(batch, responses, ref_model)  # [run batch trial pos]

        losses, stopped = [], torch.zeros(num_runs, dtype=torch.bool)  # [run]
        for step in range(num_steps_per_epoch):
            log_probs = compute_log_probs(batch, responses, model)  # [run batch trial pos]
            if step == 0:
                old_log_probs = log_probs.detach()  # the policy has not moved since it sampled
            if target_kl is not None:
                stopped |= compute_kl_penalty(old_log_probs, log_probs) > target_kl
            loss = compute_loss(log_probs, deltas, loss_mode, old_log_probs, epsilon, epsilon_high)
            if kl_penalty:
                kl = compute_kl_penalty(log_probs, ref_log_probs, kl_estimator, old_log_probs)
                loss = loss + kl_penalty * kl
            if entropy_bonus:
                loss = loss - entropy_bonus * remaining * compute_entropy(batch, model)
            if critic is not None:
                error = critic(batch, responses) - returns  # [run batch trial pos]
                loss = loss + value_coefficient * error.square().mean(dim=(-3, -2, -1))  # [run]
            take_step(optimizer, loss, stopped)
            losses.append(loss.detach())

        history.append(measure_epoch(losses, rewards, batch, model, ref_model))
        record = {"epoch": epoch, "step": (epoch + 1) * num_steps_per_epoch}
        records.append(record | {name: x.mean().item() for name, x in history[-1].items()})
        if on_epoch is not None:
            on_epoch(records[-1], batch, responses, rewards, deltas, old_log_probs)

    curves = {name: torch.stack([h[name] for h in history]) for name in history[0]}
    found = dict(model=model, prompts=prompts, records=records, curves=curves)
    return SimpleNamespace(**found, exact_match=sorts_greedily(prompts, model).float().mean(dim=-1))


# 11. Experiments (the algorithm ends here) ========================================================

# A table is data: (title, base settings, changes). Each change of the base makes a row of 32 runs.
# Where the base is None, each change is added to the row above.

# In short: (1) the classic settings sort 6 to 12 %, (2) the recipe 100 %. (4) Groups of 2 are too
# small (19 of 32 runs sort all), 8 is enough. PPO does as well as GRPO, if λ is near 1. A KL
# penalty is harmless, except k1, which is not 0 off policy (5 of 32). target_kl only slows the
# recipe down. (5) Of unseen prompts 99.5 % are sorted, 89.75 % without the entropy bonus: what has
# become improbable is no longer sampled. max_likelihood mends that too (98 %, centred 89.5 %).
# fmt: off

# The best settings found for unseen prompts. split: of split_prompts
UNSEEN = RECIPE | dict(
    embedding_dim=32, deltas_mode="centered_rewards", num_responses=64, num_steps_per_epoch=1,
    learning_rate=3e-3, entropy_bonus=0.25, anneal=True,
    split=(5, 3, 100), num_epochs=1000, batch_size=32, num_runs=16)
EXACT = dict(reward_fn=exact_sort_reward)
MAX_LIKELIHOOD = EXACT | dict(deltas_mode="max_likelihood")
EXPERIMENTS = {
    1: [("1. The classic experiment: naive loss, 100 epochs", {},
         [dict(deltas_mode=d) for d in DELTAS[:3]])],
    2: [("2b. From the classic settings to the recipe", None,
         [{}, dict(deltas_mode="normalized_rewards"), dict(init_scale=0.1),
          dict(reward_fn=sort_distance_reward), dict(loss_mode="clipped"),
          dict(learning_rate=5e-3)]),
        ("2c. The recipe with one setting changed", RECIPE,
         [dict(deltas_mode="rewards"), dict(init_scale=1.0),
          dict(reward_fn=sort_inclusion_ordering_reward), EXACT, dict(loss_mode="naive"),
          dict(loss_mode="unclipped"), dict(learning_rate=1e-2), dict(learning_rate=2e-2)])],
    3: [("3. The recipe with every delta and loss", RECIPE,
         [dict(deltas_mode=d, loss_mode=m) for d in DELTAS for m in LOSSES]
         + [dict(deltas_mode=d, loss_mode="clipped") for d in ("process", "gae")])],
    4: [("4a. KL penalty", RECIPE,
         [dict(kl_estimator=k, kl_penalty=b) for k in KL_ESTIMATORS for b in (0.01, 0.1, 1.0)]
         + [dict(kl_penalty=b, compute_ref_model_period=n) for n in (100, 1) for b in (0.1, 1.0)]),
        ("4b. Group size", RECIPE, [dict(num_responses=G) for G in (2, 4, 8, 16, 32, 64)]),
        ("4c. Loss and inner steps on the same samples", RECIPE,
         [dict(loss_mode=m, num_steps_per_epoch=n)
          for m in ("clipped", "naive") for n in (1, 2, 5, 10, 20)]),
        ("4d. Clip range, at learning rate 1e-2", RECIPE | dict(learning_rate=1e-2),
         [dict(epsilon=low) for low in (0.05, 0.1, 0.2, 0.4, 0.8)]
         + [dict(epsilon_high=high) for high in (0.28, 0.5, 1.0)]),
        ("4e. Outcome and process supervision, and PPO with a critic", RECIPE,
         [dict(deltas_mode="normalized_rewards", num_responses=G) for G in (2, 4, 10)]
         + [dict(deltas_mode=d, num_responses=G) for d in ("process", "gae") for G in (1, 2, 4, 10)]
         + [dict(deltas_mode="gae", lam=lam) for lam in (0.0, 0.95, 1.0)]),
        ("4f. Target KL", RECIPE, [dict(target_kl=kl) for kl in (0.01, 0.03, 0.1)])],
    5: [("5a. 3 numbers from 5: train on 100 prompts, test on the other 25", UNSEEN,
         [{}, dict(entropy_bonus=0.0), dict(deltas_mode="normalized_rewards"),
          EXACT, EXACT | dict(entropy_bonus=0.0),
          MAX_LIKELIHOOD, MAX_LIKELIHOOD | dict(entropy_bonus=0.0)])],
}
COLUMNS = {  # metric: (heading, factor, decimals)
    "exact_match": ("exact match, %", 100, 1),
    "unseen": ("unseen, %", 100, 2),
    "solved": ("sort all, runs", 1, 0),
    "epochs": ("epochs to it", 1, 1),  # num_epochs if it never does
    "entropy": ("entropy, nats", 1, 2),
}
# fmt: on


def split_prompts(vocab_size, length, num_train, num_runs, seed):
    """All vocab^length prompts, split at random: int[run num_train pos], int[run rest pos].

    The prompts of zeros only and of largest numbers only are in the first: no other answer ends
    with 0, or begins with the largest number.
    """
    prompts = torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)
    extreme = (prompts == 0).all(dim=-1) | (prompts == vocab_size - 1).all(dim=-1)  # [prompt]
    order = torch.rand(num_runs, len(prompts), generator=torch.Generator().manual_seed(seed))
    order = (order - extreme.float()).argsort(dim=-1)  # [run prompt], the extremes first
    return prompts[order[:, :num_train]], prompts[order[:, num_train:]]


def measure(settings, on_epoch=None):
    """Train one row of a table → {metric: list[run], "curves": of run_policy_gradient, as lists}"""
    settings, unseen = dict(settings), None
    if split := settings.pop("split", None):
        settings["prompts"], unseen = split_prompts(*split, settings["num_runs"], settings["seed"])
    result = run_policy_gradient(**settings, on_epoch=on_epoch)
    row = {"exact_match": result.exact_match, "solved": (result.exact_match == 1).float()}
    if unseen is None:
        solved = result.curves["exact_match"] == 1  # bool[epoch run]
        # [run], the first epoch that sorts all, even if that is lost again; the last if none does
        first = torch.where(solved.any(dim=0), solved.float().argmax(dim=0) + 1, len(solved))
        row |= {"epochs": first.float(), "entropy": result.curves["entropy"][-1]}
    else:
        row["unseen"] = sorts_greedily(unseen, result.model).float().mean(dim=-1)
    row = {name: [round(x, 6) for x in values.tolist()] for name, values in row.items()}
    return row | {"curves": {name: curve.tolist() for name, curve in result.curves.items()}}


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


def format_table(rows):
    """The lines of a Markdown table, padded so that they read well in a terminal too."""
    names = [name for name in COLUMNS if name in rows[0]]
    lines = [["", *(COLUMNS[name][0] for name in names)], ["---"] * (len(names) + 1)]
    lines += [[row["label"], *(format_cell(row[name], name) for name in names)] for row in rows]
    return [f"| {label:<36} |" + "".join(f" {x:<14} |" for x in cells) for label, *cells in lines]


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


def run_tables(tables, out, results, pool=None, train=None, **common):
    """Measure, print and write the rows of tables, equal ones once, and add them to results.

    pool: processes that measure rows ahead; train: does it, None: measure; common: seed, num_runs
    """
    plan = []  # (title, label, settings to write down, settings to train with)
    for title, base, changes in tables:
        settings = {}
        for change in changes:
            settings = (settings if base is None else base) | change
            full = dict(num_runs=32) | settings | common
            key = {k: getattr(x, "__name__", x) for k, x in sorted(full.items())}
            label = ", ".join(
                key[k] if isinstance(key[k], str) else f"{k} {key[k]}" for k in change
            )
            label = ("+ " if base is None else "") + label if change else "base"
            plan.append((title, label, key, full))
    known = {str(row["settings"]): row for row in results}
    new = {str(key): full for *_, key, full in plan if str(key) not in known}
    trained = (pool.imap if pool else map)(train or measure, new.values())
    rows = []  # of the table so far
    with tqdm(plan, unit="row", disable=None) as bar:
        for title, label, key, _ in bar:
            bar.set_description(label)
            if str(key) not in known:  # then it is the next of trained
                known[str(key)] = next(trained) | {"settings": key}
            rows = [row for row in rows if row["table"] == title]
            rows.append(known[str(key)] | {"table": title, "label": label})
            results.append(rows[-1])
            write_results(results, out)
            lines = format_table(rows)
            bar.write("\n".join(lines[-1:] if rows[1:] else [f"\n## {title}\n", *lines]))


def draw_plots(results, out):
    """curves.png of the recipe and experiment 1, grid.png of experiment 3, if they are there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("matplotlib is not installed, so there are no plots: pip install matplotlib")
    plt.switch_backend("Agg")  # no window
    names = {"0.": "the recipe", "1.": "classic, {label}"}
    rows = [row for row in results if row["table"][:2] in names]
    lines = {names[row["table"][:2]].format(**row): row["curves"] for row in rows}
    if lines:
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
        titles = ("loss", "mean reward (of 5, recipe of 3)", "exact match, %")
        for axis, name, title in zip(axes, ("loss", "mean_reward", "exact_match"), titles):
            for label, curves in lines.items():
                points = torch.tensor([mean_and_interval(runs) for runs in curves[name]])
                mean, half = points.T * (100 if name == "exact_match" else 1)  # each [epoch]
                axis.plot(mean, label=label)
                axis.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.2, lw=0)
            axis.set(title=title, xlabel="epoch (10 gradient steps)")
            axis.grid(alpha=0.3)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(out / "curves.png", dpi=150)

    grid = {row["label"]: row["exact_match"] for row in results if row["table"][:2] == "3."}
    if grid:
        names = CHOICES["deltas_mode"]
        rows = [[grid.get(f"{d}, {m}", [math.nan]) for m in LOSSES] for d in names]
        cells = [[100 * mean_and_interval(runs)[0] for runs in row] for row in rows]
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        image = axis.imshow(cells, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, x in itertools.product(range(len(names)), range(len(LOSSES))):
            colour = "white" if cells[y][x] < 60 else "black"
            text = f"{cells[y][x]:.0f}".replace("nan", "")
            axis.text(x, y, text, ha="center", va="center", color=colour)
        axis.set_xticks(range(len(LOSSES)), LOSSES)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="loss", ylabel="delta")
        figure.colorbar(image, label="exact match after 100 epochs, %")
        figure.savefig(out / "grid.png", dpi=150)
    plt.close("all")


# 12. Command line =================================================================================


def show_epoch(record, prompts, responses, rewards, deltas, log_probs, count=None):
    """Print some epochs: what the first run sampled, the first `count` responses to each prompt."""
    epoch = record["epoch"]
    if epoch not in (0, 2, 5, 10) and (epoch + 1) % 100:
        return
    text = "\nepoch {epoch}: loss {loss:+.3f}, mean reward {mean_reward:.2f}; after it exact match "
    text += "{exact_match:.0%}, entropy {entropy:.2f} nats (means over all runs)"
    tqdm.write(text.format(**record))
    for b, prompt in enumerate(prompts.expand(len(responses), -1, -1)[0].tolist()):
        tqdm.write(f"  prompt {prompt}, sorted {sorted(prompt)}")
        for i in range(responses.shape[-2])[:count]:
            delta = " ".join(f"{x:+.2f}" for x in deltas[0, b, i].flatten().tolist())
            tqdm.write(
                f"    {responses[0, b, i].tolist()}   reward {rewards[0, b, i]:g}   "
                f"delta {delta}   log π {log_probs[0, b, i].sum():.2f}"
            )


def comma_separated(text):
    """'3,2,4' → [3, 2, 4]"""
    if not all(x.isdecimal() and len(x) < 4 for x in text.split(",")):
        raise argparse.ArgumentTypeError(f"needs numbers from 0 to 999, as 3,2,4, not {text!r}")
    return [int(x) for x in text.split(",")]


def make_parser():
    """The command line; one variant has the arguments of run_policy_gradient as flags."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    add = parser.add_mutually_exclusive_group().add_argument
    add("--quick", action="store_true", help="watch the recipe learn, then experiment 1 only")
    text = "only these: 1 classic, 2 recipe, 3 deltas and losses, 4 KL to PPO, 5 unseen prompts"
    add("--experiment", type=int, nargs="+", choices=EXPERIMENTS, help=text)
    add = parser.add_argument
    add("--out", type=Path, default="runs/sort", help="folder to write results to (%(default)s)")
    add("--runs", type=int, help="models side by side (32; 16 in experiment 5)")
    add("--seed", type=int, default=0, help="equal seeds give equal numbers (0)")
    add("--processes", type=int, default=2, help="rows trained at a time (%(default)s)")
    text = "Any of these trains one variant, prints what it samples, and writes nothing."
    add = parser.add_argument_group("one variant", text).add_argument
    add("--preset", choices=("recipe", "classic"), help="the settings to start from (recipe)")
    source = inspect.getsource(run_policy_gradient)
    for name, argument in inspect.signature(run_policy_gradient).parameters.items():
        if name in ("seed", "num_runs", "on_epoch"):
            continue
        default = RECIPE.get(name, argument.default)
        kind = type(default) if argument.annotation is argument.empty else argument.annotation
        options = dict(type=kind)
        if name == "prompts":
            options = dict(type=comma_separated, nargs="+", metavar="3,2,4")
        elif name in CHOICES or name == "reward_fn":
            options = dict(choices=CHOICES.get(name, REWARDS))
        elif kind is bool:
            options = dict(action="store_true", default=None)
        text = re.search(rf"\n    {name}\b.*  # (.*)", source)[1]  # the comment beside the argument
        text += f" ({getattr(default, '__name__', default)})"
        add("--" + name.replace("_", "-"), help=text, **options)
    return parser


def prepare():
    """What each process needs."""
    torch.set_num_threads(1)  # the tensors are small: on a busy machine two threads are far slower
    torch.set_flush_denormal(True)  # a converged policy has denormal gradients, which are slow
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that prints


def main(argv=None):
    """Run the command line. → exit status"""
    prepare()
    parser = make_parser()
    args = parser.parse_args(argv)
    common = dict(seed=args.seed) if args.runs is None else dict(seed=args.seed, num_runs=args.runs)
    others = ("quick", "experiment", "out", "runs", "seed", "processes", "preset")
    variant = {k: x for k, x in vars(args).items() if x is not None and k not in others}
    if (variant or args.preset) and (args.quick or args.experiment):
        parser.error("--quick and --experiment have their own settings: leave the other flags out")
    if len({len(prompt) for prompt in variant.get("prompts", [])}) > 1:
        parser.error("--prompts must be of one length, such as --prompts 3,2,4 1,2,3")
    if "reward_fn" in variant:
        variant["reward_fn"] = REWARDS[variant["reward_fn"]]
    try:
        if variant or args.preset:
            settings = dict(num_runs=32) | ({} if args.preset == "classic" else RECIPE) | common
            exact = run_policy_gradient(**settings | variant, on_epoch=show_epoch).exact_match
            print(
                f"\n{(exact == 1).sum()} of {len(exact)} runs sort every prompt, "
                f"on average they sort {exact.mean():.1%}"
            )
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        results, Pool = [], multiprocessing.get_context("spawn").Pool
        with Pool(args.processes, prepare) if args.processes > 1 else nullcontext() as pool:
            if args.experiment is None:
                print(EXAMPLE)
                show = functools.partial(measure, on_epoch=functools.partial(show_epoch, count=3))
                recipe = [("0. The recipe", RECIPE, [{}])]
                run_tables(recipe, args.out, results, train=show, **common)
            numbers = args.experiment or ((1,) if args.quick else (1, 2, 3))
            tables = [table for n in numbers for table in EXPERIMENTS[n]]
            run_tables(tables, args.out, results, pool, **common)
        draw_plots(results, args.out)
        print(f"\nwritten to {args.out}: {', '.join(sorted(x.name for x in args.out.iterdir()))}")
    except KeyboardInterrupt:
        print("\ninterrupted; the rows that were printed are saved")
        return 130
    except (ValueError, OSError) as error:
        parser.error(str(error).split("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
