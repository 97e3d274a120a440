# SPDX-License-Identifier: MIT
"""GRPO and its relatives from first principles, on a task small enough to enumerate.

A tiny model learns to sort three numbers. It is never shown a right answer. It samples
responses, each gets a reward, and the policy gradient makes the better ones more likely.
GRPO, Group Relative Policy Optimization, samples a group of responses to each prompt and
weighs each by how much better it is than its group. PPO learns a value network instead.

    python grpo_sort.py                                   watch it learn, compare settings
    python grpo_sort.py --loss-mode cispo                 one setting changed (--help: all)
    python grpo_sort.py --compare num_responses 2 4 8 16  a row for each value
    python grpo_sort.py --classic                         the classic settings, all samples

    1 task and rewards   4 deltas              7 worked example   10 PPO: critic, GAE
    2 model              5 log-probabilities   8 KL, entropy      11 what a run shows
    3 sampling           6 losses              9 training loop    12 command line

*Classic* are the settings of Stanford's CS336 (2025, lecture 17), where task, model and
names come from. *The recipe*, ours, changes five of them (section 9). Notation:

    [batch trial pos]   prompts, responses to each (its group), tokens. Any shape may have
                        one more axis in front, run: many trainings side by side
    π(a | s)            the policy's probability of the response a to the prompt s
    δ, delta            the weight of a response in the update, its advantage
    exact match         share of prompts that the model's likeliest response sorts
    table 6a            of results/sort/tables.md, where all measured numbers are
    (!1) to (!7)        lines that are easy to get wrong
"""

import argparse
import copy
import functools
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

# NumPy is not used; and main() switches off the numbers that the second speaks of.
warnings.filterwarnings("ignore", "Failed to initialize NumPy|The value of the smallest sub")

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# 1. The task and its rewards =================================================
# The prompt is n numbers; the response should be the same numbers in ascending order. A
# reward R(s, a) says how good the response a to the prompt s was. For the prompt [3 2 4]:

#     response     distance     inclusion_ordering     exact
#     [2 3 4]          3                 5               1
#     [2 3 3]          2                 4               0
#     [3 2 4]          1                 4               0
#     [0 1 1]          0                 2               0

# What it gives for partial success decides what can be learned: the recipe sorts 100 %,
# 77 % and 67 % with the three. They judge the whole response (outcome supervision);
# sort_step_rewards judges each position (process supervision).


def sort_step_rewards(prompts, responses):
    """1 for a right position, else 0: int[batch pos], int[batch trial pos] → [batch trial pos]"""
    if responses.shape[-1] != prompts.shape[-1]:  # would be broadcast
        raise ValueError("prompts and responses must have the same number of tokens")
    return (responses == prompts.sort(dim=-1).values.unsqueeze(-2)).float()


def sort_distance_reward(prompts, responses):
    """Right positions, 0 … n: int[batch pos], int[batch trial pos] → [batch trial]"""
    return sort_step_rewards(prompts, responses).sum(dim=-1)


def sort_inclusion_ordering_reward(prompts, responses):
    """Prompt tokens in the response + neighbours x ≤ y; [1 2 2] for [1 1 2] gets all 5 points"""
    # [batch trial prompt_pos response_pos]
    equal = prompts[..., None, :, None] == responses[..., None, :]
    inclusion = equal.any(dim=-1).float().sum(dim=-1)  # [batch trial]
    ordered = responses[..., :-1] <= responses[..., 1:]  # [batch trial pos-1]
    return inclusion + ordered.float().sum(dim=-1)


def exact_sort_reward(prompts, responses):
    """1 if all is right, otherwise 0; shapes as above"""
    return sort_step_rewards(prompts, responses).amin(dim=-1)


def compute_reward(prompts, responses, reward_fn):
    """What reward_fn returns, float[batch trial]; ValueError if it is anything else"""
    rewards, shape = reward_fn(prompts, responses), responses.shape[:-1]
    if not (torch.is_tensor(rewards) and rewards.shape == shape and rewards.isfinite().all()):
        text = f"must return a finite tensor {list(shape)}, not {rewards!r:.80}"
        raise ValueError(f"{getattr(reward_fn, '__name__', 'reward_fn')} {text}")
    return rewards.float()


# 2. The model ================================================================
# One vector h summarises the prompt. Every position of the response is decided from h
# alone, not from the positions before it as in a language model:

#     h        = Σ_p E[prompt_p] A_p     an encoding matrix A_p for each prompt position
#     logits_q = h B_q Eᵀ                a decoding matrix B_q for each response position
#     π(a | s) = Π_q softmax(logits_q)[a_q]

# init_scale, the standard deviation of E, matters more than any algorithm below. At 1 the
# untrained policy puts 85 % on one token, and what is never sampled is never rewarded.
# At 0.1 the second row of LADDER (section 9) sorts 62 % instead of 10 % (table 2b).


