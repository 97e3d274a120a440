# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "tqdm", "matplotlib>=3.7"]
# ///
"""GRPO and its relatives from first principles, on a task small enough to check by enumeration.

A tiny model is asked to sort a few numbers. It gets no right answers to imitate, only a reward for
each response that it samples. This file holds everything that happens in between, in the order in
which it happens, and then measures what each choice does.

GRPO, Group Relative Policy Optimization, is a choice of parts: a group of responses to each prompt
(section 3), each weighted by how much better it was than its group (4), the clipped loss (6) and,
if wanted, the KL penalty k3 (8). PPO, Proximal Policy Optimization, has a trained critic (9) in
place of the group; REINFORCE, RLOO, Dr. GRPO, DAPO, GSPO, CISPO exchange one of these parts or
leave it out. Task, model and function names follow lecture 17 of Stanford's CS336 (2025), whose
settings are "the classic experiment".

    python grpo_sort.py            the study, about two minutes on two CPU cores
    python grpo_sort.py --quick    a taste in ten seconds
    python grpo_sort.py --full     wider sweeps and a larger task: what made results/sort/
    python grpo_sort.py --delta centered_rewards --loss cispo     train one variant, watch it learn
    python grpo_sort.py --help     every setting

The algorithm is sections 1 to 10; 11 and 12 measure it, 13 is the command line.

    1 task and rewards    5 log-probabilities     9 PPO: critic, GAE    13 command line
    2 model               6 losses               10 training loop
    3 sampling            7 worked example       11 exact gradients
    4 deltas              8 KL penalty, entropy  12 study

Shapes are written [batch trial pos]: `batch` prompts, `trial` responses sampled for each prompt
(together they are its group), `pos` tokens in each; `vocab` different tokens, `dim` width of the
model. The functions of sections 1 to 9 also take a leading `run` axis, many trainings side by side,
none influencing another; their comments leave it out, and so can you. → means "returns". Lines that
are easy to get wrong carry a number, (!1) to (!7): the README lists them and test_grpo.py guards
each. Functions whose docstring says "Needs: torch" can be copied alone. The file itself needs torch
and tqdm; matplotlib draws the plots.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # not needed here

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ==================================================================================================
# 1. The task and its rewards
#
# The prompt is n numbers, the response should be the same numbers in ascending order:
#
#     prompt [3 2 4]      right response [2 3 4]
#
# In the language of reinforcement learning the model is the policy π: π(a | s) is the probability
# that it answers the prompt s, the state, with the response a, the action. The reward R(s, a) says
# how good that was. Nobody shows the model the right response, so what a reward gives for responses
# that are partly right decides what can be learned from it.


def sorted_target(prompts, responses):
    """The right response to each prompt, shaped to compare with the sampled ones.

    prompts int[batch pos], responses int[batch trial pos] → int[batch 1 pos]. Raises ValueError if
    the shapes do not fit each other.
    """
    if responses.dim() < 3 or prompts.shape[-2:] != (responses.shape[-3], responses.shape[-1]):
        shapes = [list(prompts.shape), list(responses.shape)]
        raise ValueError(f"prompts and responses must have the same batch and pos, not {shapes}")
    return prompts.sort(dim=-1).values.unsqueeze(-2)


def sort_distance_reward(prompts, responses):
    """The number of positions that equal the sorted prompt: 0 … n.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial]
    """
    return (responses == sorted_target(prompts, responses)).float().sum(dim=-1)


def sort_inclusion_ordering_reward(prompts, responses):
    """One point for each prompt token that occurs in the response, one for each pair of neighbours
    x, y in the response with x ≤ y: 0 … 2n − 1.

    More generous than the distance reward, and exploitable: a prompt token is "included" however
    often it occurs, so for the prompt [1 1 2] the wrong response [1 2 2] earns the full 5 points.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial]
    """
    wanted = sorted_target(prompts, responses).unsqueeze(-1)  # [batch 1 pos 1]
    equal = wanted == responses.unsqueeze(-2)  # [batch trial pos pos], of prompt and of response
    found = equal.any(dim=-1)  # [batch trial pos], of the prompt
    inclusion = found.float().sum(dim=-1)  # [batch trial]
    ordering = (responses[..., :-1] <= responses[..., 1:]).float().sum(dim=-1)  # [batch trial]
    return inclusion + ordering


def exact_sort_reward(prompts, responses):
    """1 if the whole response equals the sorted prompt, else 0: cannot be gamed, but is mostly 0.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial]
    """
    return (responses == sorted_target(prompts, responses)).all(dim=-1).float()


def sort_step_rewards(prompts, responses):
    """A reward for every position, 1 where it is right: process supervision, where a reward for the
    whole response is called outcome supervision.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial pos]
    """
    return (responses == sorted_target(prompts, responses)).float()


def compute_reward(prompts, responses, reward_fn):
    """The reward of every response, by one of the functions above or your own of the same shapes.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial]
    """
    return reward_fn(prompts, responses)


REWARDS = {
    "distance": sort_distance_reward,
    "inclusion_ordering": sort_inclusion_ordering_reward,
    "exact": exact_sort_reward,
}
CLASSIC_PROMPTS = ((1, 0, 2), (3, 2, 4), (1, 2, 3))  # the training set of the classic experiment

# ==================================================================================================
# 2. The model
#
# Small, and not autoregressive: all positions of the response are decided at once, independently of
# each other, from one vector that summarises the prompt.
#
#     h        = Σ_p E[prompt_p] A_p      one encoding matrix A_p for each prompt position
#     logits_q = h B_q Eᵀ                 one decoding matrix B_q for each response position
#
# E is the embedding [vocab dim], used at both ends, and h a row of `dim` numbers. The policy is
# π(a | s) = Π_q softmax(logits_q)[a_q].
#
# `init_scale` is the standard deviation of E. E enters twice, so the initial logits have a standard
# deviation of about init_scale² √(n dim): 5.5 at scale 1, where the untrained policy already puts
# most of each token's probability on one value, and 0.05 at 0.1, where it is nearly uniform. What
# is never sampled can never be rewarded (experiment 2).


class Model(nn.Module):
    """The policy. With `num_runs`, that many independent models on a leading run axis."""

    def __init__(self, vocab_size, embedding_dim, prompt_length, response_length,
                 init_scale=1.0, num_runs=None, generator=None):
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
        if prompts.shape[-1] != (n := self.encode_weights.shape[-3]):
            raise ValueError(f"prompts have {prompts.shape[-1]} positions, not prompt_length = {n}")
        E = self.embedding
        one_hot = F.one_hot(prompts, E.shape[-2]).to(E)  # [batch pos vocab]
        embedded = torch.einsum("...bpv,...vd->...bpd", one_hot, E)  # [batch pos dim]
        h = torch.einsum("...bpd,...pde->...be", embedded, self.encode_weights)  # [batch dim]
        decoded = torch.einsum("...be,...qed->...bqd", h, self.decode_weights)  # [batch pos dim]
        return torch.einsum("...bqd,...vd->...bqv", decoded, E)  # [batch pos vocab]


# ==================================================================================================
# 3. Sampling
#
# The rollout: draw a group of responses for every prompt, from the policy itself and from nothing
# else. No temperature, no top-k: the log-probabilities of section 5 must belong to the distribution
# that the samples came from.


@torch.no_grad()
def generate_responses(prompts, model, num_responses, generator=None):
    """Sample `num_responses` responses to each prompt, each position from softmax(logits).

    prompts int[batch pos] → int[batch trial pos]
    """
    probs = model(prompts).softmax(dim=-1)  # [batch pos vocab]
    samples = torch.multinomial(  # [batch*pos trial]
        probs.flatten(0, -2), num_responses, replacement=True, generator=generator
    )
    return samples.unflatten(0, probs.shape[:-1]).movedim(-1, -2)  # [batch trial pos]


@torch.no_grad()
def sorts_greedily(prompts, model):
    """Whether the most likely response to each prompt is the sorted prompt.

    prompts int[batch pos] → bool[batch]
    """
    chunks = prompts.split(8192, dim=-2)  # 100,000 prompts in every run at once would be gigabytes
    right = [(model(p).argmax(dim=-1) == p.sort(dim=-1).values).all(dim=-1) for p in chunks]
    return torch.cat(right, dim=-1)


def compute_exact_match(prompts, model):
    """The greedy exact-sort rate: int[batch pos] → scalar, or float[run]."""
    return sorts_greedily(prompts, model).float().mean(dim=-1)


# ==================================================================================================
# 4. From rewards to advantages (deltas)
#
# We climb the expected reward J = E_{a∼π}[R(s, a)] = Σ_a π(a | s) R(s, a), the mean reward of what
# the policy samples. Its gradient ∇J by the model's parameters cannot be taken through the
# sampling, but ∇π = π ∇log π turns it into a mean over samples again, the policy gradient:
#
#     ∇J = Σ_a ∇π(a | s) R(s, a) = E_{a∼π}[ R(s, a) ∇log π(a | s) ]        (REINFORCE)
#
# "Make each sampled response more likely in proportion to its reward." That is right on average but
# noisy: if all rewards are positive, everything sampled is pushed up. Subtracting a baseline b(s)
# changes nothing in expectation, since E[∇log π] = Σ_a ∇π = ∇1 = 0, and may remove much of the
# noise. The weight that is left, δ = R − b, estimates the advantage: how much better than usual was
# this?
#
# PPO learns b(s) with a second network (section 9). GRPO samples a group of G responses to the same
# prompt and takes the group's mean. That contains the response's own reward: R − mean is (G − 1)/G
# times R − mean of the others, so the expected gradient keeps its direction and is shorter by that
# factor. RLOO leaves the own reward out. (Adam, which trains here, cancels a constant factor on δ,
# so the two differ only where something else stands beside δ in the loss.)
#
# GRPO also divides by the group's standard deviation. Then δ does not depend on the scale of the
# reward, and a prompt with small differences in reward counts as much as one with large ones. That
# is also the price: prompts weighted by 1/std no longer add up to the direction of ∇J (experiment
# 6a), and a group whose rewards differ by a trifle is blown up to full size.
#
# A small example of what a baseline does: the rewards 11, 9 (first prompt) and 0, 2 (second prompt)
# have a standard deviation of 5.32, most of it the difference between the prompts, which says
# nothing about the responses; minus each prompt's mean, +1, −1, −1, +1, it is 1.15.


def compute_deltas(rewards, mode):
    """The weight δ of each response, from the rewards of its group.

    rewards float[batch trial] → float[batch trial]; r is one of them, its group the trial axis, and
    std that of torch, whose variance divides by G − 1

    mode                  δ                                        source
    rewards               r                                        REINFORCE, Williams 1992
    centered_rewards      r − mean                                 Dr. GRPO, arXiv 2503.20783
    normalized_rewards    (r − mean) / (std + 1e-5)                GRPO, arXiv 2402.03300, § 4.1.2
    max_rewards           r if it is the group's maximum, else 0   CS336, lecture 17
    leave_one_out         r − mean of the others in the group      Kool 2019; RLOO, arXiv 2402.14740
    batch_normalized      (r − mean) / (std of all r + 1e-5)       Lite PPO, arXiv 2508.08221

    The baseline variant of REINFORCE++ (arXiv 2501.03262) is like batch_normalized, but with the
    std of r − mean over the batch. 1e-5 is not in the papers' formulas.
    Raises ValueError for an unknown mode, a shape without a group, or a group too small to compare.
    Needs: torch.
    """
    if rewards.dim() < 2:
        raise ValueError(f"rewards must be [batch trial], not {list(rewards.shape)}")
    group_size = rewards.shape[-1]
    if mode in ("normalized_rewards", "leave_one_out", "batch_normalized") and group_size < 2:
        raise ValueError(f"mode {mode} compares the responses of a group: rewards needs ≥ 2 trials")
    top, mean = rewards.amax(dim=-1, keepdim=True), rewards.mean(dim=-1, keepdim=True)  # [batch 1]
    # (!1) A group with equal rewards has std 0, and its mean may be off by rounding: exactly 0
    # here, and 0/1e-5 rather than 0/0 below.
    equal = top == rewards.amin(dim=-1, keepdim=True)  # [batch 1]
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]

    if mode == "rewards":
        return rewards
    if mode == "centered_rewards":
        return centered
    if mode == "normalized_rewards":
        return centered / (rewards.std(dim=-1, keepdim=True) + 1e-5)
    if mode == "max_rewards":
        return torch.where(rewards == top, rewards, 0.0)
    if mode == "leave_one_out":
        # r − (Σ − r)/(G − 1) = (r − mean) · G/(G − 1)
        return centered * group_size / (group_size - 1)
    if mode == "batch_normalized":
        return centered / (rewards.std(dim=(-2, -1), keepdim=True) + 1e-5)
    raise ValueError(
        f"mode {mode!r} is unknown; it may be rewards, centered_rewards, normalized_rewards, "
        "max_rewards, leave_one_out or batch_normalized"
    )


DELTAS = (
    "rewards", "centered_rewards", "normalized_rewards",
    "max_rewards", "leave_one_out", "batch_normalized",
)


def compute_process_deltas(step_rewards):
    """Process supervision: a δ for every token, from a reward for every token.

    The step rewards are normalised over all steps of the group together; the δ of a token is the
    sum of the normalised rewards from its own step to the end, since a token of a language model
    influences what comes after it and nothing before. (In the model above it influences neither.)
    Source: GRPO, arXiv 2402.03300, section 4.1.3.

    step_rewards float[batch trial pos] → float[batch trial pos]. Raises ValueError if a group has
    fewer than two steps. Needs: torch.
    """
    if step_rewards.dim() < 3 or step_rewards.shape[-2] * step_rewards.shape[-1] < 2:
        raise ValueError(
            "step_rewards must be [batch trial pos] with at least two steps in a group, "
            f"not {list(step_rewards.shape)}"
        )
    group = dict(dim=(-2, -1), keepdim=True)  # over trial and pos: [batch 1 1]
    mean, std = step_rewards.mean(**group), step_rewards.std(**group)
    equal = step_rewards.amax(**group) == step_rewards.amin(**group)
    normalized = ((step_rewards - mean) / (std + 1e-5)).masked_fill(equal, 0.0)  # [batch trial pos]
    return normalized.flip(-1).cumsum(dim=-1).flip(-1)  # [batch trial pos], Σ from pos to the end


# ==================================================================================================
# 5. Log-probabilities
#
# The sampled tokens are constants, but their log-probabilities under the current model depend on
# its parameters: every gradient of the policy flows through here. Tokens of a response are
# independent in this model, so log π(a | s) = Σ_q log π(a_q | s), the sum over its tokens.


def compute_log_probs(prompts, responses, model):
    """log π(token | prompt) of every token of every response.

    prompts int[batch pos], responses int[batch trial pos] → float[batch trial pos]
    """
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    by_pos = responses.movedim(-2, -1)  # [batch pos trial]
    if responses.dim() < 3 or by_pos.shape[-3:-1] != log_probs.shape[-3:-1]:
        raise ValueError(
            f"responses must be [batch trial pos] with batch and pos {list(log_probs.shape[-3:-1])}"
            f" as in the prompts and the model, not {list(responses.shape)}"
        )
    # A run axis that only one of them has is broadcast.
    shape = torch.broadcast_shapes(log_probs.shape[:-1], by_pos.shape[:-1])
    log_probs = log_probs.expand(*shape, -1).gather(-1, by_pos.expand(*shape, -1))
    return log_probs.movedim(-1, -2)  # [batch trial pos]


# ==================================================================================================
# 6. Losses
#
# Descent on the naive loss −δ log π climbs the policy gradient, but only while the policy is the
# one that drew the samples ("on-policy"). Sampling is expensive, so one batch of samples is used
# for several gradient steps, and after the first of them the policy π is no longer π_old, which
# sampled ("off-policy"). Importance sampling corrects for that, E_{a∼π}[δ] = E_{a∼π_old}[ρ δ], with
# the ratio
#
#     ρ = π(a | s) / π_old(a | s) = exp(log π − log π_old)
#
# The ratio of a whole response is the product of its tokens' ratios, which swings wildly for long
# ones, so PPO and GRPO take each token with its own ratio. At π = π_old that is the same gradient
# (ρ = 1, ∇ρ = ∇log π; the mean over tokens in place of the sum only divides by their number),
# further away an approximation. There ρ may also explode, so PPO clips it:
#
#     loss = −min(ρ δ, clip(ρ, 1 − ε, 1 + ε) δ)
#
#     δ > 0    ρ > 1 + ε  raised enough: no gradient     ρ < 1 − ε  fell all the same: full gradient
#     δ < 0    ρ < 1 − ε  lowered enough: no gradient    ρ > 1 + ε  rose all the same: full gradient
#
# The left half holds the policy back where the samples still count. The right half is the work of
# the minimum: the clipped term alone would be flat there too, and such a token could not come back.
#
# The quotient log π / log π_old, which has been taught as this ratio, is not one. It too is 1 at
# the start, so the loss looks right; but both logarithms are negative, so its gradient is −∇log π /
# |log π_old|, and it lowers what δ says to raise (section 11 measures it).


def compute_loss(log_probs, deltas, mode, old_log_probs=None, epsilon=0.2, epsilon_high=None):
    """The policy loss to minimise, averaged over batch, trial and pos.

    log_probs, old_log_probs float[batch trial pos]; deltas float[batch trial], one for a response,
    or float[batch trial pos], one for a token → scalar, or float[run] with a leading run axis.
    epsilon_high is epsilon unless it is given.

    All responses have the same length here. With padding, set log_ratio to 0 there and take the
    means over tokens, gspo's too, as (x · mask).sum(-1) / mask.sum(-1). That is GRPO's average;
    DAPO divides the sum over all tokens by their number, Dr. GRPO by a constant.

    mode         the loss of one token, before the mean              source
    naive        −log π · δ                                          REINFORCE, Williams 1992
    unclipped    −ρ δ                                                PPO, arXiv 1707.06347, eq. 6
    clipped      −min(ρ δ, clip(ρ, 1−ε, 1+ε_high) δ)                 PPO, eq. 7; ε_high: DAPO,
                                                                     arXiv 2503.14476
    gspo         clipped, with one ρ for all tokens of a response:   GSPO, arXiv 2507.18071, where
                 exp(mean over pos of (log π − log π_old))           ε = 3e-4 and ε_high = 4e-4
    cispo        −min(ρ, 1+ε_high).detach() · δ · log π              CISPO, arXiv 2506.13585

    Raises ValueError for an unknown mode, shapes that do not fit, or a missing old_log_probs.
    Needs: torch.
    """
    if mode not in ("naive", "unclipped", "clipped", "gspo", "cispo"):
        raise ValueError(f"mode {mode!r} is unknown: naive, unclipped, clipped, gspo or cispo")
    if deltas.shape == log_probs.shape[:-1]:
        deltas = deltas.unsqueeze(-1)  # [batch trial 1]: every token has the response's δ
    if log_probs.dim() < 3 or deltas.shape not in (log_probs.shape, (*log_probs.shape[:-1], 1)):
        shapes = [list(log_probs.shape), list(deltas.shape)]
        raise ValueError(
            "log_probs must be [batch trial pos] and deltas [batch trial] or [batch trial pos], "
            f"not {shapes}"
        )
    if mode == "naive":
        return -(log_probs * deltas).mean(dim=(-3, -2, -1))
    if old_log_probs is None:
        raise ValueError(f"mode {mode} needs old_log_probs, those of the policy that sampled")
    if old_log_probs.shape != log_probs.shape:
        shapes = [list(old_log_probs.shape), list(log_probs.shape)]
        raise ValueError(f"old_log_probs must have the shape of log_probs, not {shapes}")

    # (!2) π_old is a constant: at π = π_old a gradient through both would cancel to zero.
    log_ratio = log_probs - old_log_probs.detach()  # [batch trial pos]
    if mode == "gspo":
        log_ratio = log_ratio.mean(dim=-1, keepdim=True)  # [batch trial 1], one for the sequence
    ratio = log_ratio.exp()  # (!3) a difference of logarithms, exponentiated: never their quotient
    ceiling = 1 + (epsilon if epsilon_high is None else epsilon_high)
    if mode == "unclipped":
        objective = ratio * deltas
    elif mode == "cispo":
        # The clipped ratio is only a weight here, so every token keeps a gradient.
        objective = ratio.detach().clamp(max=ceiling) * deltas * log_probs
    else:
        # (!4) The minimum of both, not the clipped one alone: it acts only where δ pushes.
        objective = torch.minimum(ratio * deltas, ratio.clamp(1 - epsilon, ceiling) * deltas)
    return -objective.mean(dim=(-3, -2, -1))


LOSSES = ("naive", "unclipped", "clipped", "gspo", "cispo")

# ==================================================================================================
# 7. A worked example, to follow with a pencil
#
# The study prints it. With a single prompt the batch is the group, so batch_normalized equals
# normalized_rewards.

EXAMPLE = """\
prompt [1 0 2], to be sorted; four responses, from a policy still uniform over three tokens

                       [0 1 2]   [0 1 1]   [0 2 1]   [1 0 0]
