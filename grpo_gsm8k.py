# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14", "tqdm", "transformers>=5,<6", "datasets", "safetensors",
#     "matplotlib>=3.7",
# ]
# ///
"""GRPO fine-tuning of Qwen2.5-1.5B-Instruct on GSM8K, whole and in one file.

The model reads a word problem, writes its reasoning and an answer in a fixed format, several times
over, and is told of each how many points it earned: two for the right answer, a few tenths for the
format. From that alone it learns. This file holds everything that happens in between: rewards,
sampling, advantages, log-probabilities, loss, and the loop that puts them in order. transformers
provides model and tokenizer.

    python grpo_gsm8k.py --rehearsal             all of it in miniature: a CPU, minutes, no download
    python grpo_gsm8k.py                         the full job on one GPU of 80 GB
    torchrun --nproc-per-node=8 grpo_gsm8k.py    the same on eight
    python grpo_gsm8k.py --eval-only --model DIR --eval-file test.jsonl
    python grpo_gsm8k.py --help                  every setting

    1 data, prompts      5 log-probabilities     9 evaluation      12 processes, precision, memory
    2 rewards            6 loss                 10 training loop   13 checkpoints, signals, logs
    3 sampling           7 worked example       11 step rewards    14 rehearsal
    4 advantages         8 settings                                15 command line

The algorithm is sections 1 to 10; train_simply in section 10 is all of it on one screen. The rest
makes it a program that one can leave alone. grpo_sort.py explains the same algorithm in the same
order (sections 3 to 7 and 10 have the same numbers) on a task that fits on a page; read it first if
the words are new. In short: the policy π is the model in training, π_old the model that sampled,
π_ref a frozen copy of the model at the start; a group is the completions of one prompt; the
advantage Â of a completion says how much better its reward was than its group's. Unlike in the
paper (arXiv 2402.03300) rewards, also those of single steps, come from rules, not from a model.

Shapes are written [row pos]: a row is one completion, pos counts tokens. `batch` prompts with
`trial` = num_generations completions each make batch·trial rows, those of a group consecutive;
`vocab` is the vocabulary, `dim` the model's width. → means "returns". Lines that are easy to get
wrong carry a number, (!1) to (!8): the README lists them and test_grpo.py guards each. Functions
whose docstring says "Needs:" can be copied with what it names, and what that needs.
"""

import argparse
import ast
import bisect
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from pathlib import Path
from types import NoneType
from typing import get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# ==================================================================================================
# From grpo_sort.py to here
#
#     grpo_sort.py                   here                          because
#     response, delta δ              completion, advantage Â       the words of language models
#     [batch trial pos]              [row pos]                     transformers has one leading axis
#     one length, plain means        completion_mask, loss_type    completions differ in length
#     num_responses, kl_penalty      num_generations, beta         names of TRL and the paper
#     epoch: a round of sampling     step; an epoch is a pass      a pass takes many steps
#                                    over the training problems
#     num_steps_per_epoch            mu                            symbol of the papers
#     compute_ref_model_period       num_steps, if there are       usually one reference serves
#                                    several num_iterations        the whole run
#     loss_mode clipped, cispo       loss_type                     four averages, section 6
#     loss_mode gspo                 importance_sampling_level     goes with any average
#     KL beside the loss, summed     in the loss of a token        as in the paper, eq. 3
#     std + 1e-5                     std + 1e-4                    as in TRL
#     a run axis                     processes                     one model fills a GPU
#     naive, unclipped, k1, k2,      left out                      not what one trains with
#     rewards, max_rewards,
#     entropy bonus, PPO

# ==================================================================================================
# 1. The data
#
# GSM8K (arXiv 2110.14168): 7,473 word problems of primary school to train on, 1,319 to test. A
# problem is a question and a worked answer that ends with "#### " and the number. Only that number
# is used: the model has to find the way to it by itself. Each question becomes a prompt in the chat
# format that the model was trained on; only in that format does it know where its turn ends.
#
# For answers that are not numbers, change SYSTEM_PROMPT and check_problem here, correctness_reward
# in section 2 (keep 2.0 the most: section 11 divides by it) and strict and lenient in section 9;
# for other tags also TAGS, extract_answer_from_model_output (2) and step_rewards (11).

SYSTEM_PROMPT = """\
Solve the problem step by step. Write the steps between <reasoning> and </reasoning>, then the \
final number alone between <answer> and </answer>, like this:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def extract_answer_from_dataset(text):
    """The text after '####' in a GSM8K answer, stripped; None if there is none. Needs: nothing."""
    return text.partition("####")[2].strip() or None


def check_problem(problem, where):
    """One problem of the data, checked → {"question": str, "answer": the final number, as text}.

    Raises ValueError that names `where` (file and line) if the problem cannot be trained on.
    """
    if not isinstance(problem, dict):
        raise ValueError(f"{where}: a problem must be a JSON object with question and answer")
    question, answer = problem.get("question"), problem.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: no question; each problem needs a text under 'question'")
    if re.search("[\ud800-\udfff]", question):
        raise ValueError(f"{where}: the question holds half a surrogate pair, which is no text")
    gold = extract_answer_from_dataset(answer) if isinstance(answer, str) else None
    if gold is None:
        raise ValueError(f"{where}: 'answer' must end with '#### ' and the final number")
    if parse_number(gold) is None:
        raise ValueError(f"{where}: {gold[:50]!r} after '####' is not one number")
    return {"question": question, "answer": gold}


def load_problems(path=None, split="train"):
    """GSM8K from the hub, or a JSONL file in its format → list of check_problem's results.

    Raises ValueError with file and line for the first problem that is wrong, and for an empty file.
    """
    if path is None:
        from datasets import load_dataset

        found = load_dataset("openai/gsm8k", "main", split=split)
        return [check_problem(row, f"openai/gsm8k {split}:{i}") for i, row in enumerate(found)]
    problems = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    problem = json.loads(line)
                except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                    raise ValueError(f"{path}:{number}: not JSON in UTF-8 ({error})") from None
                problems.append(check_problem(problem, f"{path}:{number}"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not problems:
        raise ValueError(f"{path}: no problems; one JSON object a line with question and answer")
    return problems


def build_prompt(question, tokenizer):
    """The question as the model expects it: system turn, user turn, and the start of its own turn.

    The template is the tokenizer's own. It writes all special tokens, so the text has to be encoded
    with add_special_tokens=False. Raises ValueError if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use an instruct model, or set one")
    turns = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


# ==================================================================================================
# 2. Rewards
#
# The reward is a program, not a model: right answers can be checked. It looks at the finished text
# only, however the model got there (outcome supervision; section 11 rewards single steps):
#
#     combined = correctness (2.0 same text, 1.5 same number, else 0) + format (4 tags, 0.2 each)
#
# The format term is a foothold: a model that never writes the tags would never be right. It is
# small, so that it pays to be right ("control: format reward only" in results/gsm8k/ shows what the
# format term does alone). The same text earns more than the same number, so that the model learns
# to write the number alone between the tags, without units.