class Model(nn.Module):
    """The policy. With `num_runs`, that many independent models on a leading run axis."""

    def __init__(
        self, vocab_size, embedding_dim, prompt_length, response_length,
        init_scale=1.0, num_runs=None, generator=None,
    ):  # fmt: skip
        super().__init__()
        runs, dim = () if num_runs is None else (num_runs,), embedding_dim

        def normal(*shape, scale):
            return nn.Parameter(scale * torch.randn(*runs, *shape, generator=generator))

        self.embedding = normal(vocab_size, dim, scale=init_scale)  # [vocab dim]
        self.encode_weights = normal(prompt_length, dim, dim, scale=dim**-0.5)
        self.decode_weights = normal(response_length, dim, dim, scale=dim**-0.5)

    def forward(self, prompts):
        """prompts int[batch pos] → logits float[batch pos vocab]"""
        E, A, B = self.embedding, self.encode_weights, self.decode_weights
        one_hot = F.one_hot(prompts, E.shape[-2]).to(E)  # [batch pos vocab]
        embedded = torch.einsum("...bpv,...vd->...bpd", one_hot, E)  # [batch pos dim]
        h = torch.einsum("...bpd,...pde->...be", embedded, A)  # [batch dim]
        decoded = torch.einsum("...be,...qed->...bqd", h, B)  # [batch pos dim]
        return torch.einsum("...bqd,...vd->...bqv", decoded, E)  # [batch pos vocab]


# 3. Sampling =================================================================
# From the policy itself, no top-k: section 5 computes log π of the same distribution.


@torch.no_grad()
def generate_responses(prompts, model, num_responses, generator=None):
    """Each position from softmax(logits): int[batch pos] → int[batch trial pos]"""
    probs = model(prompts).softmax(dim=-1)  # [batch pos vocab]
    samples = torch.multinomial(probs.flatten(0, -2), num_responses, True, generator=generator)
    return samples.unflatten(0, probs.shape[:-1]).mT  # [batch trial pos]


@torch.no_grad()
def sorts_greedily(prompts, model):
    """Is the likeliest response the sorted prompt? int[batch pos] → bool[batch]"""
    return (model(prompts).argmax(dim=-1) == prompts.sort(dim=-1).values).all(dim=-1)


# 4. From rewards to advantages (deltas) ======================================
# We climb the expected reward J = E_{a∼π}[R(s, a)] = Σ_a π(a | s) R(s, a). Sampling
# cannot be differentiated, but ∇π = π ∇log π makes the gradient a mean over samples:

#     ∇J = Σ_a ∇π(a | s) R(s, a) = E_{a∼π}[ R(s, a) ∇log π(a | s) ]     (REINFORCE)

# Each sampled response becomes more likely in proportion to its reward. That is right on
# average, but noisy: if all rewards are positive, whatever is sampled is pushed up. A
# baseline b(s) changes nothing on average, because E[∇log π] = Σ_a ∇π = ∇1 = 0, and removes
# much of the noise. δ = R − b estimates the advantage: how much better than usual was this
# response? A baseline lifts the recipe from 75 % to 100 %. Which one hardly matters.

# GRPO's is the mean of the group of G responses. It contains the response's own reward,
# which only scales the expected gradient by (G − 1)/G; RLOO takes the mean of the others.
# GRPO then divides by the group's standard deviation, so that every prompt counts alike.
# The price: the update turns away from ∇J a little (cosine 0.997, table 6a), and tiny
# differences become full-size δ. MaxRL divides by the mean: rare successes weigh more.


def compute_deltas(rewards, mode):
    """The weight δ of each response from the rewards r of its group: [batch trial] → same
    std divides by G − 1; the 1e-5 is CS336's. ValueError for unknown modes, small groups."""
    if rewards.dim() < 2 or rewards.shape[-1] < 2 and mode not in ("rewards", "max_rewards"):
        raise ValueError(f"{mode} needs rewards [batch trial ≥ 2]: {list(rewards.shape)}")
    group = dict(dim=-1, keepdim=True)
    top, mean = rewards.amax(**group), rewards.mean(**group)  # each [batch 1]
    # (!1) Equal rewards teach nothing: exactly 0, even if the mean is off by rounding.
    equal = top == rewards.amin(**group)
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]

    if mode == "rewards":  # REINFORCE, Williams 1992
        return rewards
    if mode == "centered_rewards":  # r − mean: Dr. GRPO, arXiv 2503.20783
        return centered
    if mode == "normalized_rewards":  # (r − mean) / std: GRPO, arXiv 2402.03300, 4.1.2
        return centered / (rewards.std(**group) + 1e-5)
    if mode == "max_rewards":  # r if it is the group's maximum, else 0: CS336, lecture 17
        return torch.where(rewards == top, rewards, 0.0)
    if mode == "leave_one_out":  # r − mean of the others: RLOO, arXiv 2402.14740
        return centered * rewards.shape[-1] / (rewards.shape[-1] - 1)
    if mode == "batch_normalized":  # by the std of the batch: Lite PPO, arXiv 2508.08221
        return centered / (rewards.std(dim=(-2, -1), keepdim=True) + 1e-5)
    if mode == "max_likelihood":  # (r − mean) / mean, 0 if mean ≤ 0: MaxRL, 2602.02710
        return torch.where(mean > 0, centered / mean, 0.0)
    raise ValueError(f"{mode!r} is no mode of compute_deltas")