distance reward           3.00      2.00      1.00      0.00    right positions; mean 1.50, std 1.29
centered_rewards          1.50      0.50     -0.50     -1.50
normalized_rewards        1.16      0.39     -0.39     -1.16
leave_one_out             2.00      0.67     -0.67     -2.00
max_rewards               3.00      0.00      0.00      0.00
gradient, centered     -0.1250   -0.0417    0.0417    0.1250    of the loss, by log π of each token

Every token had probability 1/3 and has just been sampled, so every ratio is 1, and the clipped loss
with centred rewards is minus the mean of δ: 0. It is 0 on every first step whose δ have mean 0, and
yet it teaches: its gradient, −δ / 12 for 12 tokens, raises the first two responses and lowers the
others. When a token's log-probability has risen from −1.10 to −0.80 its ratio is 1.35, above
1 + ε = 1.2: with δ > 0 it is not raised any further, with δ < 0 it is still pushed down."""

# ==================================================================================================
# 8. The KL penalty and the entropy bonus
#
# A penalty that ties the policy to a reference policy π_ref, so that it does not forget everything
# that the reward does not ask for. For a language model π_ref is the model before this training;
# here, where that is random, it is a copy renewed every ten epochs. The clip keeps π close to
# π_old, which drew the samples; the penalty keeps it close to π_ref. The distance is the
# Kullback-Leibler divergence, 0 if both agree and not symmetric, here estimated from samples of π:
#
#     KL(π ‖ π_ref) = E_{a∼π}[log π − log π_ref]        with x = log π_ref − log π of a token:
#
#                          as an estimate                  as a loss, its mean gradient is that of
#     k1 = −x              unbiased, may be negative       nothing: E[∇log π] = 0
#     k2 = x²/2            biased, never negative          KL(π ‖ π_ref)
#     k3 = eˣ − x − 1      unbiased and never negative     KL(π_ref ‖ π), the other direction
#
# k3 is the one in GRPO (arXiv 2402.03300, eq. 4); the names are from J. Schulman, "Approximating KL
# divergence", 2020. The last column holds with the samples fixed and drawn from π itself, as in the
# first inner step, and for tokens that are independent, as here (section 11 measures it). In an
# autoregressive model the loss misses what a token does to later ones (arXiv 2506.09477).


def compute_kl_penalty(log_probs, ref_log_probs, estimator="k3"):
    """An estimate of KL(π ‖ π_ref), summed over pos and averaged over batch and trial.

    The sum is the KL of a response. compute_loss is a mean over pos, so the same coefficient weighs
    pos times what it does in GRPO (eq. 3), which averages both; for that, divide by pos.

    log_probs, ref_log_probs float[batch trial pos], no padding → scalar, or float[run]. Raises
    ValueError for an unknown estimator or shapes that differ. Needs: torch.
    """
    if ref_log_probs.shape != log_probs.shape or log_probs.dim() < 3:
        shapes = [list(log_probs.shape), list(ref_log_probs.shape)]
        raise ValueError(f"log_probs and ref_log_probs must be [batch trial pos], not {shapes}")
    x = ref_log_probs.detach() - log_probs  # [batch trial pos]
    if estimator == "k1":
        kl = -x
    elif estimator == "k2":
        kl = x**2 / 2
    elif estimator == "k3":
        kl = x.exp() - x - 1
    else:
        raise ValueError(f"estimator {estimator!r} is unknown; it may be k1, k2 or k3")
    return kl.sum(dim=-1).mean(dim=(-2, -1))


def compute_entropy(prompts, model):
    """Mean entropy of a response token in nats: 0 if it is certain, log(vocab) if it is uniform.

    As a bonus, subtracted from the loss, it keeps the policy from deciding too early (PPO, eq. 9).

    prompts int[batch pos] → scalar, or float[run]
    """
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=(-2, -1))


def compute_exact_kl(prompts, model, ref_model):
    """KL(π ‖ π_ref) of a response in nats, from the full distributions: no samples, no estimator.

    Positions are independent, so it is the sum over pos of Σ_v π(v) (log π(v) − log π_ref(v)).

    prompts int[batch pos] → scalar, the mean over the prompts, or float[run]
    """
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    ref_log_probs = ref_model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=(-2, -1)).mean(dim=-1)


# ==================================================================================================
# 9. PPO, the algorithm that GRPO simplifies
#
# PPO has no group. It learns the baseline: a second network, the critic V, predicts the reward that
# is still to come. Each token is an action of its own now, and the state before it is the prompt
# and the tokens so far. (The model above ignores those; the critic does not.) A token's advantage
# is the change in the expected reward when it appears, the temporal-difference error e_t, plus
# those of the later tokens, discounted:
#
#     e_t = r_t + γ V_{t+1} − V_t          was token t better than V expected?
#     Â_t = Σ_{l≥0} (γλ)^l e_{t+l}         generalized advantage estimation (GAE); the token's δ
#
# r_t is the reward given with token t (here R with the last one, else 0), the discount γ makes
# later rewards count less (here it is 1), and V = 0 after the end. With λ = 1 the sum telescopes to
# the reward to come minus V_t, unbiased and noisy; with λ = 0 it trusts V completely. The critic is
# trained at the same time by least squares: what is minimised is −L_CLIP + c₁ L_VF − c₂ H, with the
# clipped objective of section 6, the squared error L_VF of V and the entropy H. (PPO, arXiv
# 1707.06347, eq. 9, maximises: there the value loss is subtracted.)


class Critic(nn.Module):
    """V(prompt, tokens so far): one hidden layer over one-hot tokens. `num_runs` as in Model."""

    def __init__(
        self, vocab_size, prompt_length, response_length, hidden=64, num_runs=None, generator=None
    ):
        super().__init__()
        runs = () if num_runs is None else (num_runs,)
        features = (prompt_length + response_length) * vocab_size + response_length  # see forward
        weights = torch.randn(*runs, features, hidden, generator=generator)
        self.hidden_weights = nn.Parameter(weights * (prompt_length + response_length) ** -0.5)
        self.value_weights = nn.Parameter(torch.zeros(*runs, hidden))  # so that V starts at 0
        self.vocab_size = vocab_size

    def forward(self, prompts, responses):
        """V before each token. int[batch pos], int[batch trial pos] → float[batch trial pos]"""
        length = responses.shape[-1]
        shape = (*responses.shape, -1)  # what every feature is expanded to: [batch trial pos ·]
        prompt = F.one_hot(prompts, self.vocab_size).flatten(-2).float()  # [batch pos*vocab]
        tokens = F.one_hot(responses, self.vocab_size).float()  # [batch trial pos vocab]
        # (!5) before[t, j] = 1 for j < t: V may not see the token whose advantage it is to give.
        before = torch.ones(length, length).tril(-1)  # [pos pos]
        prefix = torch.einsum("tj,...jv->...tjv", before, tokens)  # [batch trial pos pos vocab]
        position = torch.eye(length)  # [pos pos]
        features = torch.cat(
            [prompt[..., None, None, :].expand(shape), prefix.flatten(-2), position.expand(shape)],
            dim=-1,
        )  # [batch trial pos feature]
        hidden = torch.einsum("...btpf,...fh->...btph", features, self.hidden_weights).tanh()
        return torch.einsum("...btph,...h->...btp", hidden, self.value_weights)  # [batch trial pos]


def compute_gae(token_rewards, values, gamma=1.0, lam=0.95):
    """Generalized advantage estimation, arXiv 1506.02438, eq. 16; V after the last token is 0.

    token_rewards, values float[batch trial pos] → (advantages, returns) of the same shape, both
    constants; returns = advantages + values are the critic's targets. With padding behind the end,
    multiply both by the mask before. Raises ValueError if the shapes differ. Needs: torch.
    """
    if token_rewards.shape != values.shape:
        shapes = [list(token_rewards.shape), list(values.shape)]
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


# ==================================================================================================
# 10. The training loop
#
# for every epoch, which is a round of sampling:
#     sample a group of responses to every prompt with the current policy, π_old
#     reward them; turn rewards into deltas
#     for every inner step, a gradient step on these samples:
#         the log-probabilities now → loss (+ KL penalty − entropy bonus) → Adam
#
# The losses of all runs are summed and differentiated together. No run's parameters appear in
# another's loss, and Adam works on each number alone, so the runs stay independent. (They draw from
# one random generator, so the samples of a run depend on num_runs.)

# What experiment 2 arrives at; the defaults of run_policy_gradient are the classic experiment.
RECIPE = dict(
    init_scale=0.1,  # start near uniform: explore first
    deltas_mode="normalized_rewards",
    loss_mode="clipped",
    reward_fn=sort_distance_reward,
    learning_rate=5e-3,
)


@dataclass
class Result:
    """What a training leaves behind. `curves[name]` is float[epoch run], `records` its means."""

    model: Model  # with a run axis, also when num_runs is 1
    prompts: torch.Tensor  # [batch pos] or [run batch pos]
    records: list  # one dict an epoch
    exact_match: torch.Tensor  # [run], greedy, on all the prompts, at the end
    curves: dict
    num_parameters: int  # trained by one run, a critic's included


def check_settings(prompts, vocab_size, deltas_mode, loss_mode, kl_estimator, **numbers):
    """Raise ValueError for arguments of run_policy_gradient that cannot work, naming the first."""
    for name, value, choices in (
        ("deltas_mode", deltas_mode, (*DELTAS, "process", "gae")),
        ("loss_mode", loss_mode, LOSSES),
        ("kl_estimator", kl_estimator, ("k1", "k2", "k3")),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown; it may be {', '.join(choices)}")
    counts = "num_epochs num_steps_per_epoch num_responses num_runs batch_size embedding_dim "
    for bounds, holds, names in (
        ("at least 1", lambda x: x >= 1, counts + "compute_ref_model_period"),
        ("above 0", lambda x: x > 0, "learning_rate init_scale epsilon_high"),
        ("above 0 and below 1", lambda x: 0 < x < 1, "epsilon"),
        ("at least 0", lambda x: x >= 0, "kl_penalty entropy_bonus"),
        ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed"),
    ):
        for name in names.split():
            value = numbers[name]
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} must be {bounds}, not {value}")
    prompts = torch.as_tensor(prompts)
    if prompts.dim() not in (2, 3) or prompts.numel() == 0 or prompts.is_floating_point():
        raise ValueError(
            "prompts must be whole numbers [batch pos] or [run batch pos], "
            f"not {prompts.dtype} {list(prompts.shape)}"
        )
    if prompts.dim() == 3 and len(prompts) != numbers["num_runs"]:
        raise ValueError(f"prompts has {len(prompts)} runs, but num_runs is {numbers['num_runs']}")
    if prompts.min() < 0 or (vocab_size is not None and prompts.max() >= vocab_size):
        raise ValueError(f"prompts must be at least 0 and below vocab_size ({vocab_size})")


def estimate_advantages(mode, prompts, responses, rewards, critic=None):
    """Deltas of any mode, and the critic's targets: (deltas, returns), returns None without one.

    prompts int[batch pos], responses int[batch trial pos], rewards float[batch trial] → deltas
    [batch trial] or, for "process" and "gae", [batch trial pos]; returns [batch trial pos]. A run
    axis may lead.
    """
    if mode == "process":
        return compute_process_deltas(sort_step_rewards(prompts, responses)), None
    if mode != "gae":
        return compute_deltas(rewards, mode), None
    token_rewards = torch.zeros(responses.shape)  # [batch trial pos]
    token_rewards[..., -1] = rewards  # the whole reward comes with the last token
    with torch.no_grad():
        advantages, returns = compute_gae(token_rewards, critic(prompts, responses))
    # Not in the paper's formulas, but in most implementations: normalised over all tokens.
    mean = advantages.mean(dim=(-3, -2, -1), keepdim=True)  # [1 1 1]
    std = advantages.std(dim=(-3, -2, -1), keepdim=True, correction=0)  # [1 1 1]
    return (advantages - mean) / (std + 1e-5), returns


def draw_batch(prompts, batch_size, num_runs, generator):
    """Prompts for one epoch, others in each run, drawn with replacement → int[run batch pos]

    prompts int[prompt pos] or int[run prompt pos]
    """
    drawn = torch.randint(prompts.shape[-2], (num_runs, batch_size, 1), generator=generator)
    every = prompts.expand(num_runs, -1, -1)  # [run prompt pos]
    return every.gather(1, drawn.expand(-1, -1, prompts.shape[-1]))


@torch.no_grad()
def measure_policy(prompts, model, ref_model):
    """What the records say of the policy on these prompts → {name: float[run]}"""
    return {
        "exact_match": compute_exact_match(prompts, model),
        "entropy": compute_entropy(prompts, model),
        "kl": compute_exact_kl(prompts, model, ref_model),
    }


def run_policy_gradient(
    num_epochs=100,
    num_steps_per_epoch=10,  # gradient steps on one batch of samples
    compute_ref_model_period=10,  # epochs between refreshes of π_ref
    num_responses=10,  # the group size G
    # A mode of compute_deltas, "gae" (PPO), or "process" (learns from sort_step_rewards alone)
    deltas_mode="rewards",
    loss_mode="naive",
    kl_penalty=0.0,  # the coefficient β
    reward_fn=sort_inclusion_ordering_reward,
    *,
    prompts=CLASSIC_PROMPTS,  # int[batch pos], or int[run batch pos] for other prompts in each run
    batch_size=None,  # prompts drawn for an epoch; None takes all of them
    vocab_size=None,  # None: the largest token of the prompts + 1
    embedding_dim=10,
    init_scale=1.0,
    learning_rate=1e-3,
    epsilon=0.2,
    epsilon_high=None,
    kl_estimator="k3",
    entropy_bonus=0.0,
    anneal=False,  # learning rate and entropy bonus fall linearly to 0
    num_runs=1,
    seed=0,
    on_epoch=None,  # called as on_epoch(record, prompts, responses, rewards, deltas)
):
    """Train `num_runs` models side by side and return a Result.

    The records hold, for each epoch: epoch, step (gradient steps so far), loss (mean over the inner
    steps), mean_reward (of the responses sampled in this epoch), and for the policy after it, on
    this epoch's prompts: exact_match (greedy), entropy (nats per token), kl (exact KL(π ‖ π_ref) of
    a response, in nats). Result.exact_match is on all the prompts.

    The same arguments give the same numbers on the same machine. Raises ValueError for an argument
    that cannot work, before anything is trained, and if the policy is no longer finite.
    """
    check_settings(**locals())  # first, while locals() are the arguments and nothing else
    prompts = torch.as_tensor(prompts)
    vocab_size = int(prompts.max()) + 1 if vocab_size is None else vocab_size
    generator = torch.Generator().manual_seed(seed)
    length = prompts.shape[-1]
    model = Model(vocab_size, embedding_dim, length, length, init_scale, num_runs, generator)
    parameters = list(model.parameters())
    critic = None
    if deltas_mode == "gae":
        critic = Critic(vocab_size, length, length, num_runs=num_runs, generator=generator)
        parameters += critic.parameters()
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    records, curves = [], {}

    for epoch in range(num_epochs):
        remaining = 1 - epoch / num_epochs if anneal else 1.0
        optimizer.param_groups[0]["lr"] = learning_rate * remaining
        # (!6) A frozen copy: a reference that shares the model's tensors would be trained too.
        if epoch % compute_ref_model_period == 0:
            ref_model = copy.deepcopy(model).requires_grad_(False)

        batch = prompts  # [batch pos] or [run batch pos]
        if batch_size is not None:
            batch = draw_batch(prompts, batch_size, num_runs, generator)  # [run batch pos]

        # The rollout [run batch trial pos]: constants until the next epoch.
        responses = generate_responses(batch, model, num_responses, generator)
        rewards = compute_reward(batch, responses, reward_fn)  # [run batch trial]
        deltas, returns = estimate_advantages(deltas_mode, batch, responses, rewards, critic)
        if kl_penalty:
            ref_log_probs = compute_log_probs(batch, responses, ref_model)  # [run batch trial pos]

        losses = []
        for step in range(num_steps_per_epoch):
            log_probs = compute_log_probs(batch, responses, model)  # [run batch trial pos]
            if step == 0:
                old_log_probs = log_probs.detach()  # the policy has not moved since it sampled
            loss = compute_loss(log_probs, deltas, loss_mode, old_log_probs, epsilon, epsilon_high)
            if kl_penalty:
                kl = compute_kl_penalty(log_probs, ref_log_probs, kl_estimator)  # [run]
                loss = loss + kl_penalty * kl
            if entropy_bonus:
                loss = loss - entropy_bonus * remaining * compute_entropy(batch, model)
            if critic is not None:
                value_loss = (critic(batch, responses) - returns).square().mean(dim=(-3, -2, -1))
                # c₁ = 1: Adam makes its size immaterial, as policy and critic share no weights.
                loss = loss + value_loss  # [run]
            optimizer.zero_grad()
            # (!7) The sum over runs: their mean would divide each gradient by their number. (Adam
            # hides that; plain SGD does not.)
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())

        measured = {  # each float[run]
            "loss": torch.stack(losses).mean(dim=0),
            "mean_reward": rewards.mean(dim=(-2, -1)),
            **measure_policy(batch, model, ref_model),
        }
        if not measured["entropy"].isfinite().all():
            raise ValueError(f"epoch {epoch}: the policy is not finite: lower learning_rate")
        for name, values in measured.items():
            curves.setdefault(name, []).append(values)
        record = {"epoch": epoch, "step": (epoch + 1) * num_steps_per_epoch}
        record |= {name: values.mean().item() for name, values in measured.items()}
        records.append(record)
        if on_epoch is not None:
            on_epoch(record, batch, responses, rewards, deltas)

    curves = {name: torch.stack(values) for name, values in curves.items()}  # float[epoch run]
    exact_match = compute_exact_match(prompts, model)  # [run]
    size = sum(p.numel() for p in parameters) // num_runs
    return Result(model, prompts, records, exact_match, curves, size)


# ==================================================================================================
# 11. Gradients, exactly
#
# With 5 tokens and 3 positions there are only 125 responses to a prompt: expectations over them are
# sums, and what theory says about the estimators above can be measured without sampling error.
#
# A group of G sampled responses gives the estimate g = 1/G Σ_i δ_i s_i with the score
# s = ∇log π(a). δ_i depends on the rewards of the batch only, so it is enough to enumerate these:
# given its reward R a response has the mean score m = E[s | R], and the scores are independent.
#
#     E[g]  = Σ over rewards R_1 … R_G  P(R) ·   1/G Σ_i δ_i m_i
#     E|g|² = Σ over rewards R_1 … R_G  P(R) · ( |1/G Σ_i δ_i m_i|² + 1/G² Σ_i δ_i² Var[s | R_i] )
#
# with Var[s | R] = E[|s|² | R] − |m|², and the same averaged over the prompts of a batch. More
# axes: `params` all parameters, `level` a value of the reward, `group` a multiset of G levels,
# `combo` one group for each prompt.


def enumerate_responses(vocab_size, length):
    """All vocab^length responses: int[trial pos]."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)