# Digits, commas and points that begin and end as a number does; read_number judges what is inside.
NUMBER = r"(?:(?<!\.)\.)?[0-9](?:[0-9.,]*[0-9])?"
SIGNED_NUMBER = re.compile(
    rf"""
    (?: (?<![\w)]) ([-+\u2212]) )?  # [1] a sign, not a hyphen or a minus between numbers
    (?: [$£€]\s? ([-\u2212])? )?    # [2] the sign behind a currency: $-5
    ({NUMBER})                      # [3] the number
    (?: \s?/\s? ({NUMBER}) )?       # [4] its divisor: a/b is one number
    """,
    re.VERBOSE,
)
LATEX_FRACTION = re.compile(r"(?<![0-9])\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def read_number(digits):
    """'1,234.50' → Fraction(2469, 2); None for misplaced commas, two points, or over 40 characters
    (nobody's answer, and arithmetic with such numbers would take long)."""
    valid = r"([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?"
    if len(digits) > 40 or not re.fullmatch(valid, digits):
        return None
    return Fraction(digits.replace(",", ""))


def parse_number(text):
    r"""The number in a text that holds exactly one → Fraction, exact; None for none or several.

    Reads signs, thousands commas, decimals, currency, a/b and \frac{a}{b}; ignores %, units, \boxed
    and full stops: '-$1,080.50 a year.' is −2161/2. Never raises, in time linear in the text.
    Needs: re, itertools, fractions.Fraction, NUMBER, SIGNED_NUMBER, LATEX_FRACTION, read_number.
    """
    text = LATEX_FRACTION.sub(r"\1/\2", text.replace("{,}", ","))
    found = list(itertools.islice(SIGNED_NUMBER.finditer(text), 2))
    # ٣ or ½ would be a number that the pattern does not see; the exponent of cm² is none, but that
    # of 10² is, and \frac12 is not 12.
    unseen = any(c.isnumeric() and c not in "²³" for c in text if not c.isascii())
    if len(found) != 1 or unseen or re.search(r"[0-9)][²³]|\\[dt]?frac[^{]", text):
        return None
    sign, inner_sign, digits, divisor = found[0].groups()
    number, divisor = read_number(digits), read_number(divisor or "1")
    if number is None or not divisor:
        return None
    negative = sign in ("-", "\u2212") or inner_sign is not None
    return (-number if negative else number) / divisor


def extract_answer_from_model_output(text):
    """The stripped text of the last <answer>; None if that is not closed, empty or '...'."""
    answer, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    if "<answer>" not in text or not closed or answer.strip() in ("", "..."):
        return None
    return answer.strip()


def correctness_reward(completions, answers):
    """2.0 for the same text as the right answer, 1.5 for the same number, else 0 → list[float]

    completions, answers: lists of texts of the same length; answers as after GSM8K's '####'.
    Needs: extract_answer_from_model_output, parse_number.
    """

    def grade(given, answer):
        if given is None:
            return 0.0
        if given == answer.strip():
            return 2.0
        number = parse_number(given)
        return 1.5 if number is not None and number == parse_number(answer) else 0.0

    return [grade(extract_answer_from_model_output(c), a) for c, a in zip(completions, answers)]


def format_reward(completions):
    """0.2 for each of the four tags that is present, wherever it stands → list[float]"""
    return [0.2 * sum(tag in completion for tag in TAGS) for completion in completions]


def combined_reward(completions, answers):
    """correctness_reward + format_reward, 0 … 2.8 → list[float]"""
    correctness, form = correctness_reward(completions, answers), format_reward(completions)
    return [c + f for c, f in zip(correctness, form)]


# ==================================================================================================
# 3. Sampling
#
# The rollout: a group of G = num_generations completions for each prompt, drawn token by token from
#
#     π(a_t | s, a_<t) = softmax(logits / temperature)[a_t]      s: the prompt, a_<t: tokens so far
#
# and from nothing else, because the ratios of section 6 assume exactly that. A checkpoint brings
# habits of its own (Qwen2.5-1.5B-Instruct: top_k 20, top_p 0.8, repetition_penalty 1.1, temperature
# 0.7), and model.generate() follows them unless each is switched off: then the samples come from
# one distribution and are scored under another. So the loop is written out here. It reads a prompt
# once for its whole group, keeps the KV cache, and drops rows as they finish.


def create_completion_mask(completion_ids, eos_token_ids):
    """1 up to and including the first end token, 0 behind it.

    (!1) By position, not by comparing with the pad token: pad is often the end token itself, and a
    model whose end token is outside the mask never learns to stop.

    completion_ids int[row pos], eos_token_ids a list → int[row pos]. Needs: torch.
    """
    ends = torch.tensor(eos_token_ids, device=completion_ids.device)  # [end]
    is_end = torch.isin(completion_ids, ends).int()  # [row pos]
    ends_before = is_end.cumsum(dim=-1) - is_end  # [row pos]
    return (ends_before == 0).int()


def get_eos_token_ids(model, tokenizer):
    """Every token that ends a completion: the checkpoint's generation_config and the tokenizer's.

    Qwen2.5 has two. Raises ValueError if there is none.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    if not ends:
        raise ValueError("neither tokenizer nor generation_config has an end token (eos_token_id)")
    return ends


def encode(tokenizer, texts, padding_side="left"):
    """Texts as tokens; prompts are padded on the left, so that all end where completions begin.

    → ids, mask int[batch pos]
    """
    encoded = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side=padding_side,
        return_tensors="pt",
    )
    return encoded["input_ids"], encoded["attention_mask"]


def decode_completions(tokenizer, completion_ids, completion_mask):
    """→ (texts without special tokens, the tokens inside the mask as lists)"""
    tokens = [row[: int(n)].tolist() for row, n in zip(completion_ids, completion_mask.sum(dim=-1))]
    texts = tokenizer.batch_decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts, tokens


class Cache(DynamicCache):
    """Keys and values in the precision that attention will compute with.

    Under autocast the rotary embedding makes them float32, and attention would cast the whole cache
    again for every token. Cast once, the results are the same in half the memory.
    """

    def update(self, keys, values, *args, **kwargs):
        """Called by the model, once a layer and token."""
        if torch.is_autocast_enabled(keys.device.type):
            dtype = torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(dtype), values.to(dtype)
        return super().update(keys, values, *args, **kwargs)


@contextlib.contextmanager
def eval_mode(model):
    """All modules in eval mode inside the with-block, and each as it was behind it, errors or not.

    Needs: contextlib.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample_tokens(logits, temperature=1.0, generator=None):
    """A token for each row from softmax(logits / temperature); the likeliest if temperature is 0.

    logits float[row vocab] → int[row]. Raises FloatingPointError if they are not finite. generator:
    on the device of the logits; None: torch's own. Needs: torch.
    """
    logits = logits.float()  # [row vocab]
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The first token where the cumulative probability exceeds a uniform number. (The same as
    # torch.multinomial, which draws a random number for every entry of the vocabulary.)
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    cumulative /= cumulative[:, -1:].clone()  # [row vocab], ends in exactly 1
    uniform = torch.rand(
        len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator
    )  # [row 1], below 1
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0]  # [row]


@torch.no_grad()
def generate_completions(
    model, tokenizer, prompts, num_generations, max_completion_length,
    temperature=1.0, eos_token_ids=None, generator=None,
):
    """Sample num_generations completions of each prompt; greedy if temperature is 0.

    model: a causal language model of transformers, not wrapped. prompts: texts as build_prompt
    makes them. eos_token_ids: a list; None: those of get_eos_token_ids. generator: a
    torch.Generator on the model's device; the same state gives the same samples.

    Returns prompt_ids, prompt_mask int[row prompt_pos], left-padded, each prompt repeated
    num_generations times in a row, and completion_ids, completion_mask int[row pos], padded behind
    the end token, with 1 ≤ pos ≤ max_completion_length. Raises FloatingPointError if the logits are
    not finite.
    Needs: torch, torch.nn.functional as F; Cache, encode, create_completion_mask,
    get_eos_token_ids, eval_mode, sample_tokens.
    """
    eos_token_ids = eos_token_ids or get_eos_token_ids(model, tokenizer)
    ends = torch.tensor(eos_token_ids, device=model.device)  # [end]
    prompt_ids, prompt_mask = (x.to(model.device) for x in encode(tokenizer, prompts))
    # each [batch prompt_pos]

    def repeat(x):
        return x.repeat_interleave(num_generations, dim=0)  # [batch …] → [row …]

    # (!2) In train mode gradient checkpointing drops the KV cache, and the completions are wrong.
    with eval_mode(model):
        # Read the prompts, one pass for a whole group. Positions do not count the padding.
        positions = (prompt_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [batch prompt_pos]
        cache = Cache(config=model.config)
        logits = model(
            prompt_ids, attention_mask=prompt_mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # [batch vocab]
        cache.batch_repeat_interleave(num_generations)
        # [row vocab], [row prompt_pos], [row 1]
        logits, mask, position = repeat(logits), repeat(prompt_mask), repeat(positions[:, -1:])
        active = torch.arange(len(mask), device=model.device)  # [active]: rows that have not ended
        completion_ids = torch.full(
            (len(mask), max_completion_length), tokenizer.pad_token_id, device=model.device
        )  # [row pos]
        for t in range(max_completion_length):
            token = sample_tokens(logits, temperature, generator)  # [active]
            completion_ids[active, t] = token
            going = (~torch.isin(token, ends)).nonzero()[:, 0]  # indices into active
            if len(going) == 0 or t == max_completion_length - 1:
                break
            if len(going) < len(active):  # rows that have ended are dropped, from the cache too
                cache.batch_select_indices(going)
                active, mask, position, token = (x[going] for x in (active, mask, position, token))
            mask = F.pad(mask, (0, 1), value=1)  # [active prompt_pos+t+1]
            position = position + 1  # [active 1]
            logits = model(
                token.unsqueeze(-1), attention_mask=mask, position_ids=position,
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # [active vocab]
    completion_ids = completion_ids[:, : t + 1]  # [row pos]
    completion_mask = create_completion_mask(completion_ids, eos_token_ids)  # [row pos]
    return repeat(prompt_ids), repeat(prompt_mask), completion_ids, completion_mask


# ==================================================================================================
# 4. Advantages
#
# How much better a completion was than the others of its group. PPO trains a second network to say
# what reward was to be expected; GRPO takes the mean of the group. (grpo_sort.py compares these.)
#
#     normalized         (r − mean) / (std + 1e-4)     GRPO, arXiv 2402.03300, section 4.1.2
#     centered           r − mean                      Dr. GRPO, arXiv 2503.20783
#     leave_one_out      r − mean of the others        RLOO, arXiv 2402.14740
#     batch_normalized   (r − mean) / (std of the batch's rewards + 1e-4)   arXiv 2508.08221
#
# A group whose rewards are all equal has advantages of 0 and teaches nothing: a silent group. The
# 1e-4, as in TRL, only avoids a division by 0: a group that differs by one tag is still scaled to
# full size.


def compute_advantages(rewards, mode="normalized"):
    """One advantage for each completion.

    rewards float[batch trial], a group to a line → float32[batch trial]; flatten() makes the rows
    of grpo_loss of it. batch_normalized needs the rewards of the whole batch, of all processes.
    Raises ValueError for an unknown mode, another shape, or groups of one. Needs: torch.
    """
    if mode not in ("normalized", "centered", "leave_one_out", "batch_normalized"):
        raise ValueError(
            f"mode {mode!r} is unknown: normalized, centered, leave_one_out or batch_normalized"
        )
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            "rewards must be [batch num_generations] with num_generations at least 2, "
            f"not {list(rewards.shape)}"
        )
    rewards = rewards.float()
    mean = rewards.mean(dim=-1, keepdim=True)  # [batch 1]
    # (!3) The float32 mean of equal rewards may differ from them by rounding, and divided by 1e-4
    # that would be an advantage: exactly 0 instead.
    equal = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)  # [batch 1]
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]
    if mode == "centered":
        return centered
    if mode == "normalized":
        return centered / (rewards.std(dim=-1, keepdim=True) + 1e-4)
    if mode == "leave_one_out":
        return centered * rewards.shape[1] / (rewards.shape[1] - 1)
    return centered / (rewards.std() + 1e-4)


ADVANTAGES = ("normalized", "centered", "leave_one_out", "batch_normalized")


def compute_process_advantages(step_rewards, completion_mask, num_generations=None):
    """Advantages of tokens from rewards of steps: GRPO, arXiv 2402.03300, section 4.1.3.

    A step is a line of reasoning with an equation, or the answer (section 11). The rewards of all
    steps of a group are normalised together; the advantage of a token is the sum of the normalised
    rewards of its own and all later steps. Mind that every step that is right adds a positive term:
    a model is also paid for padding its reasoning with true equations.

    step_rewards: for each row its steps as (end token index, reward), as locate_steps gives them;
    completion_mask int[row pos]; num_generations: consecutive rows that are a group, None for all →
    float32[row pos], on the mask's device. Raises ValueError if rows or tokens do not fit. Needs:
    torch.
    """
    rows, size = len(completion_mask), num_generations or len(completion_mask)
    if len(step_rewards) != rows or rows % size:
        raise ValueError(
            f"step_rewards has {len(step_rewards)} rows, completion_mask {rows}; "
            f"both must be the same multiple of num_generations ({size})"
        )
    width = completion_mask.shape[1]
    if any(end >= width for row in step_rewards for end, _ in row):
        raise ValueError(f"a step ends behind the {width} tokens of completion_mask")
    advantages = torch.zeros(completion_mask.shape)  # [row pos]
    for first in range(0, rows, size):
        group = range(first, first + size)
        rewards = [reward for row in group for _, reward in step_rewards[row]]
        rewards = torch.tensor(rewards, dtype=torch.float32)  # [step], of the whole group
        if len(rewards) < 2 or rewards.max() == rewards.min():
            continue
        mean, std = rewards.mean().item(), rewards.std().item()
        for row in group:
            for end, reward in step_rewards[row]:
                advantages[row, : end + 1] += (reward - mean) / (std + 1e-4)
    return advantages.to(completion_mask.device) * completion_mask


# ==================================================================================================
# 5. Log-probabilities
#
# The same log π(a_t | s, a_<t) that was sampled from, now with gradients and all positions at once.
# Logits are the largest tensor of the whole job: one number for each of 151,936 vocabulary entries
# and each token, 0.6 MB a token in float32, so 2 GB for the 8 completions of a micro-batch, and
# several times that in the backward pass. But only one number per token is needed. So the output
# layer is applied to a chunk of tokens at a time, and applied again in the backward pass rather
# than remembered: memory depends on the size of the chunk only.


def selective_log_softmax(logits, ids):
    """log softmax(logits) at ids, without the table of all the others: logit − log Σ exp(logits).

    logits float[… vocab], ids int[…] of the same shape → float[…], at least float32. Needs: torch.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [… vocab]
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def compute_log_probs(
    model, input_ids, attention_mask, logits_to_keep, temperature=1.0, chunk_size=512
):
    """The log-probability of each of the last logits_to_keep tokens, given all before it.

    input_ids, attention_mask int[row pos], prompt and completion; padding, any ids of the
    vocabulary, may stand on both sides, and its own log-probabilities mean nothing. temperature,
    above 0, is that of the sampling, chunk_size a number of tokens. → float32[row logits_to_keep].

    model: a causal language model of transformers whose logits are those of its output layer, not
    scaled or capped (Gemma 2, Cohere, Granite), and not wrapped: DistributedDataParallel's .module,
    after which gradients have to be reduced by hand; PEFT's .get_base_model().
    Raises ValueError if logits_to_keep does not leave a token to start from. Needs: torch,
    checkpoint from torch.utils.checkpoint, selective_log_softmax.
    """
    if not 0 < logits_to_keep < input_ids.shape[1]:
        raise ValueError(
            f"logits_to_keep must be between 1 and {input_ids.shape[1] - 1}, not {logits_to_keep}"
        )
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [row pos]
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state  # [row pos dim]
    # (!4) The output at position t predicts token t + 1.
    hidden = hidden[:, -logits_to_keep - 1 : -1].flatten(0, 1)  # [row*kept dim]
    targets = input_ids[:, -logits_to_keep:].flatten()  # [row*kept]
    head = model.get_output_embeddings()

    def score(h, t):
        logits = head(h).float()  # [chunk vocab]
        if temperature != 1:  # saves a pass over the largest tensor
            logits = logits / temperature
        return selective_log_softmax(logits, t)  # [chunk]

    log_probs = [
        checkpoint(score, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size))
    ]
    return torch.cat(log_probs).view(len(input_ids), logits_to_keep)  # [row kept]


# ==================================================================================================
# 6. The loss
#
# With ρ = exp(log π − log π_old), the ratio to the policy that sampled, the loss of a token is
#
#     ℓ = −min(ρ Â, clip(ρ, 1 − ε, 1 + ε_high) Â) + β k3        GRPO, arXiv 2402.03300, eq. 3
#     k3 = exp(log π_ref − log π) − (log π_ref − log π) − 1     eq. 4: KL to the reference model
#
# The penalty β k3 holds π near π_ref, so that it does not forget what the reward does not ask for
# (k3 is one of three estimators: grpo_sort.py, section 8). ρ matters when µ > 1 updates are made on
# the same samples: once it has passed 1 + ε_high with Â > 0, or 1 − ε with Â < 0, the token is not
# pushed any further; the minimum keeps the way back open. GRPO has ε_high = ε, DAPO a larger one,
# which lets rare tokens grow. In the first update, the only one by default (µ = 1), ρ = 1 and
# nothing is clipped. There the value of the loss says little: with loss type grpo and outcome
# supervision it is minus the mean advantage, 0, plus β k3. Its gradient, −Â ∇log π, is what
# teaches.
#
# How the tokens of all rows are averaged is a choice of its own, the loss type:
#
#     grpo      mean over rows of each row's mean     a token of a long completion counts less
#     dapo      Σ ℓ / all tokens of the step          every token counts the same (2503.14476)
#     dr_grpo   Σ ℓ / (rows · max_completion_length)  the same, over a constant (2503.20783)
#     cispo     as dapo, but clips the weight of the push, so that no token loses its gradient:
#               ℓ = −stop_gradient(min(ρ, 1 + ε_high)) Â log π       (2506.13585, section 3)
#
# importance_sampling_level="sequence" replaces every ρ of a completion by the geometric mean of
# them (GSPO, arXiv 2507.18071, eq. 7), which moves so little that ε has to be a few 1e-4. Which
# flags make which method (with --beta 0, but for GRPO; clip, GSPO's ratio and CISPO's weight only
# do something with --mu above 1):
#
#     GRPO      the defaults
#     Dr. GRPO  --loss-type dr_grpo --advantage centered
#     DAPO      --loss-type dapo --epsilon-high 0.28   (not its dynamic sampling, length penalty)
#     GSPO      --importance-sampling-level sequence --epsilon 3e-4 --epsilon-high 4e-4
#     CISPO     --loss-type cispo --epsilon-high 4     (TRL's epsilon_high is 1 more: 5)
#     Lite PPO  --loss-type dapo --advantage batch_normalized
#
# A batch may reach the loss in parts (micro-batches, processes): divided by the totals of the whole
# batch, the losses of its parts add up.


def grpo_loss(
    log_probs, old_log_probs, ref_log_probs, advantages, completion_mask,
    *, epsilon=0.2, epsilon_high=None, beta=0.04, loss_type="grpo",
    importance_sampling_level="token", max_completion_length=None, num_items=None, num_rows=None,
):
    """The loss to minimise and what to log of it → (scalar, dict of detached scalars)

    log_probs float32[row pos], with gradient. old_log_probs, ref_log_probs [row pos] are constants:
    in the first update old_log_probs may be log_probs itself, and ref_log_probs may be None if beta
    is 0. advantages float[row] or [row pos]. completion_mask [row pos], 0 for padding, whose
    log-probabilities may be anything. epsilon_high None: epsilon. max_completion_length is
    dr_grpo's constant. A row without tokens adds 0 and counts as a row.

    If these rows are only a part of a batch, num_items and num_rows are the completion tokens and
    the completions of all of it; then the losses, and the gradients, of the parts add up to those
    of the batch. (Where gradients are averaged over processes, as by DistributedDataParallel,
    multiply by the number of processes.) None: those of these rows.

    The metrics are means over tokens, to be weighted by tokens when parts are put together: kl (k3;
    only if beta is not 0), ratio, and the shares clip_fraction_low and clip_fraction_high of tokens
    whose gradient (in cispo: whose weight) the clip has cut.
    Raises ValueError for names and shapes that do not fit. Needs: torch.
    """
    if loss_type not in ("grpo", "dapo", "dr_grpo", "cispo"):
        raise ValueError(f"loss_type {loss_type!r} is unknown: grpo, dapo, dr_grpo or cispo")
    if importance_sampling_level not in ("token", "sequence"):
        name = f"importance_sampling_level {importance_sampling_level!r}"
        raise ValueError(f"{name} is unknown: token or sequence")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
    if beta and ref_log_probs is None:
        raise ValueError("beta is not 0, so ref_log_probs is needed")
    tensors = {"old_log_probs": old_log_probs, "completion_mask": completion_mask}
    for name, tensor in (tensors | {"ref_log_probs": ref_log_probs} if beta else tensors).items():
        if tensor.shape != log_probs.shape:
            shapes = f"{list(log_probs.shape)}, not {list(tensor.shape)}"
            raise ValueError(f"{name} must have the shape of log_probs, {shapes}")
    if advantages.shape == log_probs.shape[:1]:
        advantages = advantages.unsqueeze(-1)  # [row 1]
    if log_probs.dim() != 2 or advantages.shape not in (log_probs.shape, (len(log_probs), 1)):
        shapes = f"{list(log_probs.shape)} and {list(advantages.shape)}"
        raise ValueError(f"log_probs must be [row pos], advantages [row (pos)], not {shapes}")
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    mask, padding = completion_mask.to(log_probs.dtype), completion_mask == 0  # [row pos]
    row_tokens = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [row 1]
    tokens = mask.sum().clamp(min=1)

    # The push, along the advantage.
    # (!5) Padding is removed before exp(): 0 · inf is not 0.
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(padding, 0)  # [row pos]
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(dim=-1, keepdim=True) / row_tokens  # [row 1]
    ratio = log_ratio.exp()  # [row pos] or [row 1], and so are low, high, weight and clipped
    low, high = ratio < 1 - epsilon, ratio > 1 + epsilon_high
    if loss_type == "cispo":  # clips whatever the advantage, and at the top only
        low, weight = torch.zeros_like(low), ratio.detach().clamp(max=1 + epsilon_high)
        token_loss = -weight * advantages * log_probs.masked_fill(padding, 0)  # [row pos]
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        low, high = low & (advantages < 0), high & (advantages > 0)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages)  # [row pos]
    to_log = {"ratio": ratio, "clip_fraction_low": low, "clip_fraction_high": high}

    # The way back to the reference.
    if beta:
        x = (ref_log_probs.detach() - log_probs).masked_fill(padding, 0)  # [row pos]
        to_log["kl"] = x.exp() - x - 1  # [row pos]
        token_loss = token_loss + beta * to_log["kl"]

    # The average.
    token_loss = token_loss * mask  # [row pos]
    if loss_type == "grpo":
        loss = (token_loss / row_tokens).sum() / (num_rows or len(mask))
    elif loss_type == "dr_grpo":
        loss = token_loss.sum() / ((num_rows or len(mask)) * max_completion_length)
    else:
        loss = token_loss.sum() / (num_items or tokens)
    return loss, {name: (x * mask).sum().detach() / tokens for name, x in to_log.items()}


LOSS_TYPES, LEVELS = ("grpo", "dapo", "dr_grpo", "cispo"), ("token", "sequence")

# ==================================================================================================
# 7. A worked example, to follow with a pencil
#
# The rehearsal prints it before it trains. With a single prompt the batch is the group, so
# batch_normalized equals normalized.

EXAMPLE = """\
Ann sold 48 clips in April and half as many in May. How many in all? (72) Four completions; the
first three have all tags, the last is the number alone, where nobody can see that it is right.

reasoning         48/2 = 24        48/2 = 24        48/2 = 26        none
                  48+24 = 72       48+24 = 73       48+26 = 74
answer            72               73               74               72, without tags
correctness        2.00             0.00             0.00             0.00
format             0.80             0.80             0.80             0.00
reward             2.80             0.80             0.80             0.00      mean 1.10, std 1.19
normalized         1.42            -0.25            -0.25            -0.92
centered           1.70            -0.30            -0.30            -1.10
leave_one_out      2.27            -0.40            -0.40            -1.47
step rewards      1 1 1            1 0 0            0 1 0            0          (section 11)
process           2.8 1.9 0.9      -0.9 -1.9 -0.9   -0.9 0.0 -0.9    -0.9       a token of each step

In the first update every ratio is 1, and the loss (type grpo) is minus the mean advantage: 0. It
teaches all the same: its gradient at the log-probability of each of a completion's n tokens is
−Â / (4 n), so the first completion becomes likelier and the others less likely, the one without
tags most of all."""

# ==================================================================================================
# 8. Settings
#
# Each has its flag on the command line: num_steps is --num-steps. The tutorial whose task and
# rewards these are (A. Burkov, github.com/aburkov/theLMbook, GRPO from scratch on several GPUs)
# gives 1 iteration, 500 steps of 7 prompts (on 8 GPUs), 12 completions, 400 tokens, β 0.04, µ 1.
# Different here are
#
#     8 prompts, which 2, 4 and 8 GPUs can share evenly
#     ε 0.2 instead of 0.1: that of PPO's paper (arXiv 1707.06347)
#     learning rate 2e-6 instead of 5e-6. The tutorial keeps weights in bfloat16, which rounds small
#         updates away and so needs larger ones; here they are float32 (section 12). On this model
#         and task, in runs of 15 steps, 6e-6 on float32 does about what 1.7e-5 does on bfloat16
#         (github.com/areal-project/AReaL, pull request 1634).
#     gradient norm 1 instead of 0.1: AdamW divides out a constant scale of the gradients, but a
#         bound that nearly every step exceeds scales each step by a different factor.

REWARDS, SUPERVISION = ("combined", "correctness", "format"), ("outcome", "process")


ABOVE_ZERO = sys.float_info.min  # the smallest bound that excludes 0


def setting(default, text, least=None, below=math.inf, choices=None):
    """A field of Settings: its default, the help line of its flag, and what it may be."""
    metadata = {"help": text, "least": least, "below": below, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    model: str = setting("Qwen/Qwen2.5-1.5B-Instruct", "hub name or local folder")
    train_file: str | None = setting(None, "JSONL to train on; default: openai/gsm8k from the hub")
    eval_file: str | None = setting(
        None, "JSONL to evaluate on; default: GSM8K's test split, or a tenth of --train-file"
    )
    output_dir: str = setting("runs/gsm8k", "folder for metrics, checkpoints, final model")
    # the algorithm
    num_iterations: int = setting(1, "rounds of --num-steps, each with a new reference model", 1)
    num_steps: int = setting(500, "steps a round; each samples once, then makes --mu updates", 1)
    batch_size: int = setting(8, "prompts a step, over all processes together", 1)
    num_generations: int = setting(12, "completions of each prompt: the group size G", 2)
    max_completion_length: int = setting(400, "tokens, at most", 1)
    temperature: float = setting(1.0, "of the samples, and of log π", ABOVE_ZERO)
    reward: str = setting("combined", "for outcome supervision", choices=REWARDS)
    supervision: str = setting("outcome", "reward the answer, or steps", choices=SUPERVISION)
    advantage: str = setting("normalized", "for outcome supervision", choices=ADVANTAGES)
    loss_type: str = setting("grpo", "how tokens are averaged, and cispo", choices=LOSS_TYPES)
    importance_sampling_level: str = setting("token", "of the ratio", choices=LEVELS)
    epsilon: float = setting(0.2, "ε: clip range", ABOVE_ZERO, 1)
    epsilon_high: float | None = setting(None, "upper clip range; default: --epsilon", ABOVE_ZERO)
    beta: float = setting(0.04, "β: weight of the KL penalty; 0 holds no reference model", 0)
    mu: int = setting(1, "µ: updates on the same samples (TRL: num_iterations)", 1)
    # the optimizer
    learning_rate: float = setting(2e-6, "of AdamW, constant", ABOVE_ZERO)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to it", ABOVE_ZERO)
    micro_batch_size: int = setting(8, "completions in one forward and backward pass: memory", 1)
    gradient_checkpointing: bool = setting(False, "less memory, about a third more computation")
    # around it
    eval_examples: int | None = setting(None, "evaluate the first N rows only; 0: none", 0)
    eval_every: int = setting(100, "steps between evaluations; 0: only before and after", 0)
    save_every: int = setting(50, "steps between checkpoints; the last two are kept", 1)
    resume: bool = setting(False, "go on from the last checkpoint in --output-dir")
    eval_only: bool = setting(False, "evaluate the model and leave")
    rehearsal: bool = setting(False, "the whole job in miniature, on a CPU, nothing to download")
    seed: int = setting(0, "same seed, same run (on a GPU: but for rounding)", 0, 2**63)
    device: str = setting("auto", "auto needs a GPU", choices=("auto", "cpu", "cuda"))


# A resumed run may change these; any other would make it another run.
FREE_TO_CHANGE = (
    "output_dir", "num_steps", "eval_file", "eval_examples", "eval_every", "save_every", "resume",
    "micro_batch_size", "gradient_checkpointing", "eval_only", "device",
)


def check_settings(settings):
    """Raise ValueError for a setting that cannot work, naming its flag and what it may be."""
    for item in fields(settings):
        flag, value = f"--{item.name.replace('_', '-')}", getattr(settings, item.name)
        least, below, choices = (item.metadata[key] for key in ("least", "below", "choices"))
        if choices and value not in choices:
            raise ValueError(f"{flag} may be {', '.join(choices)}, not {value!r}")
        if least is not None and value is not None and not least <= value < below:
            bounds = "above 0" if least == ABOVE_ZERO else f"at least {least}"
            bounds += "" if below == math.inf else f" and below {below}"
            raise ValueError(f"{flag} must be {bounds}, not {value}")
    if settings.reward == "format" and settings.supervision == "process":
        raise ValueError("--supervision process rewards steps, so --reward format has no meaning")


def check_batch_size(settings, train_problems):
    """Raise ValueError if a step cannot be filled, or not every process would get a prompt."""
    if not get_world_size() <= settings.batch_size <= len(train_problems):
        raise ValueError(
            f"--batch-size {settings.batch_size} must be at least the number of processes "
            f"({get_world_size()}) and at most the number of training rows ({len(train_problems)})"
        )


# ==================================================================================================
# 9. Evaluation
#
# Greedy, one completion a question, on problems that were not trained on. Two accuracies, because a
# model can know the answer and not the format: strict wants the right number in the answer tag,
# lenient takes the last number of the text where the tag has none. What training gains is often
# strict alone: format, not arithmetic. And n questions are a sample, so an interval belongs to it.
#
# From here on the work may be shared by several processes. In a single one get_rank() is 0,
# get_world_size() 1, and my_share, gather_lists and sum_over_processes give back what they get;
# autocast chooses the precision (section 12). say, Log, StopRequest: section 13.


def wilson_interval(successes, n, z=1.959964):
    """The 95 % confidence interval of a rate (Wilson 1927) → (low, high). Needs: math."""
    rate, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * rate * (1 - rate) + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def last_number(text):
    """The last number of a text, as parse_number reads it → Fraction or None"""
    pieces = [match.group() for match in SIGNED_NUMBER.finditer(text)]
    return parse_number(pieces[-1]) if pieces else None


def evaluate_model(model, tokenizer, problems, max_completion_length=400, batch_size=64):
    """Greedy accuracy on problems as load_problems gives them, shared out over the processes.

    → dict: examples, strict and its interval strict_low, strict_high, lenient, format (share with
    all four tags), finished_fraction (share that ended by itself), mean_length (tokens). Raises
    ValueError if there are no problems, FloatingPointError if the logits are not finite.
    """
    if not problems:
        raise ValueError("evaluate_model needs at least one problem")
    ends = get_eos_token_ids(model, tokenizer)
    # Prompts of like length together: less padding.
    mine = sorted(problems[get_rank() :: get_world_size()], key=lambda p: len(p["question"]))
    counts = torch.zeros(5, dtype=torch.float64)  # strict, lenient, format, finished, tokens
    progress = tqdm(total=len(mine), desc="evaluating", leave=False, disable=get_rank() > 0)
    for first in range(0, len(mine), batch_size):
        batch = mine[first : first + batch_size]
        prompts = [build_prompt(problem["question"], tokenizer) for problem in batch]
        with autocast(model.device):
            _, _, ids, mask = generate_completions(
                model, tokenizer, prompts, 1, max_completion_length, temperature=0
            )
        texts, tokens = decode_completions(tokenizer, ids, mask)
        for problem, text, its_tokens in zip(batch, texts, tokens):
            gold = parse_number(problem["answer"])
            number = parse_number(extract_answer_from_model_output(text) or "")
            strict = number == gold
            lenient = strict or (number is None and last_number(text) == gold)
            has_format, finished = all(tag in text for tag in TAGS), its_tokens[-1] in ends
            counts += torch.tensor([strict, lenient, has_format, finished, len(its_tokens)])
        progress.update(len(batch))
    progress.close()
    n, totals = len(problems), sum_over_processes(counts).tolist()
    names = ("strict", "lenient", "format", "finished_fraction", "mean_length")
    means = {name: total / n for name, total in zip(names, totals)}
    low, high = wilson_interval(totals[0], n)
    strict = {"strict": means.pop("strict"), "strict_low": low, "strict_high": high}
    return {"examples": n, **strict, **means}


def describe_evaluation(result):
    """One line about what evaluate_model returned."""
    return (
        f"{result['strict']:.1%} of {result['examples']} held-out problems right (95 % interval "
        f"{result['strict_low']:.1%} to {result['strict_high']:.1%}), {result['lenient']:.1%} "
        f"lenient; {result['format']:.1%} with all tags, {result['mean_length']:.0f} tokens"
    )


# ==================================================================================================
# 10. The training loop
#
# for every round (num_iterations; one by default):
#     π_ref ← a frozen copy of π
#     for every step (num_steps):
#         rollout: prompts → completions → rewards → advantages      (the policy is π_old)
#         µ times: log-probabilities now → loss → gradient over all rows → AdamW
#
# First all of it on one screen, then the same for runs that take hours: rounds, micro-batches,
# several processes, the other settings, logs, checkpoints.


def step_indices(step, batch_size, num_problems, seed):
    """The problems of one step: every epoch is a new permutation, and none is left out."""
    indices = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(k, num_problems)
        if not indices or position == 0:
            shuffled = random.Random(f"{seed}, epoch {epoch}")
            order = shuffled.sample(range(num_problems), num_problems)
        indices.append(order[position])
    return indices


def train_simply(
    model, tokenizer, problems, num_steps=500, batch_size=8, num_generations=12,
    max_completion_length=400, mu=1, beta=0.04, learning_rate=2e-6, seed=0,
):
    """Sections 1 to 6 in order: train_with_grpo on one device, with nothing around it.

    problems as load_problems gives them; model in float32. For a small model, or a first look.
    """
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(seed)
    for step in range(num_steps):
        batch = [problems[i] for i in step_indices(step, batch_size, len(problems), seed)]
        prompts = [build_prompt(problem["question"], tokenizer) for problem in batch]
        prompt_ids, prompt_mask, completion_ids, completion_mask = generate_completions(
            model, tokenizer, prompts, num_generations, max_completion_length, generator=generator
        )  # [row prompt_pos], [row prompt_pos], [row pos], [row pos]
        texts, _ = decode_completions(tokenizer, completion_ids, completion_mask)
        answers = [problem["answer"] for problem in batch for _ in range(num_generations)]
        rewards = torch.tensor(combined_reward(texts, answers)).view(-1, num_generations)
        advantages = compute_advantages(rewards).flatten().to(model.device)  # [row]
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # [row prompt_pos+pos]
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)  # [row prompt_pos+pos]
        inputs = input_ids, attention_mask, completion_ids.shape[1]
        with torch.no_grad():
            old_log_probs = compute_log_probs(model, *inputs)  # [row pos]
            ref_log_probs = compute_log_probs(reference, *inputs)  # [row pos]
        for _ in range(mu):
            log_probs = compute_log_probs(model, *inputs)  # [row pos]
            loss, _ = grpo_loss(
                log_probs, old_log_probs, ref_log_probs, advantages, completion_mask, beta=beta
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# What metrics.jsonl says, a line a step, and what is normal:
#
#     loss                 mean over the µ updates. With loss type grpo, outcome supervision and
#                          µ = 1 near 0 from the first step to the last, else some other number
#                          (section 6), but no measure of progress. Watch reward and accuracy.
#     reward_mean          mean reward of this step's completions; noisy, rises over tens of steps
#     reward_std           mean over groups of the spread within one: what there is to learn from
#     correctness, format  the two parts of the reward, up to 2 and 0.8
#     accuracy             share of completions with the right number in the answer tag
#     kl                   k3 to the reference, per token, from 0 up; null if β = 0
#     clip_fraction        share of tokens whose gradient was clipped; 0 if µ = 1
#     grad_norm            before clipping to max_grad_norm, mean over the µ updates
#     completion_length    tokens, mean; if always the maximum, the model never stops
#     finished_fraction    share that ended with an end token
#     zero_std_groups      silent groups, whose advantages are all 0: nothing to learn from. They
#                          grow in number as more problems are always solved
#     skipped_updates      updates of this step left out because a number was not finite
#     tokens_per_second    completion tokens sampled, over the time of the whole step
#     step_seconds, peak_memory_bytes, learning_rate

MAX_SKIPPED = 3  # the run gives up after so many steps in a row with numbers that are not finite


@dataclass
class Rollout:
    """A step's samples, those of this process but for `stats`."""

    input_ids: torch.Tensor  # [row prompt_pos + pos]
    attention_mask: torch.Tensor  # [row prompt_pos + pos]
    completion_mask: torch.Tensor  # [row pos]
    advantages: torch.Tensor  # [row pos]
    stats: list  # of all processes: a dict for each group
    sample: dict  # the first group of this process, to look at


def collect_rollout(model, tokenizer, problems, settings, generator):
    """Sample a group for each problem of this process, reward it, compare it → Rollout"""
    G = settings.num_generations
    prompts = [build_prompt(problem["question"], tokenizer) for problem in problems]
    with autocast(model.device):
        prompt_ids, prompt_mask, completion_ids, completion_mask = generate_completions(
            model, tokenizer, prompts, G, settings.max_completion_length,
            settings.temperature, generator=generator,
        )
    texts, tokens = decode_completions(tokenizer, completion_ids, completion_mask)
    answers = [problem["answer"] for problem in problems for _ in range(G)]
    correctness, form = correctness_reward(texts, answers), format_reward(texts)
    combined = combined_reward(texts, answers)
    rewards = {"combined": combined, "correctness": correctness, "format": form}[settings.reward]
    if settings.supervision == "process":
        steps = [
            locate_steps(step_rewards(text, answer), row, tokenizer)
            for text, answer, row in zip(texts, answers, tokens)
        ]
        advantages = compute_process_advantages(steps, completion_mask, G)  # [row pos]
    else:
        # The rewards of all processes together, so that batch_normalized sees the whole step.
        everyone = torch.tensor(gather_lists(rewards)).view(-1, G)  # [batch trial]
        own = my_share(compute_advantages(everyone, settings.advantage))  # ours of these groups
        advantages = own.reshape(-1, 1).to(model.device) * completion_mask  # [row pos]

    ends, stats = get_eos_token_ids(model, tokenizer), []
    for first in range(0, len(texts), G):
        group = slice(first, first + G)
        stats.append({
            "reward": rewards[group], "correctness": correctness[group], "format": form[group],
            "length": [len(row) for row in tokens[group]],
            "finished": [row[-1] in ends for row in tokens[group]],
            "silent": not advantages[group].any().item(),
        })
    # To look at: the best and the worst completion of the first group, one if they are the same. A
    # completion's advantage is that of its first token.
    best, worst = max(range(G), key=rewards.__getitem__), min(range(G), key=rewards.__getitem__)
    shown = [
        {"text": texts[i], "reward": rewards[i], "advantage": advantages[i, 0].item()}
        for i in dict.fromkeys((best, worst))
    ]
    return Rollout(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        completion_mask=completion_mask, advantages=advantages, stats=gather_lists(stats),
        sample={"question": problems[0]["question"], "answer": answers[0], "completions": shown},
    )


def split_rollout(rollout, micro_batch_size, keep_all):
    """Micro-batches of rows of like length, without the columns that are padding in all of them.

    Rows without advantage have no gradient and are left out, unless keep_all (for the KL penalty).
    → list of dicts; the longest come first, so that a lack of memory shows at once.
    """
    lengths = rollout.attention_mask.sum(dim=-1)  # [row]
    teaches = (rollout.advantages != 0).any(dim=-1) | keep_all  # [row]
    order = [i for i in lengths.argsort(descending=True).tolist() if teaches[i]]
    prompt_length = rollout.input_ids.shape[1] - rollout.completion_mask.shape[1]
    batches = []
    for first in range(0, len(order), micro_batch_size):
        rows = torch.tensor(order[first : first + micro_batch_size], device=lengths.device)
        used = rollout.attention_mask[rows].any(dim=0).nonzero()[:, 0]  # [used], the columns in use
        begin, end = used[0].item(), used[-1].item() + 1
        batches.append({  # now `row` are those of the micro-batch
            "input_ids": rollout.input_ids[rows, begin:end],  # [row prompt_pos+pos], trimmed
            "attention_mask": rollout.attention_mask[rows, begin:end],  # the same
            "completion_mask": rollout.completion_mask[rows, : end - prompt_length],  # [row pos]
            "advantages": rollout.advantages[rows, : end - prompt_length],  # [row pos]
        })
    return batches


def micro_batch_loss(model, reference, batch, all_rows, all_tokens, settings):
    """The part of a step's loss that a micro-batch of split_rollout has → grpo_loss's result.

    In the first update it adds log π_old and log π_ref to the micro-batch.
    """
    inputs = batch["input_ids"], batch["attention_mask"], batch["completion_mask"].shape[1]
    with autocast(model.device):
        log_probs = compute_log_probs(model, *inputs, settings.temperature)  # [row pos]
        if "old" not in batch:
            # (!6) Nothing has been updated since the sampling, so these are log π_old.
            batch["old"], batch["ref"] = log_probs.detach(), None
            if settings.beta:
                with torch.no_grad():  # [row pos]
                    batch["ref"] = compute_log_probs(reference, *inputs, settings.temperature)
    return grpo_loss(
        log_probs, batch["old"], batch["ref"], batch["advantages"], batch["completion_mask"],
        epsilon=settings.epsilon, epsilon_high=settings.epsilon_high, beta=settings.beta,
        loss_type=settings.loss_type,
        importance_sampling_level=settings.importance_sampling_level,
        max_completion_length=settings.max_completion_length,
        num_items=all_tokens, num_rows=all_rows,
    )


def update_policy(model, reference, optimizer, rollout, settings):
    """µ gradient steps on one rollout → dict of what to log, the same in every process.

    The loss of the step is a sum over micro-batches and processes: normalisers are those of the
    whole step, so neither the micro-batch size nor the number of processes changes the gradient,
    but for rounding. The rows that split_rollout leaves out count in them; their loss is 0.
    """
    parameters = list(model.parameters())
    batches = split_rollout(rollout, settings.micro_batch_size, keep_all=settings.beta > 0)
    mine = torch.tensor([len(rollout.completion_mask), rollout.completion_mask.sum(), len(batches)])
    all_rows, all_tokens, all_batches = sum_over_processes(mine).tolist()
    names, skipped = ("loss", "kl", "clip_fraction"), 0
    totals = dict.fromkeys((*names, "grad_norm"), 0.0)
    # Without any batch there is no update: AdamW's momentum alone would move the weights.
    for _ in range(settings.mu if all_batches else 0):
        sums = torch.zeros(3, dtype=torch.float64)  # of `names`; the last two are means over tokens
        for batch in batches:
            loss, metrics = micro_batch_loss(
                model, reference, batch, all_rows, all_tokens, settings
            )
            loss.backward()
            clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
            share = batch["completion_mask"].sum() / all_tokens
            kl = metrics.get("kl", 0.0)
            sums += torch.tensor([loss.item(), float(share * kl), float(share * clipped)])
        if get_world_size() > 1:
            for parameter in parameters:
                if parameter.grad is None:  # a process whose groups were all silent
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        values = dict(zip(names, sum_over_processes(sums).tolist()))
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
        if math.isfinite(values["loss"]) and math.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        for name, value in {**values, "grad_norm": norm}.items():
            totals[name] += value / settings.mu
    if not settings.beta:
        totals["kl"] = math.nan
    # JSON knows neither nan nor inf; skipped_updates says that there was one.
    finite = {name: value if math.isfinite(value) else None for name, value in totals.items()}
    return finite | {"skipped_updates": skipped}


def summarise_rollout(stats):
    """What metrics.jsonl says of a step's samples, from the groups of all processes → dict"""

    def mean_of(name):
        return statistics.fmean([x for group in stats for x in group[name]])

    return {
        "reward_mean": mean_of("reward"),
        "reward_std": statistics.fmean([statistics.stdev(group["reward"]) for group in stats]),
        "correctness": mean_of("correctness"),
        "format": mean_of("format"),
        "accuracy": statistics.fmean([c > 0 for group in stats for c in group["correctness"]]),
        "completion_length": mean_of("length"),
        "finished_fraction": mean_of("finished"),
        "zero_std_groups": sum(group["silent"] for group in stats),
    }


def take_step(model, reference, tokenizer, optimizer, problems, step, settings):
    """Sample, reward, learn: one step on this process's problems → (record for the log, sample)"""
    started = time.perf_counter()
    # The random state is a function of seed, step and rank: nothing to save, nothing to restore.
    source = random.Random(f"{settings.seed}, step {step}, rank {get_rank()}")
    generator = torch.Generator(model.device).manual_seed(source.getrandbits(63))
    rollout = collect_rollout(model, tokenizer, problems, settings, generator)
    learned = update_policy(model, reference, optimizer, rollout, settings)
    tokens = sum(sum(group["length"]) for group in rollout.stats)
    seconds = time.perf_counter() - started
    record = {"step": step, **learned, **summarise_rollout(rollout.stats)} | {
        "learning_rate": settings.learning_rate,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }
    return record, rollout.sample


def show_step(record, sample, settings, bar):
    """Keep the progress bar up to date; every ten steps print a completion or two."""
    bar.set_postfix(
        reward=f"{record['reward_mean']:.2f}",
        accuracy=f"{record['accuracy']:.2f}",
        length=f"{record['completion_length']:.0f}",
    )
    if record["zero_std_groups"] == settings.batch_size:
        say(f"step {record['step']}: rewards are equal within every group, nothing to learn from")
    if record["step"] % 10 == 1:
        say(f"\nstep {record['step']}: {sample['question']} (answer: {sample['answer']})")
        for completion in sample["completions"]:
            say(f"  reward {completion['reward']:.1f}: {completion['text']!r}")


def train_with_grpo(model, tokenizer, train_problems, settings, eval_problems=()):
    """Train the model in place; metrics and checkpoints go to settings.output_dir.

    train_problems, eval_problems as load_problems gives them → the signal that ended the training
    early, or 0. Raises ValueError for settings that cannot work; TrainingStopped if MAX_SKIPPED
    steps in a row were not finite, or a checkpoint can't be read or written; FloatingPointError if
    the model's logits are not finite.
    """
    check_settings(settings)
    check_batch_size(settings, train_problems)
    total, n = settings.num_iterations * settings.num_steps, len(train_problems)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    # (!7) A frozen copy: a reference that shares tensors would be trained too. None if β = 0.
    reference = copy.deepcopy(model).eval().requires_grad_(False) if settings.beta else None
    folder, done = find_checkpoint(settings) if settings.resume else (None, 0)
    if folder:
        load_checkpoint(folder, model, optimizer, reference)
    log = Log(settings.output_dir, done)

    def evaluate_if_due(step):
        due = step in (0, total) or (settings.eval_every and step % settings.eval_every == 0)
        if due and eval_problems:
            result = evaluate_model(
                model, tokenizer, eval_problems, settings.max_completion_length,
                settings.batch_size * settings.num_generations,
            )
            log.write("eval", {"step": step, **result})
            say(f"step {step}: {describe_evaluation(result)}")

    evaluate_if_due(done)
    model.train()
    skipped_in_a_row = 0
    bar = tqdm(total=total, initial=done, desc="training", disable=get_rank() > 0)
    with bar, StopRequest() as stop:
        for step in range(done + 1, total + 1):
            if reference is not None and step > 1 and (step - 1) % settings.num_steps == 0:
                reference.load_state_dict(model.state_dict())
            indices = step_indices(step - 1, settings.batch_size, n, settings.seed)
            problems = [train_problems[i] for i in my_share(indices)]
            record, sample = take_step(
                model, reference, tokenizer, optimizer, problems, step, settings
            )
            log.write("metrics", record)
            log.write("samples", {"step": step, **sample})
            bar.update()
            show_step(record, sample, settings, bar)
            skipped_in_a_row = skipped_in_a_row + 1 if record["skipped_updates"] else 0
            if skipped_in_a_row == MAX_SKIPPED:
                raise TrainingStopped(
                    f"step {step}: the {MAX_SKIPPED} last steps had numbers that are not finite. "
                    f"{settings.output_dir}/checkpoints holds the last good model: go on from it "
                    "in a new folder (--model, --output-dir), with a smaller --learning-rate"
                )
            stopping = int(sum_over_processes(torch.tensor(stop.signal)))
            if step == total or not stopping:  # else after --resume
                evaluate_if_due(step)
            if step == total or step % settings.save_every == 0 or stopping:
                if get_rank() == 0:
                    save_checkpoint(model, tokenizer, optimizer, reference, step, settings)
            if stopping and step < total:
                say(f"stopped after step {step}, all saved; --resume goes on from here")
                return stop.signal or signal.SIGTERM  # 0 here if only another rank got one
    return 0


# ==================================================================================================
# 11. Step rewards: process supervision
#
# An outcome reward blames or praises every token alike. Process supervision (arXiv 2402.03300,
# section 4.1.3; here --supervision process) rewards each step of the reasoning. In the paper that
# took a trained reward model; here a step is a line with an equation, and arithmetic can be
# checked:
#
#     Natalia sold 48/2 = 24 clips in May.      24 = 48/2                     1.0
#     In all she sold 48+24 = 73 clips.         73 ≠ 48 + 24                  0.0
#     <answer>73</answer>                       the last step; right is 72    0.0
#
# Only what is certainly an equation is judged. In "24 cups * 1/12 = 2" the words cut the left side,
# and "1/12 = 2" would be wrong: such a line is left alone, for a wrong verdict teaches the wrong
# thing. What the check cannot see is whether a true equation was of any use.
#
# How: text → tokens → for each "=", the longest run of arithmetic that touches it on either side.

TOKEN = re.compile(
    rf"""
    (?P<number> {NUMBER})
    | (?P<bullet> ^\s*[-*•]\s | \*\*)  # or bold: no operators
    | (?P<over> // | ÷ | \\div\b)
    | (?P<symbol> [-+*/()%=])
    | (?P<space> \s+ | [$£€])
    | (?P<times> [×·] | \\times\b | \\cdot\b | (?<![A-Za-z])[xX](?=\s*[$£€]?\(?\.?[0-9]))
    | (?P<minus> [\u2212–])
    | (?P<approx> ≈ | \\approx\b)
    | (?P<word> [<>!]= | == | [^\W\d]\w* | \\. | .)
    """,
    re.VERBOSE,
)
ANNOTATION = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator: 48/2 = <<48/2=24>>24
OPERATIONS = {
    ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.UAdd: pos, ast.USub: neg,
}
SAME = {"times": "*", "over": "/", "minus": "-", "approx": "="}


def tokenize_arithmetic(text):
    """'48/2 = 24 clips' → [(48, 0), '/', (2, 0), '=', (24, 0), 'word'], numbers with decimals

    Needs: re, fractions.Fraction, NUMBER, TOKEN, SAME, read_number.
    """
    tokens = []
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup, match.group()
        if kind == "number":
            number = read_number(piece)
            tokens.append("word" if number is None else (number, len(piece.partition(".")[2])))
        elif kind != "space":
            tokens.append(piece if kind == "symbol" else SAME.get(kind, "word"))
    return tokens


def evaluate_arithmetic(tokens):
    """The value of [number, '+', '(', …] → Fraction, or None if it is no expression.

    Python's own parser finds the structure, with x for every number and ** x for a percent sign;
    nothing is executed. Needs: ast, OPERATIONS.
    """
    numbers = iter([token[0] for token in tokens if isinstance(token, tuple)])

    def value(node):
        if isinstance(node, ast.Name):
            return next(numbers)
        if isinstance(node, ast.UnaryOp):
            return OPERATIONS[type(node.op)](value(node.operand))
        if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Name):
            return value(node.left) / 100
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))

    words = ["x" if isinstance(t, tuple) else "** x" if t == "%" else t for t in tokens]
    try:
        return value(ast.parse(" ".join(words), mode="eval").body)
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def judge_equation(left, right):
    """Two token lists → True, False, or None where one of them is no expression.

    A number standing alone may be rounded to the decimals that it shows: 100/3 = 33.3 holds. A
    percent sign may mean a hundredth (20% * 50 = 10) or be a unit (5/20*100 = 25%).
    Needs: fractions.Fraction, evaluate_arithmetic.
    """
    alone = [side[0] for side in (left, right) if len(side) == 1 and isinstance(side[0], tuple)]
    rounding = [Fraction(1, 2 * 10**decimals) for _, decimals in alone]
    for drop in ((), ("%",)):
        a, b = (evaluate_arithmetic([t for t in s if t not in drop]) for s in (left, right))
        if a is None or b is None:
            return None
        if abs(a - b) <= max(rounding, default=0):
            return True
    return False