def compute_process_deltas(step_rewards):
    """Process supervision, GRPO section 4.1.3: [batch trial pos] → a δ for each token
    Normalised over all steps of the group, then summed from a token's own step to the end."""
    if step_rewards.dim() < 3 or step_rewards.shape[-2:].numel() < 2:
        raise ValueError("step_rewards must be [batch trial pos], two steps in a group")
    group = dict(dim=(-2, -1), keepdim=True)  # over trial and pos: [batch 1 1]
    mean, std = step_rewards.mean(**group), step_rewards.std(**group)
    equal = step_rewards.amax(**group) == step_rewards.amin(**group)
    normalized = ((step_rewards - mean) / (std + 1e-5)).masked_fill(equal, 0.0)
    return normalized.flip(-1).cumsum(dim=-1).flip(-1)  # [batch trial pos]


# 5. Log-probabilities ========================================================
# Every gradient of the policy flows through the log-probabilities of the sampled tokens.
# log π(a | s) is the sum over the tokens of a; the losses take the mean over tokens.


def compute_log_probs(prompts, responses, model):
    """log π of each token: int[batch pos], int[batch trial pos] → [batch trial pos]"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    return log_probs.gather(-1, responses.mT).mT  # of the tokens of all trials


# 6. Losses ===================================================================
# Descent on −δ log π climbs J while the policy is the one that sampled (on policy).
# Sampling is expensive, so several gradient steps are made on the same samples. After the
# first, π differs from π_old, which sampled (off policy). The ratio ρ = π(a | s) / π_old(a | s)
# reweights the samples (importance sampling). As ∇ρ = ρ ∇log π, the loss becomes −ρ δ:

#     ∇J = E_{a∼π}[δ ∇log π] = E_{a∼π_old}[ρ δ ∇log π] = ∇ E_{a∼π_old}[ρ δ]

# The ratio of a long response, a product over its tokens, swings wildly. PPO and GRPO give
# each token its own, which is right only near π_old. So that no token moves far on old
# samples, they clip it: −min(ρ δ, clip(ρ, 1−ε, 1+ε) δ).

#     δ > 0    ρ > 1 + ε: raised enough, no gradient     ρ < 1 − ε: it fell, full gradient
#     δ < 0    ρ < 1 − ε: lowered enough, no gradient    ρ > 1 + ε: it rose, full gradient

# With ten steps on the same samples 32 of 32 runs sort all with the clip, 29 with −ρ δ, 19
# with −δ log π (table 2c). A common mistake is log π / log π_old. It is 1 at the start too,
# but its gradient is −∇log π / |log π_old|: it lowers what δ says to raise (table 6b).


def compute_loss(log_probs, deltas, mode, old_log_probs=None, epsilon=0.2, epsilon_high=None):
    """The mean loss of tokens: log-probabilities [batch trial pos], without padding, deltas
    [batch trial] or [batch trial pos] → scalar, or float[run]. ValueError for unknown modes."""
    if log_probs.dim() < 3 or deltas.shape not in (log_probs.shape[:-1], log_probs.shape):
        raise ValueError(f"deltas {deltas.shape} do not fit log_probs {log_probs.shape}")
    deltas = deltas if deltas.shape == log_probs.shape else deltas.unsqueeze(-1)  # […, pos or 1]
    if mode == "naive":  # −δ log π: REINFORCE
        return -(log_probs * deltas).mean(dim=(-3, -2, -1))
    if old_log_probs is None or old_log_probs.shape != log_probs.shape:
        raise ValueError(f"{mode} needs old_log_probs of the same shape as log_probs")

    # (!2) π_old is a constant. At π = π_old a gradient through both would cancel to zero.
    log_ratio = log_probs - old_log_probs.detach()  # [batch trial pos]
    if mode == "gspo":  # one ratio a response, the geometric mean: arXiv 2507.18071
        log_ratio = log_ratio.mean(dim=-1, keepdim=True)  # [batch trial 1]
    ratio = log_ratio.exp()  # (!3) never the quotient of the logarithms
    ceiling = 1 + (epsilon if epsilon_high is None else epsilon_high)  # DAPO, 2503.14476
    if mode == "unclipped":  # PPO, arXiv 1707.06347, eq. 6
        objective = ratio * deltas
    elif mode in ("clipped", "gspo"):  # PPO, eq. 7
        # (!4) the minimum, so that only a move that δ asks for is cut off
        clipped = ratio.clamp(1 - epsilon, ceiling)
        objective = torch.minimum(ratio * deltas, clipped * deltas)
    elif mode == "cispo":  # the clipped ratio as a constant weight: arXiv 2506.13585
        objective = ratio.detach().clamp(max=ceiling) * deltas * log_probs
    else:
        raise ValueError(f"{mode!r} is no mode of compute_loss")
    return -objective.mean(dim=(-3, -2, -1))


# 7. A worked example, to follow with a pencil ================================


def worked_example():
    """Four responses to a prompt, and what sections 4 and 6 make of their rewards → text"""
    prompts = torch.tensor([[1, 0, 2]])  # [batch pos]
    responses = [[0, 1, 2], [0, 1, 1], [0, 2, 1], [1, 0, 0]]  # [trial pos]
    rewards = compute_reward(prompts, torch.tensor([responses]), sort_distance_reward)
    rows = {"reward: right positions": rewards}  # each [batch trial]
    for mode in "centered_rewards normalized_rewards leave_one_out max_likelihood".split():
        rows[mode] = compute_deltas(rewards, mode)
    # The policy is uniform over three tokens and has just sampled: all ratios are 1.
    log_probs = torch.full((1, 4, 3), -math.log(3), requires_grad=True)  # [batch trial pos]
    loss = compute_loss(log_probs, rows["centered_rewards"], "clipped", log_probs)
    rows["gradient of each token"] = torch.autograd.grad(loss, log_probs)[0][..., 0]
    lines = [f"{'sort [1, 0, 2]':24}" + "".join(f"{str(x):>12}" for x in responses)]
    for name, values in rows.items():
        lines.append(f"{name:24}" + "".join(f"{x:12.3f}" for x in values[0].tolist()))
    return "\n".join(lines) + f"""