def flat_gradient(objective, model, **kwargs):
    """∇ of float[run] by the model's parameters, flattened: float[run params]."""
    gradients = torch.autograd.grad(objective.sum(), list(model.parameters()), **kwargs)
    return torch.cat([g.flatten(1) for g in gradients], dim=1)


def compute_scores(prompts, responses, model):
    """∇log π(response | prompt), the score: one flat gradient for each response.

    model with a run axis, prompts int[batch pos], responses int[trial pos], the same for every
    prompt → float[run batch trial params]
    """
    everywhere = responses.expand(len(prompts), -1, -1)  # [batch trial pos]
    log_probs = compute_log_probs(prompts, everywhere, model).sum(dim=-1)  # [run batch trial]
    scores = [
        flat_gradient(log_probs[:, b, i], model, retain_graph=True)
        for b in range(len(prompts))
        for i in range(len(responses))
    ]
    return torch.stack(scores, dim=1).unflatten(1, (len(prompts), len(responses)))


def expected_update(probs, rewards, scores, mode, group_size):
    """Mean and variance of the policy gradient that `compute_deltas(·, mode)` estimates, exactly.

    Of every possible response: probs float[run batch trial], rewards float[batch trial] and scores
    float[run batch trial params] → mean float[run params], variance float[run]
    """
    levels = rewards.unique()  # [level], the values that a reward can take
    # [run batch trial level], the probability of each response in the column of its reward
    member = (rewards.unsqueeze(-1) == levels) * probs.unsqueeze(-1)
    level_probs = member.sum(dim=-2)  # [run batch level]
    floor = level_probs.clamp(min=1e-30)
    mean_score = torch.einsum("rbtl,rbtp->rblp", member, scores) / floor.unsqueeze(-1)
    second_moment = torch.einsum("rbtl,rbt->rbl", member, scores.square().sum(dim=-1)) / floor
    score_variance = second_moment - mean_score.square().sum(dim=-1)  # [run batch level]

    # Every multiset of rewards that a group can have, and every combination of them over a batch.
    batch = rewards.shape[-2]
    groups = torch.tensor(
        list(itertools.combinations_with_replacement(range(len(levels)), group_size))
    )  # [group trial]
    counts = F.one_hot(groups, len(levels)).sum(dim=1)  # [group level]
    orders = math.factorial(group_size) / torch.lgamma(counts + 1.0).sum(dim=-1).exp()  # [group]
    group_probs = orders * (level_probs.unsqueeze(-2) ** counts).prod(dim=-1)  # [run batch group]
    # [combo batch] and [run combo]
    combos = torch.cartesian_prod(*[torch.arange(len(groups))] * batch).view(-1, batch)
    combo_probs = math.prod(group_probs[:, b, combos[:, b]] for b in range(batch))

    deltas = compute_deltas(levels[groups[combos]], mode)  # [combo batch trial]
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
    expected = (probs * per_response).sum(dim=-1).mean(dim=-1)  # [run]
    return flat_gradient(expected, model, retain_graph=True)