def check_equations(text, annotation=False):
    """A verdict for every equation in a text that can be checked → list[bool]

    a = b = c are two equations. Number = number is one only behind arithmetic (2*3 = 6 = 7) and in
    a calculator annotation: "$1 = 100 cents" is no mistake.
    Needs: re, LATEX_FRACTION, tokenize_arithmetic, judge_equation.
    """
    segments = [[]]
    for token in tokenize_arithmetic(LATEX_FRACTION.sub(r"(\1)/(\2)", text)):
        if token == "=":
            segments.append([])
        else:
            segments[-1].append(token)
    verdicts, chained = [], False
    for before, behind in zip(segments, segments[1:]):
        start = max((i + 1 for i, token in enumerate(before) if token == "word"), default=0)
        stop = next((i for i, token in enumerate(behind) if token == "word"), len(behind))
        left, right = before[start:], behind[:stop]
        if right[-1:] == ["/"] and stop < len(behind):  # = $8/hour
            right.pop()
        # The left side began before the word: "cups * 1/12 = 2", "Week 2 = 35 + 35".
        lone = sum(token != "%" for token in left) == 1
        cut = start > 0 and (lone or left[:1] in (["+"], ["-"], ["*"], ["/"], ["%"]))
        size = max(sum(token != "%" for token in side) for side in (left, right))  # 50% is a number
        arithmetic = annotation or (chained and start == 0) or size > 1
        verdict = None
        if arithmetic and not cut and len(left) + len(right) <= 400:  # long ones are no arithmetic
            verdict = judge_equation(left, right)
        chained = verdict is not None
        if chained:
            verdicts.append(verdict)
    return verdicts