The gradient is that of the clipped loss with centred rewards by log π of a token, −δ / 12.
Descent raises the first two responses and lowers the others. The loss itself is −(mean δ)
= {abs(loss):.1f}, as on the first step of every batch with centred δ. It does not measure
progress, the reward does. When a log π has risen from −1.10 to −0.80, its ratio is
{math.exp(0.3):.2f}, above 1 + ε = 1.2: with δ > 0 it is not raised further."""  # fmt: skip


# 8. The KL penalty and the entropy bonus =====================================
# The penalty keeps π near a π_ref whose skills it must not lose: the model before training
# or, if that is random as here, a copy of π, renewed now and then. The recipe needs none.
# KL(π ‖ π_ref) = E_{a∼π}[log π − log π_ref] is estimated from samples of π, with
# x = log π_ref − log π of a token:

#                          on policy, as an estimate    as a loss it has the gradient of
#     k1 = −x              unbiased, may be negative    only noise: E[∇log π] = 0
#     k2 = x²/2            biased, never negative       KL(π ‖ π_ref)
#     k3 = eˣ − x − 1      unbiased, never negative     KL(π_ref ‖ π), the other direction
#     k3_weighted = ρ k3   the same, off policy too     KL(π ‖ π_ref), off policy too

# J. Schulman, "Approximating KL divergence", 2020. On reused samples k1 lowers every token,
# whatever its reward: with weight β 0.1 only 5 of 32 runs sort all, with the others 32 (table 4a).
# The right column holds for independent tokens, as here (table 6c); otherwise it misses what
# a token does to later ones (arXiv 2506.09477).


def compute_kl_penalty(log_probs, ref_log_probs, estimator="k3", old_log_probs=None):
    """KL(π ‖ π_ref) of a response, estimated from float[batch trial pos] → scalar, or [run]
    Summed over pos; GRPO's eq. 3 takes the mean: divide its β by the length. ρ is 1 with the
    gradient ∇log π if there are no old_log_probs."""
    old_log_probs = log_probs if old_log_probs is None else old_log_probs
    if not log_probs.shape == ref_log_probs.shape == old_log_probs.shape or log_probs.dim() < 3:
        raise ValueError("all log-probabilities must be [batch trial pos]")
    x = ref_log_probs.detach() - log_probs  # [batch trial pos]
    if estimator == "k1":
        kl = -x
    elif estimator == "k2":
        kl = x**2 / 2
    elif estimator == "k3":  # GRPO, arXiv 2402.03300, eq. 4
        kl = x.exp() - x - 1
    elif estimator == "k3_weighted":  # DeepSeek-V3.2, arXiv 2512.02556
        kl = (log_probs - old_log_probs.detach()).exp() * (x.exp() - x - 1)
    else:
        raise ValueError(f"{estimator!r} is no estimator of compute_kl_penalty")
    return kl.sum(dim=-1).mean(dim=(-2, -1))


def compute_entropy(prompts, model):
    """Mean entropy of a token in nats: int[batch pos] → scalar, or float[run]"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [batch pos vocab]
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=(-2, -1))


# 9. The training loop ========================================================
# An epoch samples from π, which is then π_old, and takes several steps on these samples.