def measure_ratios(log_probs, probs, rewards, exact, model):
    """Rows of experiment 6b: where a loss with the ratio, and one with the quotient, leads."""
    # compute_loss on each response alone, as a batch of one in a run of its own
    alone = log_probs[..., None, None, :]  # [run batch trial 1 1 pos]
    advantages = rewards - (probs * rewards).sum(dim=-1, keepdim=True)  # [run batch trial], exact
    ratio = compute_loss(alone, advantages[..., None, None], "unclipped", alone.detach())
    quotient = -(log_probs / log_probs.detach() * advantages.unsqueeze(-1)).mean(dim=-1)
    rows = {}  # both losses: [run batch trial]
    for label, loss in (("exp(log π − log π_old)", ratio), ("log π / log π_old", quotient)):
        update = -expected_gradient(loss, probs, model)  # [run params]
        rows["6b", label] = {"cosine": F.cosine_similarity(update, exact, dim=-1)}
    return rows


def measure_estimators(prompts, log_probs, ref_log_probs, probs, model, ref_model):
    """Rows of experiment 6c: mean and spread of k1, k2, k3, and the gradients that they have."""
    kl_to_ref = compute_exact_kl(prompts, model, ref_model)  # [run], KL(π ‖ π_ref)
    kl_from_ref = compute_exact_kl(prompts, ref_model, model)  # [run], KL(π_ref ‖ π)
    to_ref = flat_gradient(kl_to_ref, model, retain_graph=True)  # [run params]
    from_ref = flat_gradient(kl_from_ref, model, retain_graph=True)  # [run params]
    rows = {}  # each response alone, as in measure_ratios: [run batch trial 1 1 pos]
    alone, reference = log_probs[..., None, None, :], ref_log_probs[..., None, None, :]
    for estimator in ("k1", "k2", "k3"):
        estimate = compute_kl_penalty(alone, reference, estimator)  # [run batch trial]
        gradient = expected_gradient(estimate, probs, model)  # [run params]
        value = (probs * estimate).sum(dim=-1)  # [run batch]
        variance = (probs * estimate**2).sum(dim=-1) - value**2  # [run batch]
        rows["6c", estimator] = {
            "value": value.mean(dim=-1) / kl_to_ref,
            "spread": variance.mean(dim=-1).sqrt() / kl_to_ref,
            "error_to_ref": (gradient - to_ref).norm(dim=-1) / to_ref.norm(dim=-1),
            "error_from_ref": (gradient - from_ref).norm(dim=-1) / from_ref.norm(dim=-1),
        }
    return rows