def step_rewards(completion, answer):
    """Where each step of a completion ends and its reward → list[(character offset, reward)]

    A step is a line of the reasoning with an equation that can be checked: 1.0 if all on it hold,
    else 0.0. The last step is the answer, with everything behind the last of these lines, so that
    the end token is judged too: it ends where the completion does, and its reward is the
    correctness reward scaled to 0 … 1. locate_steps turns the offsets into tokens.
    Needs: re, ANNOTATION, check_equations, correctness_reward.
    """
    begin = completion.find("<reasoning>")
    begin = 0 if begin < 0 else begin + len("<reasoning>")
    reasoning = re.split("</reasoning>|<answer>", completion[begin:], maxsplit=1)[0]
    steps = []
    for line in re.finditer(r"[^\n]+", reasoning):
        if line.end() - line.start() > 2000:  # no equation that a reader would follow
            continue
        verdicts = check_equations(ANNOTATION.sub("", line.group()))
        for equation in ANNOTATION.findall(line.group()):
            verdicts += check_equations(equation, annotation=True)
        if verdicts:
            steps.append((begin + line.end(), float(all(verdicts))))
    return [*steps, (len(completion), correctness_reward([completion], [answer])[0] / 2)]


def locate_steps(steps, completion_ids, tokenizer):
    """The same steps by token: (character offset, reward) → list[(end token index, reward)]

    completion_ids: list of the completion's tokens, as sampled. Encoding the text again may split
    it differently, so each end is searched for, by halving: the shortest prefix of the sampled
    tokens that decodes to all of the text up to that offset. The last step ends where they do.
    """

    def decode(length):
        return tokenizer.decode(
            completion_ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    text, last, found, index = decode(None), len(completion_ids) - 1, [], 0
    for end, reward in steps[:-1]:
        index = bisect.bisect_left(
            range(last), True, lo=index, key=lambda i: decode(i + 1)[:end] == text[:end]
        )
        found.append((index, reward))
    return [*found, (last, steps[-1][1])]


# ==================================================================================================
# 12. One process or many, precision, memory
#
# torchrun starts one process for each GPU; each samples and learns from its share of the prompts,
# and the gradients are summed, so that together they do what one process would do with all prompts
# (and the same completions; what is sampled depends on the rank).
#
# Weights are float32, computed with in bfloat16 (autocast). Weights kept in bfloat16 hardly learn:
# near 0.02 bfloat16's values are 1.2e-4 apart, and AdamW's steps of 2e-6 are rounded away.
#
# Gradients are summed by hand, not by DistributedDataParallel, because processes have different
# numbers of micro-batches, or none.


def get_rank():
    """This process's rank, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items):
    """This process's part of a list: consecutive items, in the order of the ranks."""
    rank, world, n = get_rank(), get_world_size(), len(items)
    return items[rank * n // world : (rank + 1) * n // world]


def gather_lists(items):
    """The lists of all processes, joined in the order of the ranks."""
    if get_world_size() == 1:
        return items
    parts = [None] * get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_over_processes(tensor):
    """The sum of a CPU tensor over all processes."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def autocast(device):
    """bfloat16 for matrix products on a GPU, nothing on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()


def load_tokenizer(name):
    """The tokenizer and the longest context of a model → (tokenizer, int or None)

    Raises ValueError for one that cannot be loaded, or has no chat template or end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {name} can't be loaded: {str(error).strip()}") from None
    build_prompt("?", tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, getattr(config, "max_position_embeddings", None)


def load_policy(name, device, gradient_checkpointing=False):
    """The model to train, weights in float32. ValueError if it cannot be loaded or trained here."""
    try:
        # (!8) float32, whatever the checkpoint's own precision is
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"--model {name} can't be loaded: {str(error).strip()}") from None
    # compute_log_probs applies the output layer itself; some models scale or cap what it gives.
    ids = torch.arange(3, device=device).unsqueeze(0)  # [row=1 pos]
    with torch.no_grad():
        expected = selective_log_softmax(model(ids).logits[:, :-1], ids[:, 1:])  # [1 2]
        ours = compute_log_probs(model, ids, torch.ones_like(ids), 2)  # [1 2]
    if not torch.allclose(ours, expected, atol=1e-3):
        raise ValueError(f"--model {name}: its logits are not those of its output layer alone")
    if gradient_checkpointing:  # renamed in the course of transformers 5
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def estimate_memory(config, parameters, settings, row_tokens, vocab_chunk=512):
    """Bytes that training needs on one GPU, by part, and the "peak" → dict

    config: of a Qwen2-like model; parameters: how many; row_tokens: the longest prompt and
    completion together. Counted are tensors that are held; what operators use for a moment, and the
    allocator's gaps, come on top: some gigabytes.
    """
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * h // config.num_attention_heads
    # Kept for the backward pass, a token and layer: the two norms (float32), the inputs of the
    # matrix products, attention with its keys and values for every head, the gated product.
    layer = 36 * h + 2 * kv + 8 * f
    kept = 4 * h * layers + layer if settings.gradient_checkpointing else layer * layers
    rows = settings.batch_size * settings.num_generations  # the evaluation takes as many
    parts = {
        "weights, gradients, AdamW": 16 * parameters,
        "reference model": 4 * parameters if settings.beta else 0,
        "bfloat16 copy": 2 * parameters,
        "activations": settings.micro_batch_size * row_tokens * kept,
        "logits of a chunk": (16 * vocab_chunk + 6 * h) * config.vocab_size,  # and ∇ of the head
        "KV cache": rows * row_tokens * layers * 4 * kv,
    }
    held = sum(list(parts.values())[:3])
    learning = parts["activations"] + parts["logits of a chunk"]
    return parts | {"peak": held + max(learning, parts["KV cache"])}


def peak_memory_bytes(device):
    """The most memory in use so far: on a GPU that of tensors, on a CPU that of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ==================================================================================================
# 13. Checkpoints, signals, logs
#
# What makes it safe to interrupt a run of hours: a checkpoint appears whole or, if the process is
# killed, not at all; a signal waits until the step is done; and a resumed run continues its logs
# where the checkpoint was made. (torchrun kills its processes 30 seconds after it is told to stop.
# With several, send SIGTERM to one of them and not to torchrun: the others stop with it.)


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why. What was saved before is intact."""


def write_atomically(folder, fill):
    """Make `folder` appear complete or not at all: fill(temporary folder), then rename.

    Raises TrainingStopped if it can't be written, a full disk say; what was there before stays
    until the new one is whole.
    """
    temporary = folder.with_name("incomplete.tmp")  # one name: what a killed run left is cleared
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # Said here, because the libraries' own words for a full disk can be obscure.
        free = shutil.disk_usage(folder.parent).free / 1e9
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingStopped(f"can't write {folder}, {free:.1f} GB free there: {error}") from error


def save_checkpoint(model, tokenizer, optimizer, reference, step, settings):
    """All that --resume needs, under checkpoints/; the last two are kept. Rank 0 only.

    There is no random state and no data position to save: both follow from seed and step (a model
    with dropout, which Qwen2.5 has not, would need more). The reference is saved only when it is
    not the model that the run began with.
    """

    def fill(folder):
        model.save_pretrained(folder)  # so that --model takes a checkpoint, too
        tokenizer.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        if reference is not None and step > settings.num_steps:
            save_safetensors(reference, str(folder / "reference.safetensors"))
        state = {"step": step, "processes": get_world_size(), "settings": asdict(settings)}
        (folder / "state.json").write_text(json.dumps(state))

    folder = Path(settings.output_dir) / "checkpoints"
    write_atomically(folder / f"step-{step:06d}", fill)
    for old in sorted(folder.glob("step-??????"))[:-2]:
        shutil.rmtree(old)


def find_checkpoint(settings):
    """The newest checkpoint of the output folder → (path, step), or (None, 0).

    Raises ValueError if it belongs to a run with other settings, naming them.
    """
    folders = sorted((Path(settings.output_dir) / "checkpoints").glob("step-??????"))
    if not folders:
        return None, 0
    try:
        state = json.loads((folders[-1] / "state.json").read_text())
        step, processes, theirs = int(state["step"]), state["processes"], dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folders[-1]} is not a checkpoint of this script ({error})") from None
    if processes != get_world_size():
        raise ValueError(f"{folders[-1]} is of {processes} processes, not {get_world_size()}")
    for name, value in asdict(settings).items():
        # With several iterations, num_steps says when the reference model is renewed.
        free = name in FREE_TO_CHANGE and (name != "num_steps" or settings.num_iterations == 1)
        if not free and theirs.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{folders[-1]} was made with {flag} {theirs.get(name)}, not {value}")
    return folders[-1], step


def load_checkpoint(folder, model, optimizer, reference):
    """Put a checkpoint into model, optimizer and reference. TrainingStopped if it is damaged."""
    try:
        load_safetensors(model, str(folder / "model.safetensors"))
        optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", map_location=model.device, weights_only=True)
        )
        if reference is not None and (folder / "reference.safetensors").exists():
            load_safetensors(reference, str(folder / "reference.safetensors"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a cut-off file makes the libraries raise
        raise TrainingStopped(
            f"{folder} can't be loaded ({error}). If it is damaged, delete it to use the one before"
        ) from error


class StopRequest:
    """SIGINT and SIGTERM become a flag, looked at after each step; a second SIGINT ends at once.

    A second SIGTERM does not: torchrun passes on what a batch system has sent to all processes.
    """

    def __enter__(self):
        self.signal = 0
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        """What Python calls when the signal comes."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def say(text):
    """Print above the progress bar, in one process only."""
    if get_rank() == 0:
        tqdm.write(text)


class Log:
    """Appends JSON lines to the files of the output folder, at rank 0, flushed at once.

    Lines of steps after `done`, left by a run that was killed after its last checkpoint, are
    dropped: these steps are taken again.
    """

    def __init__(self, folder, done):
        self.folder, self.writes = Path(folder), get_rank() == 0
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics", "samples", "eval"):  # whatever else lies here is not ours
                path, temporary = self.folder / f"{name}.jsonl", self.folder / f"{name}.tmp"
                lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
                whole = [line for line in lines if line.endswith("\n")]  # the last may be cut off
                last = done - (name == "eval")  # the evaluation after step `done` is made again
                kept = [line for line in whole if done and json.loads(line)["step"] <= last]
                temporary.write_text("".join(kept), encoding="utf-8")
                temporary.replace(path)

    def write(self, name, record):
        """One line to <name>.jsonl."""
        if self.writes:
            with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def load_json_lines(path):
    """The objects of a .jsonl file of ours."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def load_pyplot():
    """matplotlib.pyplot, for files and in the style of the plots here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.constrained_layout.use": True, "savefig.dpi": 150, "axes.titlesize": 10,
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    })
    return plt