CLASSIC_PROMPTS = ((1, 0, 2), (3, 2, 4), (1, 2, 3))
REWARDS = {
    "distance": sort_distance_reward,
    "inclusion_ordering": sort_inclusion_ordering_reward,
    "exact": exact_sort_reward,
}
DELTAS = (
    "rewards",
    "centered_rewards",
    "normalized_rewards",
    "max_rewards",
    "leave_one_out",
    "batch_normalized",
    "max_likelihood",
)
LOSSES = ("naive", "unclipped", "clipped", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_weighted")
# Arguments of run_policy_gradient, also flags: type or choices, meaning (classic default)
SETTINGS = {
    "num_epochs": (int, "rounds of sampling (100)"),
    "num_steps_per_epoch": (int, "gradient steps on the same samples (10)"),
    "compute_ref_model_period": (int, "epochs until π_ref is renewed; 1: it is π_old (10)"),
    "num_responses": (int, "the group size G (10)"),
    "deltas_mode": ((*DELTAS, "process", "gae"), "from rewards to δ; gae: PPO (rewards)"),
    "loss_mode": (LOSSES, "naive is REINFORCE, clipped PPO and GRPO (naive)"),
    "kl_penalty": (float, "coefficient β of the KL penalty (0.0)"),
    "reward_fn": (tuple(REWARDS), "in Python: a function (inclusion_ordering)"),
    "prompts": (list, "prompts of one length (the three classic ones)"),
    "batch_size": (int, "prompts drawn for an epoch (None: all)"),
    "vocab_size": (int, "different tokens (None: the largest of the prompts + 1)"),
    "embedding_dim": (int, "the width of the model (10)"),
    "init_scale": (float, "standard deviation of the initial embedding (1.0)"),
    "learning_rate": (float, "of Adam (0.001)"),
    "epsilon": (float, "clip range ε (0.2)"),
    "epsilon_high": (float, "upper clip range (None: epsilon)"),
    "target_kl": (float, "no gradient to a run past this KL(π_old ‖ π), nats (None)"),
    "kl_estimator": (KL_ESTIMATORS, "of the KL penalty (k3)"),
    "entropy_bonus": (float, "coefficient of the entropy (0.0)"),
    "anneal": (("no", "yes"), "learning rate and entropy bonus fall to 0 (no)"),
    "gamma": (float, "γ of gae (1.0)"),
    "lam": (float, "λ of gae (0.95)"),
    "value_coefficient": (float, "of the critic's loss (1.0)"),
    "num_runs": (int, "models trained side by side (1; on the command line 32)"),
    "seed": (int, "equal seeds give equal numbers (0)"),
}
LADDER = (  # from the classic settings to the recipe: each row keeps the changes above it
    ("classic: raw rewards, REINFORCE loss", {}),
    ("+ normalize the rewards in each group", dict(deltas_mode="normalized_rewards")),
    ("+ start from a nearly uniform policy", dict(init_scale=0.1)),
    ("+ reward each number in its right place", dict(reward_fn=sort_distance_reward)),
    ("+ PPO's clipped loss", dict(loss_mode="clipped")),
    ("+ five times the learning rate: the recipe", dict(learning_rate=5e-3)),
)
RECIPE = {name: value for _, change in LADDER for name, value in change.items()}


def draw_batch(prompts, batch_size, num_runs, generator):
    """Prompts of an epoch, for each run: int[(run) prompt pos] → int[run batch pos]"""
    shape = num_runs, batch_size, 1
    drawn = torch.randint(prompts.shape[-2], shape, generator=generator)  # [run batch 1]
    return prompts.expand(num_runs, -1, -1).take_along_dim(drawn, dim=1)


@torch.no_grad()
def measure_epoch(losses, rewards, prompts, model, ref_model):
    """What is recorded of an epoch, most of it after the epoch → {name: float[run]}"""
    log_probs = model(prompts).log_softmax(dim=-1)  # [run batch pos vocab]
    ref_log_probs = ref_model(prompts).log_softmax(dim=-1)  # [run batch pos vocab]
    kl = log_probs.exp() * (log_probs - ref_log_probs)  # [run batch pos vocab]
    measured = {
        "loss": torch.stack(losses).mean(dim=0),  # over the inner steps
        "mean_reward": rewards.mean(dim=(-2, -1)),  # of the samples
        "batch_exact_match": sorts_greedily(prompts, model).float().mean(dim=-1),
        "entropy": compute_entropy(prompts, model),  # of a token, nats
        "kl": kl.sum(dim=(-2, -1)).mean(dim=-1),  # exact, of a response, nats
    }
    if not measured["entropy"].isfinite().all():
        raise ValueError("the policy is no longer finite: lower learning_rate")
    return measured


def mean_and_interval(values, scale=1):
    """float[… run] → mean, half its 95 % interval: Student's t, to 0.5 % from 8 runs up"""
    v, values = max(values.shape[-1] - 1, 1), values.double().round(decimals=6)
    t = 1.96 + 2.37 / v + 2.8 / v**2
    return scale * values.mean(dim=-1), scale * t * values.std(dim=-1, correction=0) / v**0.5


def run_policy_gradient(
    num_epochs=100, num_steps_per_epoch=10, compute_ref_model_period=10, num_responses=10,
    deltas_mode="rewards", loss_mode="naive", kl_penalty=0.0,
    reward_fn=sort_inclusion_ordering_reward, *, prompts=CLASSIC_PROMPTS, batch_size=None,
    vocab_size=None, embedding_dim=10, init_scale=1.0, learning_rate=1e-3, epsilon=0.2,
    epsilon_high=None, target_kl=None, kl_estimator="k3", entropy_bonus=0.0, anneal=False,
    gamma=1.0, lam=0.95, value_coefficient=1.0, num_runs=1, seed=0, on_epoch=None,
):  # fmt: skip
    """Train models side by side, with the arguments of SETTINGS → an object with model; prompts;
    exact_match float[run], greedy, on all prompts; curves {name: float[epoch run]} of
    measure_epoch; records, their means over runs, one dict an epoch. After each epoch calls
    on_epoch(record, prompts, responses, rewards, deltas, log_probs)."""
    if len({len(prompt) for prompt in prompts}) > 1:
        raise ValueError("prompts must be of one length, such as 3,2,4 and 1,2,3")
    prompts = torch.as_tensor(prompts)  # [batch pos] or [run batch pos]
    if deltas_mode == "process" and reward_fn is not sort_distance_reward:
        raise ValueError("deltas_mode process needs reward_fn distance")
    length, vocab_size = prompts.shape[-1], vocab_size or int(prompts.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    model = Model(vocab_size, embedding_dim, length, length, init_scale, num_runs, generator)
    parameters, critic = list(model.parameters()), None
    if deltas_mode == "gae":
        critic = Critic(vocab_size, length, num_runs, generator)
        parameters += critic.parameters()
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    records, history = [], []

    for epoch in range(num_epochs):
        remaining = 1 - epoch / num_epochs if anneal else 1.0
        optimizer.param_groups[0]["lr"] = learning_rate * remaining
        if epoch % compute_ref_model_period == 0:  # (!5) a frozen copy
            ref_model = copy.deepcopy(model).requires_grad_(False)
        batch = draw_batch(prompts, batch_size, num_runs, generator) if batch_size else prompts
        responses = generate_responses(batch, model, num_responses, generator)
        rewards = compute_reward(batch, responses, reward_fn)  # [run batch trial]
        deltas, returns = deltas_and_returns(
            deltas_mode, batch, responses, rewards, critic, gamma, lam
        )
        old_log_probs = compute_log_probs(batch, responses, model).detach()
        ref_log_probs = compute_log_probs(batch, responses, ref_model)
        losses = []
        for _ in range(num_steps_per_epoch):
            log_probs = compute_log_probs(batch, responses, model)  # [run batch trial pos]
            loss = compute_loss(log_probs, deltas, loss_mode, old_log_probs, epsilon, epsilon_high)
            if kl_penalty:
                kl = compute_kl_penalty(log_probs, ref_log_probs, kl_estimator, old_log_probs)
                loss = loss + kl_penalty * kl  # [run]
            if entropy_bonus:
                loss = loss - entropy_bonus * remaining * compute_entropy(batch, model)
            if critic is not None:
                error = critic(batch, responses) - returns  # [run batch trial pos]
                loss = loss + value_coefficient * error.square().mean(dim=(-3, -2, -1))
            losses.append(loss.detach())
            if target_kl is not None:
                # KL(π_old ‖ π): a run past it gets no gradient, only Adam's momentum
                loss = loss * (compute_kl_penalty(old_log_probs, log_probs) <= target_kl)
            optimizer.zero_grad()
            loss.sum().backward()  # (!6) not the mean, which would divide by num_runs
            optimizer.step()

        history.append(measure_epoch(losses, rewards, batch, model, ref_model))
        means = {name: x.mean().item() for name, x in history[-1].items()}
        records.append({"epoch": epoch, "step": (epoch + 1) * num_steps_per_epoch} | means)
        if on_epoch is not None:
            on_epoch(records[-1], batch, responses, rewards, deltas, old_log_probs)

    curves = {name: torch.stack([h[name] for h in history]) for name in history[0]}
    exact_match = sorts_greedily(prompts, model).float().mean(dim=-1)  # [run]
    found = dict(model=model, prompts=prompts, records=records, curves=curves)
    return SimpleNamespace(**found, exact_match=exact_match)


# Settings as sorted items, so that equal ones are trained once.
train = functools.cache(lambda *settings: run_policy_gradient(**dict(settings)))


def show_epoch(record, prompts, responses, rewards, deltas, log_probs, count=None):
    """An on_epoch: print what the first run sampled, `count` responses to a prompt"""
    if record["epoch"] not in (0, 2, 5, 10) and (record["epoch"] + 1) % 100:
        return
    text = "\nepoch {epoch}, all runs: loss {loss:+.3f}, mean reward {mean_reward:.2f}, then "
    print((text + "exact match {batch_exact_match:.0%}, entropy {entropy:.2f}").format(**record))
    for b, prompt in enumerate(prompts.expand(len(responses), -1, -1)[0].tolist()):
        print(f"  prompt {prompt}, sorted {sorted(prompt)}")
        for i, response in enumerate(responses[0, b, :count].tolist()):
            delta = " ".join(f"{x:+.2f}" for x in deltas[0, b, i].flatten().tolist())
            log_prob = f"log π {log_probs[0, b, i].sum():.2f}"
            print(f"    {response}   reward {rewards[0, b, i]:g}   delta {delta}   {log_prob}")


# 10. PPO, which GRPO simplifies ==============================================
# PPO needs no group. It learns the baseline: a second network, the critic V, predicts the
# reward still to come; V_t is V(prompt, tokens before t). How much the expected reward
# changed when a token appeared is its temporal-difference error e_t. The token's advantage
# is this error plus those of the later tokens, discounted:

#     e_t = r_t + γ V_{t+1} − V_t
#     Â_t = Σ_{l≥0} (γλ)^l e_{t+l}     generalized advantage estimation (GAE): PPO's δ

# r_t comes with token t (here R with the last, otherwise 0), V is 0 after the end. λ = 1 is
# unbiased and noisy; λ = 0 trusts V completely. PPO maximises the clipped objective −
# squared error of V + entropy (arXiv 1707.06347, eq. 9).


class Critic(nn.Module):
    """V(prompt, tokens so far): one hidden layer over one-hot tokens, on a run axis"""

    def __init__(self, vocab_size, length, num_runs, generator, hidden=64):
        super().__init__()
        features = 2 * length * vocab_size + length  # prompt, tokens so far, position
        weights = torch.randn(num_runs, features, hidden, generator=generator)
        self.hidden_weights = nn.Parameter(weights * (2 * length) ** -0.5)
        self.value_weights = nn.Parameter(torch.zeros(num_runs, hidden))  # V starts at 0
        self.vocab_size = vocab_size

    def forward(self, prompts, responses):
        """V before each token: int[batch pos], int[run batch trial pos] → as the latter"""
        length = responses.shape[-1]
        prompt = F.one_hot(prompts, self.vocab_size).flatten(-2)  # [batch pos*vocab]
        tokens = F.one_hot(responses, self.vocab_size).float()  # [batch trial pos vocab]
        # (!7) before[t, j] = 1 for j < t: V may not see the token that it judges.
        before = torch.ones(length, length).tril(-1)  # [pos pos]
        prefix = torch.einsum("tj,...jv->...tjv", before, tokens).flatten(-2)
        parts = prompt[..., None, None, :], prefix, torch.eye(length)
        features = torch.cat([x.expand(*responses.shape, -1) for x in parts], dim=-1)
        hidden = torch.einsum("...btpf,...fh->...btph", features, self.hidden_weights)
        return torch.einsum("...btph,...h->...btp", hidden.tanh(), self.value_weights)


def compute_gae(token_rewards, values, gamma=1.0, lam=0.95):
    """GAE, arXiv 1506.02438, eq. 16: [batch trial pos] each → (advantages, returns)
    returns are the critic's targets. With padding, mask both."""
    if token_rewards.shape != values.shape:
        raise ValueError("token_rewards and values must be of one shape")
    token_rewards, values = token_rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)  # [batch trial pos]
    next_value = advantage = torch.zeros_like(values[..., 0])  # [batch trial]
    for t in reversed(range(values.shape[-1])):
        error = token_rewards[..., t] + gamma * next_value - values[..., t]  # [batch trial]
        advantage = error + gamma * lam * advantage
        advantages[..., t] = advantage
        next_value = values[..., t]
    return advantages, advantages + values


def deltas_and_returns(mode, prompts, responses, rewards, critic, gamma, lam):
    """The deltas of every mode, [run batch trial (pos)], and for gae the critic's targets"""
    if mode == "process":
        return compute_process_deltas(sort_step_rewards(prompts, responses)), None
    if mode != "gae":
        return compute_deltas(rewards, mode), None
    values = critic(prompts, responses).detach()  # [run batch trial pos]
    # The whole reward comes with the last token: [run batch trial pos]
    token_rewards = F.pad(rewards.unsqueeze(-1), (values.shape[-1] - 1, 0))
    advantages, returns = compute_gae(token_rewards, values, gamma, lam)
    run = dict(dim=(-3, -2, -1), keepdim=True)  # normalised as in most implementations
    mean, std = advantages.mean(**run), advantages.std(**run, correction=0)
    return (advantages - mean) / (std + 1e-5), returns


# 11. What a plain run shows (the algorithm ends here) ========================


def train_table(title, rows):
    """Train and print {label: settings} row by row → {label: (settings, result)}"""
    line, results = "| {:<42} | {:<17} | {:<18} | {:<20} |", {}
    heads = "", "prompts sorted, %", "runs that sort all", "epochs until they do"
    print(f"\n## {title}\n\n{line.format(*heads)}\n{line.format(*['---'] * 4)}")
    for label, settings in tqdm(rows.items(), leave=False, disable=None):
        result = train(*sorted(settings.items()))
        results[label] = settings, result
        solved = result.curves["batch_exact_match"] == 1  # bool[epoch run]
        first = ((solved.cumsum(dim=0) == 0).sum(dim=0) + 1).clamp(max=len(solved))  # [run]
        percent = "{:.1f} ± {:.1f}".format(*mean_and_interval(result.exact_match, 100))
        epochs = "{:.1f} ± {:.1f}".format(*mean_and_interval(first))
        runs = f"{(result.exact_match == 1).sum()} of {len(first)}"
        tqdm.write(line.format(label, percent, runs, epochs if solved.any() else "never"))
    return results


def train_matrix(title, base):
    """Print the exact match of every delta with every loss, process and gae with clipped."""
    print(f"\n## {title}\n\n{'':20}" + "".join(f"{loss:>11}" for loss in LOSSES))
    for deltas in tqdm(SETTINGS["deltas_mode"][0], leave=False, disable=None):
        losses, width = (LOSSES, 11) if deltas in DELTAS else (("clipped",), 33)
        rows = [base | dict(deltas_mode=deltas, loss_mode=loss) for loss in losses]
        exact = [train(*sorted(row.items())).exact_match for row in rows]
        exact = [f"{mean_and_interval(x, 100)[0]:{width}.1f}" for x in exact]
        tqdm.write(f"{deltas:20}" + "".join(exact))


def draw_curves(results, out):
    """out/curves.png of {label: (settings, result)}: reward, exact match and loss by epoch"""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    for label, (settings, result) in results.items():
        reward_fn = settings.get("reward_fn", sort_inclusion_ordering_reward)
        best = reward_fn(result.prompts, result.prompts.sort(dim=-1).values.unsqueeze(-2))
        scales = dict(mean_reward=100 / best.mean(), batch_exact_match=100, loss=1)
        for axis, (name, scale) in zip(axes, scales.items()):
            mean, half = mean_and_interval(result.curves[name], scale)  # each [epoch]
            axis.plot(mean, label=label)
            axis.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.2, lw=0)
    axes[0].set(title="mean reward, % of maximum", xlabel="epoch")
    axes[1].set(title="prompts sorted, %", xlabel="epoch")
    axes[2].set(title="loss: no measure of progress", xlabel="epoch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(out / "curves.png", dpi=150)
    print(f"\n{out / 'curves.png'} shows the curves")


def run_experiments(common, out):
    """The worked example, the recipe learning, experiments 1 to 3; common: seed, num_runs"""
    print(worked_example())
    run_policy_gradient(**RECIPE | common, on_epoch=functools.partial(show_epoch, count=3))
    classic = {mode: common | dict(deltas_mode=mode) for mode in DELTAS[:3]}
    train_table("1. The classic settings with three deltas", classic)
    ladder, settings = {}, classic["rewards"]
    for label, change in LADDER:
        ladder[label] = settings = settings | change
    results = train_table("2. From the classic settings to the recipe", ladder)
    train_matrix("3. The recipe with every delta and loss: prompts sorted, %", RECIPE | common)
    draw_curves(results, out)


# 12. Command line ============================================================


def make_parser():
    """The arguments of run_policy_gradient as flags, and three more"""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--classic", action="store_true", help="start from the classic settings, show samples")
    add("--compare", nargs="+", metavar=("SETTING", "VALUE"), help="a row for each value")
    add("--out", type=Path, default="runs/sort", help="folder for curves.png (runs/sort)")
    add = parser.add_argument_group("settings (in brackets: the classic values)").add_argument
    for name, (kind, text) in SETTINGS.items():
        options = dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind, metavar="X")
        if name == "prompts":
            options = dict(nargs="+", metavar="3,2,4")
        add("--" + name.replace("_", "-"), help=text, **options)
    return parser