def measure_gradients(num_runs, seed, group_size=4):
    """Rows of experiment 6, {(experiment, label): {metric: [run]}}: deltas, ratios, KL estimators.

    The policies are those of `num_runs` recipes stopped after five epochs, when the prompts have
    come to differ in difficulty; the reference is each run's initial policy.
    """
    prompts = torch.tensor(CLASSIC_PROMPTS)  # [batch pos]
    model = run_policy_gradient(**RECIPE, num_epochs=5, num_runs=num_runs, seed=seed).model
    generator = torch.Generator().manual_seed(seed)  # as that training began
    initial = Model(5, 10, 3, 3, RECIPE["init_scale"], num_runs, generator)
    responses = enumerate_responses(5, 3)  # [trial pos]
    everywhere = responses.expand(len(prompts), -1, -1)  # [batch trial pos]
    rewards = sort_distance_reward(prompts, everywhere)  # [batch trial]
    log_probs = compute_log_probs(prompts, everywhere, model)  # [run batch trial pos]
    ref_log_probs = compute_log_probs(prompts, everywhere, initial)  # [run batch trial pos]
    probs = log_probs.sum(dim=-1).exp().detach()  # [run batch trial], sums to 1 over trial
    scores = compute_scores(prompts, responses, model)  # [run batch trial params]
    exact = torch.einsum("rbt,rbtp->rp", probs * rewards, scores) / len(prompts)  # [run params], ∇J

    rows = {}
    for mode in DELTAS:
        mean, variance = expected_update(probs, rewards, scores, mode, group_size)
        rows["6a", mode] = {
            "cosine": F.cosine_similarity(mean, exact, dim=-1),
            "length": mean.norm(dim=-1) / exact.norm(dim=-1),
            "noise": variance.sqrt() / mean.norm(dim=-1),
        }
    rows |= measure_ratios(log_probs, probs, rewards, exact, model)
    rows |= measure_estimators(prompts, log_probs, ref_log_probs, probs, model, initial)
    return rows


# ==================================================================================================
# 12. The study
#
# The algorithm ends here; what follows is the experiments and their bookkeeping. A row of a table
# is one call: many runs side by side, each with its own initial weights and samples, summarised by
# their mean and its 95 % confidence interval.

# How unseen prompts were learned best of what was tried. Against RECIPE: a wider model, fresh
# samples for every step, and an entropy bonus that fades together with the learning rate. What
# counts is the bonus relative to δ: with deltas on another scale it has to be another number.
UNSEEN_RECIPE = RECIPE | dict(
    embedding_dim=32,
    deltas_mode="centered_rewards",
    num_responses=64,
    num_steps_per_epoch=1,
    learning_rate=3e-3,
    entropy_bonus=0.25,
    anneal=True,
)


def measure_training(**settings):
    """One row of experiments 1 to 4: metrics of a training, each [run]."""
    result = run_policy_gradient(**settings)
    solved = result.curves["exact_match"] == 1  # bool[epoch run]
    # [run], the first epoch that solves all, even if it is lost again; the last one if none does
    first = torch.where(solved.any(dim=0), solved.float().argmax(dim=0) + 1, len(solved))
    return {
        "exact_match": result.exact_match,
        "solved": (result.exact_match == 1).float(),
        "epochs": first.float(),
        "entropy": result.curves["entropy"][-1],
        "parameters": torch.tensor([result.num_parameters]),
        "curve": result.curves["exact_match"],
    }


def measure_starts(num_runs, seed):
    """Rows of experiment 2a: how decided the untrained policy is, at two embedding scales."""
    prompts, rows = torch.tensor(CLASSIC_PROMPTS), {}
    for scale in (1.0, 0.1):
        model = Model(5, 10, 3, 3, scale, num_runs, torch.Generator().manual_seed(seed))
        top = model(prompts).softmax(dim=-1).amax(dim=-1)  # [run batch pos], the likeliest token
        rows["2a", f"init_scale {scale}"] = {
            "entropy": compute_entropy(prompts, model),
            "top": top.mean(dim=(-2, -1)),
        }
    return rows