def draw_curves(folder):
    """curves.png from the metrics.jsonl and eval.jsonl of a run; needs matplotlib."""
    plt = load_pyplot()
    steps = [r for r in load_json_lines(Path(folder) / "metrics.jsonl") if "reward_mean" in r]
    path = Path(folder) / "eval.jsonl"
    evaluations = load_json_lines(path) if path.exists() else []
    colours = ("#0072B2", "#D55E00", "#009E73")  # distinct for every colour vision
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, title, records, names in (
        (axes[0], "Reward while training", steps, ("reward_mean", "correctness", "format")),
        (axes[1], "Tokens of a completion, mean", steps, ("completion_length",)),
        (axes[2], "Held-out problems right, share", evaluations, ("strict", "lenient")),
    ):
        x = [record["step"] for record in records]
        for name, colour, style in zip(names, colours, ("-", "--", ":")):
            axis.plot(x, [r[name] for r in records], style, color=colour, label=name)
        if records is evaluations:
            band = ([r[name] for r in records] for name in ("strict_low", "strict_high"))
            axis.fill_between(x, *band, color=colours[0], alpha=0.2, lw=0, label="strict, 95 %")
        axis.set(xlabel="step", title=title, ylim=(0, 1.1 * axis.get_ylim()[1]))
        axis.legend(loc="lower right")
    figure.savefig(Path(folder) / "curves.png")
    plt.close(figure)