def given_settings(args):
    """What a parsed command line sets → arguments of run_policy_gradient"""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for name, value in given.items():
        least = 1 if SETTINGS[name][0] is int and name != "seed" else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"{name} must be a finite number from {least} up, not {value}")
        if name in ("reward_fn", "anneal"):
            given[name] = REWARDS.get(value, value == "yes")
        if name == "prompts":  # as "3,2,4"
            given[name] = tuple(tuple(map(int, prompt.split(","))) for prompt in value)
    return given


def main(argv=None):
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a console that knows no π shows a ? for it
        stream.reconfigure(errors="replace", line_buffering=True)
    torch.set_num_threads(1)  # the tensors are small: two threads would wait for each other
    torch.set_flush_denormal(True)  # a converged policy has denormal gradients: slow
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        given = given_settings(args)
        common = dict(num_runs=32) | {k: given[k] for k in ("num_runs", "seed") if k in given}
        base = ({} if args.classic else RECIPE) | common | given
        if args.compare:
            name, *values = args.compare
            if name not in SETTINGS or not values:
                raise ValueError(f"--compare needs a setting and values: {', '.join(SETTINGS)}")
            given = [parser.parse_args(["--" + name.replace("_", "-"), x]) for x in values]
            rows = {x: base | given_settings(args) for x, args in zip(values, given)}
            draw_curves(train_table(name, rows), args.out)
        elif args.classic or given.keys() - common.keys():
            exact = run_policy_gradient(**base, on_epoch=show_epoch).exact_match
            print(f"\n{(exact == 1).sum()} of {len(exact)} runs sort every prompt")
        else:
            run_experiments(common, args.out)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        parser.error(str(error).split("\n")[0])


if __name__ == "__main__":
    main()