def split_prompts(vocab_size, length, num_train, num_runs, seed):
    """All vocab^length prompts, split at random into train and unseen, differently for each run.

    0 0 … 0 and its opposite, 9 9 … 9, are always in train: only their sorted answers have a 0 in
    the last place or a 9 in the first, so nothing else could teach it.

    → train int[run num_train pos], unseen int[run rest pos]
    """
    prompts = enumerate_responses(vocab_size, length)  # [prompt pos]
    extreme = (prompts == 0).all(dim=-1) | (prompts == vocab_size - 1).all(dim=-1)  # [prompt]
    order = torch.rand(num_runs, len(prompts), generator=torch.Generator().manual_seed(seed))
    order = (order - extreme.float()).argsort(dim=-1)  # [run prompt], the extremes first
    return prompts[order[:, :num_train]], prompts[order[:, num_train:]]


def train_on_answers(
    prompts, objective, num_epochs, batch_size, entropy_bonus, seed, on_epoch=None
):
    """The same model, shown the sorted answers: gradient steps without any sampled response.

    objective "log_likelihood" is cross-entropy, the mean log π(right token); "expected_reward" is
    the mean π(right token), the expected distance reward / n: what RL climbs, without its noise.

    prompts int[run prompt pos], from which batches are drawn → Model
    """
    num_runs, _, length = prompts.shape
    generator = torch.Generator().manual_seed(seed)
    dim, scale = UNSEEN_RECIPE["embedding_dim"], UNSEEN_RECIPE["init_scale"]
    model = Model(int(prompts.max()) + 1, dim, length, length, scale, num_runs, generator)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for epoch in range(num_epochs):
        remaining = 1 - epoch / num_epochs
        optimizer.param_groups[0]["lr"] = UNSEEN_RECIPE["learning_rate"] * remaining
        batch = draw_batch(prompts, batch_size, num_runs, generator)  # [run batch pos]
        answers = batch.sort(dim=-1).values.unsqueeze(-2)  # [run batch 1 pos]
        log_probs = compute_log_probs(batch, answers, model)  # [run batch 1 pos]
        climbed = log_probs if objective == "log_likelihood" else log_probs.exp()
        climbed = climbed.mean(dim=(-3, -2, -1))  # [run]
        if entropy_bonus:
            climbed = climbed + entropy_bonus * remaining * compute_entropy(batch, model)
        optimizer.zero_grad()
        (-climbed).sum().backward()
        optimizer.step()
        if on_epoch is not None:
            on_epoch()
    return model


def measure_unseen(vocab_size, length, num_train, num_runs, seed, objective=None, **settings):
    """One row of experiment 5: exact match on the training prompts and on all the others."""
    train, unseen = split_prompts(vocab_size, length, num_train, num_runs, seed)
    if objective is not None:
        model = train_on_answers(train, objective, seed=seed, **settings)
    else:
        model = run_policy_gradient(**settings, prompts=train, num_runs=num_runs, seed=seed).model
    # How likely is the right token still where the likeliest is wrong?
    with torch.no_grad():
        probs = model(train).softmax(dim=-1)  # [run prompt pos vocab]
    answers = train.sort(dim=-1).values.unsqueeze(-1)  # [run prompt pos 1]
    wrong = probs.argmax(dim=-1, keepdim=True) != answers  # [run prompt pos 1]
    left = probs.gather(-1, answers)[wrong]
    # Which prompts stay wrong? All orders of the same numbers are counted together.
    prompts = enumerate_responses(vocab_size, length)  # [prompt pos]
    wrong_in = 1 - sorts_greedily(prompts, model).float().mean(dim=0)  # [prompt], share of runs
    # [kind pos], [prompt]
    kinds, kind = prompts.sort(dim=-1).values.unique(dim=0, return_inverse=True)
    rate = torch.zeros(len(kinds)).index_add(0, kind, wrong_in) / kind.bincount()  # [kind]
    top = [i for i in rate.argsort(descending=True).tolist()[:4] if rate[i] > 0]
    worst = [f"{' '.join(map(str, kinds[i].tolist()))} ({rate[i]:.0%})" for i in top]
    return {
        "unseen": compute_exact_match(unseen, model),
        "train": compute_exact_match(train, model),
        "left": f"{left.median():.0e}" if len(left) else "",
        "worst": ", ".join(worst),
    }