# ==================================================================================================
# 14. The rehearsal
#
# The whole job in miniature: a Qwen2 of half a million random weights with a vocabulary of a few
# hundred tokens, and word problems of one and two steps in GSM8K's format. GRPO improves what a
# model sometimes does. A random one never answers, so it is shown demonstrations first (supervised
# fine-tuning, SFT). They teach a bad habit: seven times in ten they stop a two-step problem after
# one step. Greedy, it then always stops there; sampled, it sometimes goes on, and is rewarded.
#
# The held-out problems use numbers that training never shows with that wording: a fifth of all
# combinations, for each template. The test is whether known steps combine for new numbers.

REHEARSAL = dict(
    output_dir="runs/rehearsal", num_steps=40, batch_size=32, num_generations=8, beta=0.0,
    max_completion_length=48, learning_rate=5e-5, micro_batch_size=128, eval_every=10,
    save_every=20, device="cpu",
)
# Operations are applied from left to right: ("…", "+*") is (a + b) · c.
TEMPLATES = (
    ("{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?", "+"),
    ("{n} has {a} bags with {b} {t} in each. How many {t} does {n} have?", "*"),
    ("There were {a} {t} and then {n} took {b} of them. How many {t} are left?", "-"),
    ("{n} has {a} {t}, finds {b} and buys {c}. How many {t} does {n} have in all?", "++"),
    ("{n} fills {a} boxes with {b} {t} each and has {c} left over. How many {t} is that?", "*+"),
    ("{n} has {a} red and {b} blue {t} and gives away {c}. How many {t} does {n} keep?", "+-"),
    ("{a} old and {b} new {t} are in each of {c} boxes. How many {t} are there together?", "+*"),
)
NAMES, THINGS = ("Ann", "Ben", "Eva", "Tom"), ("apples", "books", "coins", "pens")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def solve(numbers, operations):
    """[3, 4, 2], '+*' → the steps ['3 + 4 = 7', '7 * 2 = 14'] and every value on the way"""
    steps, values = [], [numbers[0]]
    for operation, number in zip(operations, numbers[1:]):
        values.append({"+": add, "-": sub, "*": mul}[operation](values[-1], number))
        steps.append(f"{values[-2]} {operation} {number} = {values[-1]}")
    return steps, values