def plan_study(num_runs, seed, full=False, quick=False):
    """The rows to measure: a list of (experiment, label, function, keyword arguments)."""
    rows = []

    def add(experiment, label, settings, function=measure_training):
        rows.append((experiment, label, function, dict(num_runs=num_runs, seed=seed) | settings))

    for mode in DELTAS[:3]:
        add("1", mode, dict(deltas_mode=mode))

    settings = {}
    for label, change in (
        ("classic: rewards, naive loss", {}),
        ("+ normalized_rewards", dict(deltas_mode="normalized_rewards")),
        ("+ init_scale 0.1", dict(init_scale=0.1)),
        ("+ distance reward", dict(reward_fn=sort_distance_reward)),
        ("+ clipped loss", dict(loss_mode="clipped")),
        ("+ learning rate 5e-3 (the recipe)", dict(learning_rate=5e-3)),
    ):
        settings = settings | change
        add("2b", label, settings)
    if quick:
        return rows
    for label, change in (
        ("rewards, not normalized", dict(deltas_mode="rewards")),
        ("init_scale 1", dict(init_scale=1.0)),
        ("inclusion-ordering reward", dict(reward_fn=sort_inclusion_ordering_reward)),
        ("exact reward", dict(reward_fn=exact_sort_reward)),
        ("naive loss", dict(loss_mode="naive")),
        ("unclipped loss", dict(loss_mode="unclipped")),
        ("learning rate 1e-2", dict(learning_rate=1e-2)),
        ("learning rate 2e-2", dict(learning_rate=2e-2)),
    ):
        add("2c", label, RECIPE | change)

    for reward in REWARDS if full else ("distance",):
        for loss, mode in itertools.product(LOSSES, DELTAS):
            grid = dict(deltas_mode=mode, loss_mode=loss, reward_fn=REWARDS[reward])
            add(f"3 {reward}", f"{mode}, {loss}", RECIPE | grid)

    for k, beta in itertools.product(("k1", "k2", "k3"), (0.01, 0.1, 1.0) if full else (0.1, 1.0)):
        add("4a", f"{k}, β = {beta}", RECIPE | dict(kl_penalty=beta, kl_estimator=k))
    for beta in (0.1, 1.0):
        fixed = dict(kl_penalty=beta, compute_ref_model_period=100)
        add("4a", f"k3, β = {beta}, reference never refreshed", RECIPE | fixed)
    for size in (2, 4, 8, 16, 32, 64):
        add("4b", f"G = {size}", RECIPE | dict(num_responses=size))
    inner_steps = (1, 2, 5, 10, 20) if full else (1, 5, 10)
    for loss, steps in itertools.product(("clipped", "naive"), inner_steps):
        add("4c", f"{loss}, {steps}", RECIPE | dict(num_steps_per_epoch=steps, loss_mode=loss))
    for low in (0.05, 0.1, 0.2, 0.4, 0.8) if full else (0.1, 0.2, 0.8):
        add("4d", f"ε = {low}", RECIPE | dict(learning_rate=1e-2, epsilon=low))
    for high in (0.28, 0.5, 1.0) if full else (0.28, 1.0):
        add("4d", f"ε = 0.2, ε_high = {high}", RECIPE | dict(learning_rate=1e-2, epsilon_high=high))
    supervisions = {"normalized_rewards": "GRPO, outcome", "process": "GRPO, process", "gae": "PPO"}
    for mode, name in supervisions.items():
        for size in (1, 2, 4, 10) if full else (2, 10):
            if size > 1 or mode != "normalized_rewards":  # a group of one has no std
                change = dict(deltas_mode=mode, num_responses=size)
                add("4e", f"{name}, G = {size}", RECIPE | change)

    # The small task fits the default study, the large one takes minutes a row.
    small = dict(vocab_size=5, length=3, num_train=100, num_runs=max(8, num_runs // 2))
    small |= dict(num_epochs=1000, batch_size=32)
    large = dict(vocab_size=10, length=5, num_train=20_000, num_runs=max(8, num_runs // 4))
    large |= dict(num_epochs=5000, batch_size=128)
    ten = dict(num_steps_per_epoch=10, num_epochs=100)
    exact = dict(objective="expected_reward", entropy_bonus=0)
    normalized = UNSEEN_RECIPE | dict(deltas_mode="normalized_rewards")
    process = UNSEEN_RECIPE | dict(deltas_mode="process")
    variants = (
        ("cross-entropy on the answers", dict(objective="log_likelihood", entropy_bonus=0)),
        ("exact expected reward", exact),
        ("exact expected reward, entropy bonus", exact | dict(entropy_bonus=0.25)),
        ("GRPO, recommended", UNSEEN_RECIPE),
        ("GRPO, no entropy bonus", UNSEEN_RECIPE | dict(entropy_bonus=0.0)),
        ("GRPO, normalized_rewards", normalized),
    )
    doubled = (("GRPO, normalized_rewards, twice the bonus", normalized | dict(entropy_bonus=0.5)),)
    more = (
        ("GRPO, process supervision", process),
        ("GRPO, process supervision, eight times the bonus", process | dict(entropy_bonus=2.0)),
        ("GRPO, ten inner steps on a tenth of the samples", UNSEEN_RECIPE | ten),
        ("GRPO, exact reward", UNSEEN_RECIPE | dict(reward_fn=exact_sort_reward)),
        ("GRPO, width 10", UNSEEN_RECIPE | dict(embedding_dim=10)),
    )
    for label, change in variants + doubled + more if full else variants:
        add("5a", label, small | change, measure_unseen)
    for label, change in variants + doubled if full else ():
        add("5b", label, large | change, measure_unseen)
    return rows


# The tables: title, then for each column the metric, its heading, the factor to show it with and
# the number of decimals.
EXACT = ("exact_match", "exact match, %", 100, 1)
SOLVED = ("solved", "runs that sort all in the end", 1, 0)
EPOCHS = ("epochs", "first epoch that sorts all (never: 100)", 1, 1)
ENTROPY = ("entropy", "entropy, nats", 1, 2)
PARAMETERS = ("parameters", "parameters", 1, 0)
SECONDS = ("seconds", "ms a run, side by side", 1000, 0)
UNSEEN = (("train", "train, %", 100, 2), ("unseen", "unseen, %", 100, 2))
UNSEEN += (("left", "median π(right token) where wrong, train"), ("worst", "most often wrong"))
TABLES = {
    "1": ("1. The classic experiment: naive loss, 100 epochs", (EXACT, SOLVED, ENTROPY)),
    "2a": ("2a. The untrained policy", (ENTROPY, ("top", "likeliest token, %", 100, 0))),
    "2b": ("2b. From the classic settings to the recipe", (EXACT, SOLVED, EPOCHS)),
    "2c": ("2c. The recipe with one setting changed", (EXACT, SOLVED, EPOCHS)),
    "3": ("3. The recipe with every delta and loss: exact match, %", (EXACT,)),
    "4a": ("4a. KL penalty", (EXACT, SOLVED, ENTROPY)),
    "4b": ("4b. Group size", (EXACT, SOLVED, EPOCHS)),
    "4c": ("4c. Loss and inner steps on the same samples", (EXACT, SOLVED, EPOCHS)),
    "4d": ("4d. Clip range, at learning rate 1e-2", (EXACT, SOLVED, EPOCHS)),
    "4e": (
        "4e. Outcome and process supervision, and PPO with a critic",
        (EXACT, SOLVED, EPOCHS, PARAMETERS, SECONDS),
    ),
    "5a": ("5a. 3 numbers from 5: train on 100 prompts, test on the other 25", UNSEEN),
    "5b": ("5b. 5 numbers from 10: train on 20,000 prompts, test on the other 80,000", UNSEEN),
    "6a": (
        "6a. The expected update of each delta against the true gradient ∇J, exact, G = 4",
        (("cosine", "cosine", 1, 4), ("length", "length", 1, 3), ("noise", "noise / length", 1, 2)),
    ),
    "6b": ("6b. The expected update with each ratio, exact", (("cosine", "cosine with ∇J", 1, 4),)),
    "6c": (
        "6c. KL estimators, exact: value and spread as multiples of KL(π ‖ π_ref), gradient error",
        (
            ("value", "mean", 1, 3),
            ("spread", "std", 1, 2),
            ("error_to_ref", "against ∇KL(π ‖ π_ref)", 1, 3),
            ("error_from_ref", "against ∇KL(π_ref ‖ π)", 1, 3),
        ),
    ),
}

# What the study found, in words: one finding a line, {experiment|label|metric} is a cell of a table
# above. They were written for the committed results, so they are printed only with their seed and
# enough runs (and with the file at hand).
FINDINGS = Path(__file__).resolve().parent / "results" / "sort" / "findings.txt"


def mean_and_interval(values):
    """Mean of independent runs and the half-width of its 95 % confidence interval (Student's t), 0
    for a single run.

    The quantile is the expansion of Abramowitz and Stegun 26.7.5, right to 0.001 from 8 runs up.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, 0.0
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return mean, t * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / v / n)


def format_cell(row, metric, factor=1, digits=0):
    """One cell of a table: text as it is, a count of solved runs, or mean ± interval."""
    values = row[metric]
    if isinstance(values, str):
        return values or "none"
    if metric == "solved":
        return f"{sum(values):.0f} of {len(values)}"
    mean, half = mean_and_interval(values)
    text = f"{round(factor * mean, digits) + 0.0:,.{digits}f}"  # + 0.0 makes −0 a 0
    return text if len(values) < 2 else f"{text} ± {factor * half:.{digits}f}"


def format_tables(rows):
    """{title: Markdown table} of the rows, in the order of TABLES; the grid as a matrix."""
    tables = {}
    for key, (title, columns) in TABLES.items():
        for name in REWARDS if key == "3" else ("",):
            here = {label: row for (e, label), row in rows.items() if e == f"{key} {name}".strip()}
            if not here:
                continue
            lines = [["", *(heading for _, heading, *_ in columns)]]
            for label, row in here.items():
                lines.append([label, *(format_cell(row, c[0], *c[2:]) for c in columns)])
            if name:
                cells = dict(lines[1:])
                lines = [[f"{name.replace('_', '-')} reward", *LOSSES]]
                lines += [[m, *(cells.get(f"{m}, {loss}", "") for loss in LOSSES)] for m in DELTAS]
            lines.insert(1, ["---"] * len(lines[0]))
            table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            tables[title] = tables[title] + "\n\n" + table if title in tables else table
    return tables


def findings(rows):
    """The findings whose rows have been measured, with the numbers filled in."""
    for (experiment, _), row in rows.items():
        settings, enough = row.get("settings", {}), 8 if experiment[0] == "5" else 32
        if settings.get("seed") != 0 or settings.get("num_runs", 0) < enough:
            return []

    def fill(match):
        experiment, label, metric = match.group(1).split("|")
        columns = {name: spec for name, _, *spec in TABLES[experiment.split()[0]][1]}
        cell = format_cell(rows[experiment, label], metric, *columns[metric])
        return cell + (" %" if columns[metric][:1] == [100] else "")

    found = []
    for sentence in FINDINGS.read_text(encoding="utf-8").split("\n") if FINDINGS.exists() else ():
        try:
            found.append(re.sub(r"\{(.*?)\}", fill, sentence))
        except KeyError:  # not measured yet
            continue
    return list(filter(None, found))


# The palette of Okabe and Ito, distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Plots of table columns: experiment and metric of each panel, one above the other.
PANELS = {
    "ladder": (("2b", "exact_match"), ("2c", "exact_match")),
    "group_size": (("4b", "exact_match"), ("4b", "epochs")),
    "unseen": (("5a", "unseen"), ("5b", "unseen")),
    "gradients": (("6a", "cosine"), ("6a", "length"), ("6a", "noise")),
}


def draw_curves(plt, rows):
    """Exact match by epoch, classic settings and recipe → figure, or None without the rows."""
    curves = {(e, label): row["curve"] for (e, label), row in rows.items() if "curve" in row}
    changes = ("+ init_scale 0.1", "+ distance reward", "+ learning rate 5e-3 (the recipe)")
    lines = [("1", mode) for mode in DELTAS[:3]] + [("2b", change) for change in changes]
    if not set(lines) <= set(curves):
        return None
    figure, axis = plt.subplots(figsize=(8, 4))
    for i, (key, colour) in enumerate(zip(lines, COLOURS)):
        mean, half = (100 * torch.tensor(x) for x in curves[key])  # each [epoch]
        label = key[1].replace("+ learn", "+ clipped loss,\nlearn")
        label = f"classic, {label}" if i < 3 else label
        epochs = range(1, len(mean) + 1)
        style = ("-", "--", ":", "-.", "--", "-")[i]
        axis.plot(epochs, mean, style, label=label, color=colour)
        band = (mean - half).clamp(min=0), (mean + half).clamp(max=100)
        axis.fill_between(epochs, *band, color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="epoch (10 gradient steps)", ylabel="training prompts sorted, greedy, %")
    axis.set(ylim=(-2, 103), title="Mean over the runs with its 95 % interval")
    figure.legend(loc="outside right center", reverse=True)
    return figure


def draw_grid(plt, rows):
    """Exact match of every delta, loss and reward → figure, or None without the rows."""
    names = [name for name in REWARDS if (f"3 {name}", f"{DELTAS[-1]}, {LOSSES[-1]}") in rows]
    if not names:
        return None
    size = (2.2 + 2.8 * len(names), 3.4)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        grid = {label: row["exact_match"] for (e, label), row in rows.items() if e == f"3 {name}"}
        cells = [[grid[f"{mode}, {loss}"] for loss in LOSSES] for mode in DELTAS]
        cells = (100 * torch.tensor(cells).mean(dim=-1)).tolist()  # [delta][loss]
        image = axis.imshow(cells, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, x in itertools.product(range(len(DELTAS)), range(len(LOSSES))):
            colour = "white" if cells[y][x] < 60 else "black"
            axis.text(x, y, f"{cells[y][x]:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(LOSSES)), LOSSES, rotation=30)
        axis.set_yticks(range(len(DELTAS)), DELTAS)
        axis.set(title=f"{name.replace('_', '-')} reward", xlabel="loss")
        axis.grid(visible=False)
    axes[0, 0].set_ylabel("delta")
    figure.colorbar(image, ax=axes, label="sorted after 100 epochs, greedy, %")
    return figure


def draw_columns(plt, rows, panels):
    """Columns of tables as dots with their intervals → figure, or None without the rows."""
    found = []
    for experiment, metric in panels:
        points = {label: row[metric] for (e, label), row in rows.items() if e == experiment}
        if points:
            found.append((experiment, metric, points))
    if not found:
        return None
    heights = [len(points) for *_, points in found]
    figure, axes = plt.subplots(
        len(found), figsize=(8, 0.9 * len(found) + 0.27 * sum(heights)), squeeze=False,
        height_ratios=heights, sharex=len({metric for _, metric, _ in found}) == 1,
    )
    titles = [TABLES[experiment][0].partition(":")[0] for experiment, *_ in found]
    for i, (axis, (experiment, metric, points)) in enumerate(zip(axes[:, 0], found)):
        heading, factor, _ = next(spec for name, *spec in TABLES[experiment][1] if name == metric)
        means, halves = zip(*map(mean_and_interval, points.values()))
        means, halves = [factor * x for x in means], [factor * x for x in halves]
        upper = [min(h, 100 - m) if factor == 100 else h for m, h in zip(means, halves)]
        axis.errorbar(means, list(points), xerr=(halves, upper), fmt="o", color=COLOURS[0])
        axis.set(xlabel=heading, ylim=(len(points) - 0.5, -0.5))  # first row on top
        axis.set_title("" if titles[i] in titles[:i] else titles[i])
        axis.tick_params(labelbottom=True)
    figure.supxlabel("dot and bar: mean over the runs and its 95 % interval", fontsize=9)
    return figure


def draw_plots(rows, out):
    """Every plot whose rows are there, as PNG in the folder `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.constrained_layout.use": True, "savefig.dpi": 150, "axes.titlesize": 10,
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "legend.fontsize": 9, "errorbar.capsize": 3,
    })
    figures = {"learning_curves": draw_curves(plt, rows), "grid": draw_grid(plt, rows)}
    figures |= {name: draw_columns(plt, rows, panels) for name, panels in PANELS.items()}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / f"{name}.png")
    plt.close("all")


def load_rows(path):
    """The rows of an earlier study, {(experiment, label): row}; none if there is no file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(row["experiment"], row["label"]): row for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this script ({error!r}): move it away") from error


def save_rows(path, rows):
    """Write all rows as JSON, one to a line, by way of a temporary file: never half a file."""
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows.values())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"rows": [\n{text}\n]}}\n', encoding="utf-8")
    temporary.replace(path)


def run_study(out, num_runs, seed, full=False, quick=False, plots=True):
    """Measure every row, print tables and findings, write them to the folder `out`. → exit status

    Rows are saved as they are measured; rows of an earlier study that are not measured now stay.
    """
    rows, mine = load_rows(out / "results.json"), {}
    made = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}

    def keep(experiment, label, measured, settings):
        row = {"experiment": experiment, "label": label}
        curve = measured.pop("curve", None)  # float[epoch run]
        if curve is not None and experiment in ("1", "2b"):  # plotted: mean and interval by epoch
            points = [mean_and_interval(epoch) for epoch in curve.tolist()]
            row["curve"] = [[round(x, 4) for x in column] for column in zip(*points)]
        for name, values in measured.items():
            text = isinstance(values, str)
            row[name] = values if text else [round(x, 6) for x in values.tolist()]
        row["settings"] = {k: getattr(v, "__name__", v) for k, v in settings.items()}
        row["made"] = made
        rows[experiment, label] = mine[experiment, label] = row
        save_rows(out / "results.json", rows)

    print(EXAMPLE, end="\n\n", flush=True)
    plan = plan_study(num_runs, seed, full, quick)
    status = 0
    total = sum(settings.get("num_epochs", 100) for *_, settings in plan)
    try:
        with tqdm(total=total, unit="epoch", disable=None) as bar:
            bar.set_description("exact gradients")
            exact = measure_starts(num_runs, seed)
            exact |= {} if quick else measure_gradients(num_runs, seed)
            for (experiment, label), measured in exact.items():
                keep(experiment, label, measured, dict(num_runs=num_runs, seed=seed))
            for i, (experiment, label, function, settings) in enumerate(plan):
                bar.set_description(f"{i + 1}/{len(plan)} {experiment}: {label}")
                started = time.perf_counter()
                measured = function(**settings, on_epoch=lambda *_: bar.update())
                seconds = (time.perf_counter() - started) / settings["num_runs"]
                measured["seconds"] = torch.tensor([seconds])
                keep(experiment, label, measured, settings)
        if full:  # what this version does not measure is from another
            rows = mine
            save_rows(out / "results.json", rows)
    except KeyboardInterrupt:
        status = 130

    for title, table in format_tables(mine).items():
        print(f"{title}\n\n{table}\n")
    if findings(mine):
        print("What the study found\n\n" + "".join(f"- {line}\n" for line in findings(mine)))
    text = "# Results of grpo_sort.py\n\nMeans ± 95 % intervals over independent runs; every run's "
    text += "numbers, settings and versions are in results.json.\n\n"
    text += "".join(f"- {line}\n" for line in findings(rows))
    text += "".join(f"\n## {title}\n\n{table}\n" for title, table in format_tables(rows).items())
    (out / "tables.md").write_text(text, encoding="utf-8")
    if plots:
        draw_plots(rows, out)
    what = "interrupted, what was measured is kept" if status else "written"
    print(f"{what}: {out}/results.json (every run), tables.md{', *.png' if plots else ''}")
    return status


# ==================================================================================================
# 13. Command line


def prompt_numbers(text):
    """'3,2,4' → [3, 2, 4]"""
    if not all(x.isdecimal() and len(x) < 4 for x in text.split(",")):
        raise argparse.ArgumentTypeError(f"needs numbers from 0 to 999, as 3,2,4, not {text!r}")
    return [int(x) for x in text.split(",")]


def make_parser():
    """The command line; options of a single variant are those of run_policy_gradient, if given."""
    parser = argparse.ArgumentParser(
        prog="grpo_sort.py",
        description="Policy gradient and GRPO on a toy task, sorting: every variant, measured.",
        epilog="With no option: the study, about two minutes; its rows replace those in --out.",
        argument_default=argparse.SUPPRESS,
    )
    line = "grpo_sort.py: {} (--help lists everything)\n"  # one, instead of the whole usage
    parser.error = lambda message: parser.exit(2, line.format(message))
    add = parser.add_argument_group("the study").add_argument
    yes = dict(action="store_true", default=False)
    add("--quick", **yes, help="ten seconds: the classic experiment and its repair")
    add("--full", **yes, help="wider sweeps and a larger task, 10 to 25 minutes")
    add("--out", type=Path, default=Path("results/sort"), metavar="DIR", help="(%(default)s)")
    add("--no-plots", **yes, help="write tables and numbers only")
    add = parser.add_argument_group("both").add_argument
    add("--runs", type=int, default=32, metavar="N", help="models side by side (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same numbers (%(default)s)")
    add = parser.add_argument_group(
        "one variant",
        "Any of these trains one variant and prints what it samples as it learns; nothing is "
        "written. What is not given is as in the recipe, in parentheses.",
    ).add_argument
    for flag, name, choices, default in (
        ("--delta", "deltas_mode", (*DELTAS, "process", "gae"), "normalized_rewards); gae is PPO"),
        ("--loss", "loss_mode", LOSSES, "clipped)"),
        ("--reward", "reward_fn", tuple(REWARDS), "distance)"),
        ("--kl-estimator", "kl_estimator", ("k1", "k2", "k3"), "k3)"),
    ):
        text = f"{', '.join(choices)} ({default}"
        add(flag, dest=name, choices=choices, metavar="NAME", help=text)
    for flag, name, kind, letter, text in (
        ("--kl", "kl_penalty", float, "β", "coefficient of the KL penalty (0)"),
        ("--epsilon", "epsilon", float, "ε", "clip range (0.2)"),
        ("--epsilon-high", "epsilon_high", float, "ε", "upper clip range (as --epsilon)"),
        ("--entropy-bonus", "entropy_bonus", float, "C", "coefficient of the entropy bonus (0)"),
        ("--num-responses", "num_responses", int, "G", "group size (10)"),
        ("--num-epochs", "num_epochs", int, "N", "epochs, each with new samples (100)"),
        ("--num-steps-per-epoch", "num_steps_per_epoch", int, "N", "inner steps (10)"),
        ("--learning-rate", "learning_rate", float, "LR", "learning rate of Adam (0.005)"),
        ("--init-scale", "init_scale", float, "S", "std of the initial embedding (0.1)"),
    ):
        add(flag, dest=name, type=kind, metavar=letter, help=text)
    add("--prompts", type=prompt_numbers, nargs="+", metavar="3,2,4", help="(1,0,2 3,2,4 1,2,3)")
    return parser


def train_one(num_runs, seed, **changes):
    """Train the recipe with `changes` and print what run 0 samples as it learns."""

    def show(record, prompts, responses, rewards, deltas):
        epoch = record["epoch"]
        if epoch not in (0, 1, 2, 5, 10, 20, 50) and (epoch + 1) % 100:
            return
        print(
            f"\nepoch {epoch}: mean reward {record['mean_reward']:.2f}, "
            f"loss {record['loss']:+.4f}; after it: sorted {record['exact_match']:.0%}, "
            f"entropy {record['entropy']:.2f} nats, KL {record['kl']:.3f}"
        )
        for prompt, *group in zip(prompts.tolist(), responses[0].tolist(), rewards[0], deltas[0]):
            print(f"  prompt {prompt}")
            for response, reward, delta in list(zip(*group))[:4]:
                delta = " ".join(f"{d:+.2f}" for d in delta.flatten().tolist())
                print(f"    response {response}   reward {reward:.0f}   delta {delta}")

    result = run_policy_gradient(**RECIPE | changes, num_runs=num_runs, seed=seed, on_epoch=show)
    solved, mean = (result.exact_match == 1).sum(), result.exact_match.mean()
    print(f"\n{solved} of {num_runs} runs sort every prompt, on average {mean:.1%} of the prompts.")


def main(argv=None):
    """Run the command line. → exit status, None for success"""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.runs <= 10_000:
        parser.error(f"--runs must be at least 1 and at most 10000, not {args.runs}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be between 0 and 2^63 − 1, not {args.seed}")
    study = ("quick", "full", "out", "no_plots", "runs", "seed")
    variant = {name: value for name, value in vars(args).items() if name not in study}

    if variant:
        if args.quick or args.full:
            parser.error("--quick and --full belong to the study, which trains every variant")
        if "reward_fn" in variant:
            variant["reward_fn"] = REWARDS[variant["reward_fn"]]
        if len({len(prompt) for prompt in variant.get("prompts", [""])}) > 1:
            parser.error("--prompts must all be of the same length, such as --prompts 3,2,4 1,2,3")
        try:
            return train_one(args.runs, args.seed, **variant)
        except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
            parser.error(str(error).split("\n")[0])
        except KeyboardInterrupt:
            return 130

    if args.quick and args.full:
        parser.error("--quick and --full exclude each other")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "results.json"
        save_rows(path, load_rows(path))  # before the work: can it be read, can it be written?
    except OSError as error:
        parser.error(f"--out {args.out} can't be written: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    plots = not args.no_plots and importlib.util.find_spec("matplotlib") is not None
    if not (plots or args.no_plots):
        print("matplotlib is not installed, so no plots: pip install matplotlib", file=sys.stderr)
    try:
        return run_study(args.out, args.runs, args.seed, args.full, args.quick, plots)
    except OSError as error:  # a full disk, say: the rows that were saved before are still there
        parser.exit(1, f"grpo_sort.py: can't write to {args.out}: {error.strerror}\n")


if __name__ == "__main__":
    sys.exit(main())