def make_problem(question, steps):
    """A row in GSM8K's format."""
    return {"question": question, "answer": "\n".join(steps) + "\n#### " + steps[-1].split()[-1]}


def make_problems(seed, num_train=4000, held_out=0.2, drills=0.3):
    """Word problems with numbers from 1 to 5 → (training ones, held-out ones)

    Each template's combinations of numbers are split between the two. Three training ones in ten
    are drills, "What is 7 * 2?", for every single step that a problem may need.
    """
    rng = random.Random(f"problems {seed}")

    def word_problem(text, operations, numbers):
        words = {"n": rng.choice(NAMES), "t": rng.choice(THINGS)} | dict(zip("abc", numbers))
        return make_problem(text.format(**words), solve(numbers, operations)[0])

    shown, unseen, facts = [], [], set()
    for text, operations in TEMPLATES:
        combinations = [
            (text, operations, numbers)
            for numbers in itertools.product(range(1, 6), repeat=len(operations) + 1)
            if min(solve(numbers, operations)[1]) >= 0
        ]
        facts |= {step for *_, numbers in combinations for step in solve(numbers, operations)[0]}
        rng.shuffle(combinations)
        cut = round(held_out * len(combinations))
        unseen += combinations[:cut]
        shown.append(combinations[cut:])
    facts = sorted(facts)
    train = []
    for _ in range(num_train):
        if rng.random() < drills:
            fact = rng.choice(facts)
            train.append(make_problem(f"What is {fact.partition(' =')[0]}?", [fact]))
        else:
            # every template equally often
            train.append(word_problem(*rng.choice(rng.choice(shown))))
    return train, [word_problem(*problem) for problem in unseen for _ in range(2)]


def demonstrate(problem, keep_steps=None, tags=True):
    """A problem's worked answer as a completion, of all its steps or the first keep_steps."""
    steps = problem["answer"].partition("\n####")[0].split("\n")[:keep_steps]
    lines = "\n".join(steps)
    reasoning = f"<reasoning>\n{lines}\n</reasoning>\n" if tags else f"{lines}\n"
    return f"{reasoning}<answer>\n{steps[-1].split()[-1]}\n</answer>"


def make_tokenizer(problems):
    """Qwen2's own kind of tokenizer, byte-level BPE, trained on the problems: a token for a word.

    The tags are tokens of their own, and so is the system prompt, which is the same everywhere.
    """
    texts = [text for p in problems for text in (p["question"], demonstrate(p))]
    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>").train_new_from_iterator(
        [*texts, "system\nuser\nassistant\n"], vocab_size=1000,
        new_special_tokens=["<|im_start|>"], show_progress=False,
    )
    tokenizer.add_tokens([*TAGS, SYSTEM_PROMPT])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fine_tune(model, tokenizer, problems, num_steps, seed, batch_size=32, learning_rate=2e-3):
    """Supervised fine-tuning on demonstrations with a bad habit: −mean log π of their tokens.

    Seven in ten two-step demonstrations stop after one step, one in five leaves out two tags. The
    learning rate falls linearly to 0.
    """
    rng = random.Random(f"demonstrations {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    for step in tqdm(range(num_steps), desc="warming up", leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        batch = rng.choices(problems, k=batch_size)
        prompts = [build_prompt(problem["question"], tokenizer) for problem in batch]
        prompt_ids, prompt_mask = encode(tokenizer, prompts)  # [row prompt_pos]
        texts = [
            demonstrate(problem, 1 if rng.random() < 0.7 else None, rng.random() < 0.8)
            + tokenizer.eos_token
            for problem in batch
        ]
        ids, mask = encode(tokenizer, texts, "right")  # [row pos]
        log_probs = compute_log_probs(
            model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), ids.shape[1]
        )  # [row pos]
        loss = -(log_probs * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make_start(folder, seed, num_steps=1500):
    """Problems, tokenizer and warmed-up model, as files in `folder`, unless they are there.

    → (model folder, training file, held-out file)
    """

    def fill(folder):
        train, held_out = make_problems(seed)
        for name, problems in (("train.jsonl", train), ("test.jsonl", held_out)):
            text = "".join(json.dumps(problem) + "\n" for problem in problems)
            (folder / name).write_text(text, encoding="utf-8")
        tokenizer = make_tokenizer(train + held_out)
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ))
        fine_tune(model, tokenizer, train, num_steps, seed)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    if get_rank() == 0 and not folder.exists():
        say(f"making a small model and problems in {folder}")
        write_atomically(folder, fill)
    if get_world_size() > 1:
        dist.barrier()
    return folder / "model", folder / "train.jsonl", folder / "test.jsonl"


# ==================================================================================================
# 15. Command line


def make_parser():
    """One flag for each field of Settings."""
    parser = argparse.ArgumentParser(
        prog="grpo_gsm8k.py",
        description="GRPO fine-tuning of Qwen2.5-1.5B-Instruct on GSM8K.",
        epilog="Several GPUs: torchrun --nproc-per-node=8 grpo_gsm8k.py …",
    )
    line = "grpo_gsm8k.py: {} (--help lists everything)\n"  # one, instead of the whole usage
    parser.error = lambda message: parser.exit(2, line.format(" ".join(message.split())))
    for item in fields(Settings):
        text, default = item.metadata["help"], item.default
        flag, choices = f"--{item.name.replace('_', '-')}", item.metadata.get("choices")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = next(t for t in (*get_args(item.type), item.type) if t is not NoneType)
        if choices:
            text += f": {', '.join(choices)}"
        text += "" if default is None else " (%(default)s)"
        metavar = {int: "N", float: "X", str: "NAME" if choices else "PATH"}[kind]
        parser.add_argument(
            flag, type=kind, choices=choices, default=default, help=text, metavar=metavar
        )
    return parser


def versions():
    """What a result was made with."""
    return {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": get_world_size(),
    }


def choose_device(name):
    """'auto', 'cpu' or 'cuda' → torch.device of this process. ValueError if there is no GPU."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "torch sees no GPU, and without one the full job takes weeks. --rehearsal runs it in "
            "miniature; --device cpu runs it all the same"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_output_dir(settings):
    """Make the output folder. Raises ValueError if it holds another run or can't be written."""
    if get_rank() > 0:  # rank 0 writes, and may be ahead: config.json would be its own
        return
    folder = Path(settings.output_dir)
    if (folder / "config.json").exists() and not settings.resume:
        raise ValueError(
            f"--output-dir {folder} already holds a run: --resume goes on with it, another folder "
            "starts a new one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "write.tmp"
        probe.write_text("can this be written?")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output-dir {folder} can't be written: {error.strerror}") from None
    if settings.resume:
        found, step = find_checkpoint(settings)
        say(f"resuming after step {step}" if found else f"no checkpoint in {folder}: starting anew")


def load_data(settings, train_file, eval_file):
    """→ (training problems, evaluation problems). Raises ValueError as load_problems does."""
    if settings.eval_only and settings.eval_examples == 0:
        raise ValueError("--eval-only with --eval-examples 0 leaves nothing to do")
    separate = eval_file or not train_file  # the evaluation has a data set of its own
    train_problems = [] if settings.eval_only and separate else load_problems(train_file, "train")
    if settings.eval_examples == 0:
        eval_problems = []
    elif separate:
        eval_problems = load_problems(eval_file, "test")
    else:
        # A tenth, and no more than GSM8K's own test set has.
        cut = len(train_problems) - min(max(len(train_problems) // 10, 1), 1319)
        train_problems, eval_problems = train_problems[:cut], train_problems[cut:]
        n = len(eval_problems)
        say(f"no --eval-file: the last {n} rows of {train_file} are held out instead")
    return train_problems, eval_problems[: settings.eval_examples]


def check_lengths(tokenizer, problems, settings, context):
    """→ tokens of the longest prompt and its completion. ValueError if the context has fewer."""
    prompts = [build_prompt(problem["question"], tokenizer) for problem in problems]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    longest = max(range(len(problems)), key=lengths.__getitem__)
    if context is not None and lengths[longest] + settings.max_completion_length > context:
        raise ValueError(
            f"a prompt of {lengths[longest]} tokens ({problems[longest]['question'][:40]!r} …) and "
            f"--max-completion-length {settings.max_completion_length} exceed the model's context "
            f"of {context} tokens"
        )
    return lengths[longest] + settings.max_completion_length


def prepare(settings, device):
    """Check everything that is cheap to check, then load → (model, tokenizer, training rows,
    evaluation rows). Raises ValueError."""
    name, train_file, eval_file = settings.model, settings.train_file, settings.eval_file
    if not settings.eval_only:
        check_output_dir(settings)
    if settings.rehearsal:
        makes_model = name == Settings.model  # no --model was given
        if makes_model and (train_file or eval_file):
            raise ValueError("--rehearsal's model knows its own problems only; add --model")
        if makes_model or not train_file:
            made = make_start(Path(settings.output_dir) / "start", settings.seed)
            name = made[0] if makes_model else name
            if not train_file:
                train_file, eval_file = made[1], eval_file or made[2]
    train_problems, eval_problems = load_data(settings, train_file, eval_file)
    if not settings.eval_only:
        check_batch_size(settings, train_problems)
    tokenizer, context = load_tokenizer(name)
    row_tokens = check_lengths(tokenizer, train_problems + eval_problems, settings, context)
    model = load_policy(name, device, settings.gradient_checkpointing)
    if device.type == "cuda" and not settings.eval_only:
        parameters = sum(p.numel() for p in model.parameters())
        needed = estimate_memory(model.config, parameters, settings, row_tokens)["peak"]
        card = torch.cuda.get_device_properties(device).total_memory
        say(f"estimated memory: {needed / 1e9:.0f} of {card / 1e9:.0f} GB")
        if needed > card:
            say("that is too much: --gradient-checkpointing, --micro-batch-size 1, --beta 0 help")
    return model, tokenizer, train_problems, eval_problems


def run(settings, model, tokenizer, train_problems, eval_problems):
    """Train and save, or only evaluate. → exit status"""
    if settings.eval_only:
        result = evaluate_model(
            model, tokenizer, eval_problems, settings.max_completion_length,
            settings.batch_size * settings.num_generations,
        )
        say(describe_evaluation(result))
        return 0
    out = Path(settings.output_dir)
    size = sum(p.numel() for p in model.parameters())
    say(
        f"{size:,} parameters on {model.device}, {get_world_size()} process(es); "
        f"{len(train_problems)} training and {len(eval_problems)} held-out problems; a step "
        f"samples {settings.batch_size} × {settings.num_generations} completions of at most "
        f"{settings.max_completion_length} tokens"
    )
    if get_rank() == 0:
        config = {"settings": asdict(settings), "parameters": size, **versions()}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stopped = train_with_grpo(model, tokenizer, train_problems, settings, eval_problems)
    if stopped:
        return 128 + stopped
    if get_rank() == 0:
        def fill(folder):  # in float32: what was evaluated is what is saved
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        write_atomically(out / "final", fill)
        if importlib.util.find_spec("matplotlib"):
            draw_curves(out)
        else:
            say("matplotlib is not installed, so no curves.png: pip install matplotlib")
        evaluations = load_json_lines(out / "eval.jsonl") if eval_problems else []
        for which, record in (("before", evaluations[:1]), ("after", evaluations[-1:])):
            for result in record:
                say(f"{which:6} {describe_evaluation(result)}")
        say(f"{out} holds final/ (model and tokenizer), metrics, evaluations, samples, curves")
    return 0


def main(argv=None):
    """Run the command line. → exit status"""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.rehearsal:  # its settings become the defaults, which flags still override
        parser.set_defaults(**REHEARSAL)
        args = parser.parse_args(argv)
    settings = Settings(**vars(args))
    try:
        try:
            check_settings(settings)
            device = choose_device(settings.device)
            if "LOCAL_RANK" in os.environ:  # started by torchrun
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                # gloo for counts and flags, so that nobody waits for a checkpoint inside NCCL
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if settings.rehearsal:
                say(f"{EXAMPLE}\n")
            job = prepare(settings, device)
        except ValueError as error:
            parser.error(str(error))
        status = run(settings, *job)
    # OSError: a line of metrics on a full disk, say
    except (TrainingStopped, FloatingPointError, OSError) as error:
        parser.exit(1, f"grpo_gsm8k.py: {error}\n")
    except KeyboardInterrupt:
        return 130
    # Only here: after an error the other processes may never arrive, and this would wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
