# SPDX-License-Identifier: MIT
"""GRPO fine-tuning of Qwen2.5-1.5B-Instruct on GSM8K, whole and in one file.

The model answers a math word problem several times. Each answer, a completion, gets a
reward: up to 2 for the right answer, a few tenths for the format. Completions that beat the
average of their group become more likely, the others less. Nothing else is taught.

    python grpo_gsm8k.py --rehearsal     in miniature: a CPU, minutes, no download
    python grpo_gsm8k.py                 the full job, one GPU of 80 GB; --help: settings
    torchrun --nproc-per-node=8 grpo_gsm8k.py --batch-size 64    on eight GPUs

    1 data and prompts    5 log-probabilities     9 evaluation       13 rehearsal
    2 rewards             6 loss                 10 training loop    14 command line
    3 sampling            7 worked example       11 step rewards
    4 advantages          8 settings             12 around the loop

grpo_sort.py explains the same algorithm on a small task: read it first if this is new.

    policy π        the model in training; π_old: as it was when it sampled; π_ref: a frozen copy
    group           the G completions of one prompt
    advantage Â     how much better a completion is than its group
    [row pos]       shapes: a row is one completion, pos counts its tokens
    [batch trial]   the same rows by prompt (batch) and place in the group (trial)
    (!1) to (!8)    mark lines that are easy to get wrong
"""

import bisect
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow others

import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

# torchrun starts several processes and sets these (section 12).
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# 1. Data and prompts ====================================================================
# GSM8K (arXiv 2110.14168) has 7,473 word problems to train on and 1,319 to test. A worked
# answer ends with "#### " and a number. Only that number is used.

SYSTEM_PROMPT = """\
Solve the problem step by step. Write the steps between <reasoning> and </reasoning>, then the \
final number alone between <answer> and </answer>, like this:
<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"""
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# For --example-turn: small models write tags after an example, hardly ever if only told.
EXAMPLE_QUESTION = "Ann sold 48 clips in April and half as many in May. How many did she sell?"
EXAMPLE_ANSWER = """\
<reasoning>\nIn May Ann sold 48/2 = 24 clips.\nIn all she sold 48+24 = 72 clips.\n</reasoning>
<answer>\n72\n</answer>"""


def extract_answer_from_dataset(text):
    """The text after '####' in a GSM8K answer, stripped; None if there is none."""
    return text.partition("####")[2].strip() or None


def load_problems(path=None, split="train"):
    """GSM8K from the hub, or a JSONL file like it → list of dicts: question, answer (what
    follows '####'), both str. ValueError names the first row that is wrong."""
    if path is None:
        from datasets import load_dataset

        rows = load_dataset("openai/gsm8k", "main", split=split)
        return [{**row, "answer": extract_answer_from_dataset(row["answer"])} for row in rows]
    problems = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            empty, answer = not row["question"].strip(), extract_answer_from_dataset(row["answer"])
        except (ValueError, TypeError, KeyError, AttributeError):
            text = "not a JSON object with texts under question and answer"
            raise ValueError(f"{path}:{number}: {text}") from None
        if empty or parse_number(answer or "") is None:
            text = (
                f"no question, or no number after '####': {answer!r:.40}; other kinds: see README"
            )
            raise ValueError(f"{path}:{number}: {text}")
        problems.append({"question": row["question"], "answer": answer})
    if not problems:
        raise ValueError(f"{path}: no problems")
    return problems


def build_prompt(question, tokenizer, example_turn=False):
    """Instruction, question and start of the model's turn, by the tokenizer's template: a
    text with all special tokens, to be encoded with add_special_tokens=False"""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use an instruct model")
    turns = [EXAMPLE_QUESTION, EXAMPLE_ANSWER, question] if example_turn else [question]
    turns = [{"role": r, "content": x} for r, x in zip(("user", "assistant", "user"), turns)]
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    try:
        system = {"role": "system", "content": SYSTEM_PROMPT}
        prompt = tokenizer.apply_chat_template([system, *turns], **options)
    except jinja2.TemplateError:  # some templates (Gemma's) refuse a system turn
        prompt = ""
    if SYSTEM_PROMPT.strip() not in prompt:  # others leave it out without a word
        turns[0]["content"] = f"{SYSTEM_PROMPT}\n\n{turns[0]['content']}"
        prompt = tokenizer.apply_chat_template(turns, **options)
    return prompt


# 2. Rewards =============================================================================
# The reward is a program, not a model, because right answers can be checked. Points for
# the format are a foothold while no answer is right yet. The text of the right answer
# earns more than its number, so that the model learns to write the number alone.

FULL_MARKS = 2.0  # of correctness_reward

# A wrong reward is worse than a missed one: this grammar allows a number and no more, -18,
# 1,080.50, 3/4, \frac{3}{4}, bold, in $ $, \( \), \boxed{}, with currency, % or one unit.
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
WRAPPED = re.compile(r"\*\*(.*)\*\*|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\boxed\{(.*)\}")
UNITS = "dollar cent euro pound second minute hour day week month year mile meter kilometer gram"
UNITS = UNITS.replace(" ", "s?|") + "s?|feet|inches|km|cm|kg|percent|people|points|degrees"
ANSWER = re.compile(
    rf"(?i)([-−]?(?:US)?(?:\\?[$£€¥₹] ?)?[-−]?)"  # [1] sign and currency
    rf"(?:({NUMBER})(?: ?/ ?({NUMBER}))?|\\[dt]?frac\{{({NUMBER})\}}\{{({NUMBER})\}})"  # [2] … [5]
    rf"(?: ?\\?%| (?:{UNITS}))?"
)


def parse_number(text):
    """The number that a text is, by the grammar of ANSWER → Fraction, or None"""
    text = text.strip().removesuffix(".")
    while len(text) <= 80 and (wrapped := WRAPPED.fullmatch(text)):
        text = "".join(x or "" for x in wrapped.groups()).strip()
    match = ANSWER.fullmatch(text) if len(text) <= 80 else None
    if not match or len(signs := re.findall("[-−]", match[1])) > 1:
        return None
    number = Fraction((match[2] or match[4]).replace(",", ""))
    divisor = Fraction((match[3] or match[5] or "1").replace(",", ""))
    return (-1) ** len(signs) * number / divisor if divisor else None


def last_number(text):
    """The last number of a text → Fraction, or None; for lenient evaluation"""
    number = rf"(?<![A-Za-z0-9_.])(?:{NUMBER})(?:/(?:{NUMBER}))?"
    numbers = re.findall(rf"(?:(?<![\w)])[-−])?[$£€]?{number}", text)
    return parse_number(numbers[-1]) if numbers else None


def extract_answer_from_model_output(text):
    """The stripped text of the last <answer>; None if not closed, empty or '...'."""
    _, opened, answer = text.rpartition("<answer>")
    answer, closed, _ = answer.partition("</answer>")
    return answer.strip() if opened and closed and answer.strip() not in ("", "...") else None


def correctness_reward(completions, answers):
    """2.0 for the text of the right answer, 1.5 for its number, otherwise 0 → list"""
    scores = []
    for completion, answer in zip(completions, answers):
        given = extract_answer_from_model_output(completion)
        number = parse_number(given or "")
        same_number = number is not None and number == parse_number(answer)
        scores.append(2.0 if given == answer.strip() else 1.5 if same_number else 0.0)
    return scores


def format_reward(completions):
    """0.2 for each of the four tags that is present, wherever it stands → list"""
    return [0.2 * sum(tag in completion for tag in TAGS) for completion in completions]


def combined_reward(completions, answers):
    """correctness_reward + format_reward, 0 … 2.8 → list"""
    both = zip(correctness_reward(completions, answers), format_reward(completions))
    return [correctness + form for correctness, form in both]


def checked_rewards(function, completions, *answers):
    """Its rewards → list[float]; ValueError unless each completion has one, finite"""
    returned = function(completions, *answers)
    try:
        rewards = [float(reward) for reward in returned]
    except (TypeError, ValueError, RuntimeError):
        rewards = []
    if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
        text = f"{function.__name__} must return {len(completions)} finite numbers, not"
        raise ValueError(f"{text} {' '.join(repr(returned).split()):.80}")
    return rewards


# 3. Sampling ============================================================================
# A group of completions for each prompt, drawn token by token from
#     π(a_t | s, a_<t) = softmax(logits / temperature)[a_t]     s: prompt, a_<t: tokens so far
# and from nothing else: the ratios of section 6 assume that. model.generate() would
# follow the checkpoint's habits (Qwen2.5's: top_k 20, top_p 0.8, repetition_penalty 1.1).


def create_completion_mask(completion_ids, eos_token_ids):
    """1 up to and including the first end token: int[row pos], list → int[row pos]
    (!1) By position, not by comparing with the pad token: that may be the end token
    itself, and a model whose end token is outside the mask never learns to stop."""
    ends = torch.tensor(eos_token_ids, device=completion_ids.device)  # [end]
    is_end = torch.isin(completion_ids, ends).int()  # [row pos]
    return (is_end.cumsum(dim=-1) - is_end == 0).int()  # no end token before this one


def get_eos_token_ids(model, tokenizer):
    """Every token that ends a completion → list[int]. Also the one that ends a turn in
    the template: a base Qwen's own is <|endoftext|>, its template's <|im_end|>."""
    own = model.generation_config.eos_token_id  # a number, a list, or None
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "(turn)"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("(turn)")[2]
        after = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends.add(next((x for x in after if x in tokenizer.added_tokens_decoder), None))
    if not ends - {None}:
        raise ValueError("neither tokenizer nor generation_config has an eos_token_id")
    return sorted(ends - {None})


def encode(tokenizer, texts, padding_side="left", device="cpu"):
    """→ ids, mask int[batch pos]. Left-padded, prompts end where completions begin."""
    options = dict(padding=True, padding_side=padding_side, return_tensors="pt")
    encoded = tokenizer(texts, add_special_tokens=False, **options)
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


def decode_tokens(tokenizer, tokens, eos_token_ids):
    """The text before the end token. Nothing is skipped: tags may be special tokens."""
    tokens = tokens[:-1] if tokens and tokens[-1] in eos_token_ids else tokens
    options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer.decode(tokens, **options)


def sample_tokens(logits, temperature=1.0, generator=None):
    """A token a row from softmax(logits / temperature), at 0 the likeliest, and its log
    π: float[row vocab] → int[row], float32[row]. FloatingPointError for NaN or inf."""
    logits = logits.float() / (temperature or 1)  # [row vocab]
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    # torch.multinomial draws a random number for each of 151,936 tokens; one is enough.
    probs = logits.softmax(dim=-1)  # [row vocab]
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    cumulative /= cumulative[:, -1:].clone()  # [row vocab], ends in exactly 1
    uniform = cumulative.new_empty(len(logits), 1).uniform_(generator=generator)  # [row 1]
    tokens = torch.searchsorted(cumulative, uniform, right=True)  # [row 1]
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


# An argument of forward() was renamed in transformers 5.24; 5.40 won't know the old name.
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"


class GraphDecoder(DynamicCache):
    """Decoding in fixed shapes, on a GPU as a CUDA graph. A token of Qwen2.5-1.5B is a
    thousand small kernels: 85 ms on an H100 if Python launches them, 7 as a graph. Its
    memory never moves: there is room for all tokens, and weights change in place. It is
    given to the model as its cache, so that every attention layer calls update()."""

    model, rows, capacity, forward = None, 0, 0, None

    def update(self, keys, values, layer_idx, *_, **__):
        """A layer's keys and values [row head 1 dim] of a token → of all tokens"""
        own = self.keys_values[2 * layer_idx : 2 * layer_idx + 2]  # two [row head capacity dim]
        return [x.index_copy_(2, self.write_at, new) for x, new in zip(own, (keys, values))]

    def start(self, model, cache, mask, position, num_new):
        """Go on from prompts in a cache; mask int[row prompt_pos], position int[row 1]"""
        rows, used = mask.shape
        prompt_cache = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        fits = (model, rows) == (self.model, self.rows) and used + num_new <= self.capacity
        if not self.forward or not fits:
            self.forward = self.keys_values = self.logits = None  # frees their memory
            self.model, self.rows = model, rows
            self.capacity = (used + num_new + 255) // 256 * 256
            self.keys_values = [F.pad(x, (0, 0, 0, self.capacity - used)) for x in prompt_cache]
            self.visible = mask.new_zeros(rows, 1, 1, self.capacity, dtype=torch.bool)
            self.token, self.position = torch.zeros_like(position), position.clone()  # [row 1]
            self.write_at = position.new_zeros(1)  # the column of the next token
            self.forward = self.step
            if mask.is_cuda:
                self.step()  # what libraries set up when first used can't be recorded
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
                self.forward = graph.replay
        for x, new in zip(self.keys_values, prompt_cache):
            x.copy_(F.pad(new, (0, 0, 0, self.capacity - used)))
        self.visible.zero_()[..., :used] = mask[:, None, None]  # [row 1 1 capacity]
        self.position.copy_(position)
        self.write_at.fill_(used)

    def step(self):
        self.visible.index_fill_(-1, self.write_at, True)
        self.position += 1
        inputs = dict(attention_mask=self.visible, position_ids=self.position, use_cache=True)
        self.logits = self.model(self.token, **inputs, **{CACHE: self}).logits[:, -1]
        self.write_at += 1

    def decode(self, token):
        """Sampled tokens, int[row] → next logits, float[row vocab]; eval mode, no_grad"""
        self.token.copy_(token.unsqueeze(-1))
        self.forward()
        return self.logits


@torch.no_grad()
def generate_completions(
    model, tokenizer, prompts, num_generations, max_completion_length,
    temperature=1.0, eos_token_ids=None, generator=None, decoder=None,
):  # fmt: skip
    """Completions of each prompt, a text; greedy if temperature is 0 → prompt_ids,
    prompt_mask int[row prompt_pos], left-padded; completion_ids, completion_mask
    int[row pos], padded after the end token; log π of each token as it was sampled,
    float32[row pos]. Leaves the model in eval mode. decoder: a GraphDecoder to reuse"""
    eos_token_ids = eos_token_ids or get_eos_token_ids(model, tokenizer)
    prompt_ids, mask = encode(tokenizer, prompts, device=model.device)  # [batch prompt_pos]
    # (!2) No dropout. And with checkpointing, up to transformers 5.23, train mode has no
    # cache: every token but the first would be sampled without its prompt.
    model.eval()
    # Each prompt is read once for its whole group. Positions do not count the padding.
    cache = DynamicCache(config=model.config)
    options = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    position = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # [batch prompt_pos]
    logits = model(prompt_ids, attention_mask=mask, position_ids=position, **options).logits
    cache.batch_repeat_interleave(num_generations)
    start = (prompt_ids, mask, position[:, -1:], logits[:, -1])
    start = [x.repeat_interleave(num_generations, dim=0) for x in start]
    prompt_ids, prompt_mask, position, logits = start  # [row …]
    if any(cache.is_sliding) or model.config._attn_implementation != "sdpa":
        decoder = None  # its boolean mask works with sdpa only, without sliding windows
    if decoder is not None:
        decoder.start(model, cache, prompt_mask, position, max_completion_length)
    shape, pad = (len(prompt_ids), max_completion_length), tokenizer.pad_token_id
    completion_ids = torch.full(shape, pad, device=model.device)  # [row pos]
    log_probs = torch.zeros(shape, device=model.device)  # [row pos]
    ends = torch.tensor(eos_token_ids, device=model.device)  # [end]
    active, mask = torch.arange(shape[0], device=model.device), prompt_mask  # [active …]
    ended = torch.zeros_like(active, dtype=torch.bool)  # [active]
    for t in range(max_completion_length):
        token, log_prob = sample_tokens(logits, temperature, generator)  # each [active]
        completion_ids[active, t], log_probs[active, t] = token, log_prob
        ended = ended | torch.isin(token, ends)  # [active]
        if ended.all() or t == max_completion_length - 1:
            break
        if decoder is not None:  # keeps all rows, until the last has ended
            logits = decoder.decode(token)  # [row vocab]
            continue
        if ended.any():  # rows that have ended are dropped, from the cache too
            going = (~ended).nonzero()[:, 0]  # indices into active
            cache.batch_select_indices(going)
            rows = (active, mask, position, token, ended)
            active, mask, position, token, ended = (x[going] for x in rows)
        mask, position = F.pad(mask, (0, 1), value=1), position + 1  # [active …], [active 1]
        inputs = dict(attention_mask=mask, position_ids=position)
        logits = model(token.unsqueeze(-1), **inputs, **options).logits[:, -1]  # [active vocab]
    completion_ids = completion_ids[:, : t + 1]  # [row pos]
    completion_mask = create_completion_mask(completion_ids, eos_token_ids)  # [row pos]
    # A decoder samples on in rows that have ended: pad them.
    completion_ids = completion_ids.masked_fill(completion_mask == 0, pad)  # [row pos]
    log_probs = log_probs[:, : t + 1].masked_fill(completion_mask == 0, 0.0)  # [row pos]
    return prompt_ids, prompt_mask, completion_ids, completion_mask, log_probs


# 4. Advantages ==========================================================================
# How much better was a completion than the others of its group? If all rewards of a group
# are equal its advantages are 0 and it teaches nothing: a silent group. To the standard
# deviation 1e-4 is added, as in the TRL library.

ADVANTAGES = Literal[
    "normalized", "centered", "leave_one_out", "batch_normalized", "max_likelihood"
]


def compute_advantages(rewards, mode="normalized"):
    """rewards float[batch trial], a line for each group → float32[batch trial]
    Raises ValueError for an unknown mode, another shape, groups of one, NaN or inf."""
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be [batch trial ≥ 2] and finite, not {rewards}")
    rewards = rewards.float()
    mean = rewards.mean(dim=-1, keepdim=True)  # [batch 1]
    # (!3) The mean of equal rewards may be off by rounding, and error / (0 + 1e-4) would be
    # an advantage.
    equal = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]
    if mode == "normalized":  # GRPO, arXiv 2402.03300, section 4.1.2
        return centered / (rewards.std(dim=-1, keepdim=True) + 1e-4)
    if mode == "centered":  # Dr. GRPO, arXiv 2503.20783
        return centered
    if mode == "leave_one_out":  # r − mean of the others: RLOO, arXiv 2402.14740
        return centered * rewards.shape[1] / (rewards.shape[1] - 1)
    if mode == "batch_normalized":  # by the std of the whole batch: Lite PPO, 2508.08221
        return centered / (rewards.std() + 1e-4)
    if mode == "max_likelihood":  # (r − mean) / mean, for rewards ≥ 0: MaxRL, 2602.02710
        return torch.where(mean > 0, centered / mean, 0.0)
    raise ValueError(f"mode {mode!r} is unknown: {', '.join(ADVANTAGES.__args__)}")


def compute_process_advantages(step_rewards, completion_mask, num_generations=None):
    """Advantages of tokens from rewards of steps, a list of (end token index, reward) for
    each row: GRPO, arXiv 2402.03300, 4.1.3. Normalised over all steps of a group; a token
    gets the sum of its own and all later steps. (A flaw: more right steps pay, needed or not.)
    mask int[row pos]; num_generations: rows of a group, None: all → float32[row pos]"""
    (rows, width), size = completion_mask.shape, num_generations or len(completion_mask)
    steps = [(row, *step) for row, found in enumerate(step_rewards) for step in found]
    fits = len(step_rewards) == rows and rows % size == 0
    if not fits or not all(end < width and math.isfinite(reward) for _, end, reward in steps):
        raise ValueError(f"not {rows} rows of finite rewards at tokens below {width}")
    advantages = torch.zeros(completion_mask.shape)  # [row pos]
    for _, group in itertools.groupby(steps, key=lambda step: step[0] // size):
        group = list(group)
        rewards = torch.tensor([float(reward) for *_, reward in group])  # [step], of the group
        if rewards.max() > rewards.min():
            normalized = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # [step]
            for (row, end, _), advantage in zip(group, normalized):
                advantages[row, : end + 1] += advantage
    return advantages.to(completion_mask.device) * completion_mask


# 5. Log-probabilities ===================================================================
# The same log π(a_t | s, a_<t), now with gradients and at all positions at once. Logits,
# 151,936 a token, are the largest tensor. So the output layer is applied to a chunk of
# tokens at a time, and again in the backward pass: memory depends on the chunk only.


def selective_log_softmax(logits, ids):
    """log softmax at ids: float[… vocab], int[…] → float[…], at least float32"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [… vocab]
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def score_tokens(model, hidden, tokens, temperature=1.0, chunk=512):
    """log π of int[token] from the hidden states before, float[token dim] → [token]"""
    head = model.get_output_embeddings()

    def score(h, t):
        logits = head(h).float()  # [chunk vocab]
        if temperature != 1:  # saves a pass over the largest tensor
            logits = logits / temperature
        return selective_log_softmax(logits, t)  # [chunk]

    chunks = zip(hidden.split(chunk), tokens.split(chunk))
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in chunks])


def compute_log_probs(model, input_ids, attention_mask, logits_to_keep, temperature=1.0, chunk=512):
    """log π of the last logits_to_keep tokens, int[row pos] → float32[row logits_to_keep]
    model: of transformers, not wrapped, accepted by check_model"""
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [row pos]
    inputs = dict(attention_mask=attention_mask, position_ids=positions, use_cache=False)
    hidden = model.base_model(input_ids=input_ids, **inputs).last_hidden_state  # [row pos dim]
    # (!4) The output at position t predicts token t + 1.
    hidden = hidden[:, -logits_to_keep - 1 : -1].flatten(0, 1)  # [row*logits_to_keep dim]
    tokens = input_ids[:, -logits_to_keep:].flatten()  # [row*logits_to_keep]
    log_probs = score_tokens(model, hidden, tokens, temperature, chunk)
    return log_probs.view(len(input_ids), logits_to_keep)


def compute_group_log_probs(model, prompt_ids, completion_ids, mask, temperature=1.0, chunk=512):
    """The same for completions of one prompt, 0 for padding: int[prompt_pos], int[row
    pos], mask [row pos] → float32[row pos]. The prompt is read once, into a cache that
    keeps its graph: the gradients of all rows meet there."""
    rows, width = completion_ids.shape
    cache, real = DynamicCache(config=model.config), mask == 1
    # Windows and recurrent states can't be repeated with gradients, and checkpointing has
    # no caches: then every row reads the prompt. Padding at the end needs no mask.
    checkpoints = any(getattr(x, "gradient_checkpointing", False) for x in model.modules())
    if checkpoints or any(type(layer) is not DynamicLayer for layer in cache.layers):
        ids = torch.cat([prompt_ids.expand(rows, -1), completion_ids], dim=1)  # [row all_pos]
        log_probs = compute_log_probs(model, ids, torch.ones_like(ids), width, temperature, chunk)
        return log_probs.masked_fill(~real, 0.0)
    options = {CACHE: cache, "use_cache": True}
    hidden = model.base_model(input_ids=prompt_ids[None], **options).last_hidden_state
    hidden = hidden[:, -1:].expand(rows, -1, -1)  # [row 1 dim], before the first token
    if width > 1:
        cache.batch_repeat_interleave(rows)
        later = model.base_model(input_ids=completion_ids[:, :-1], **options).last_hidden_state
        hidden = torch.cat([hidden, later], dim=1)  # [row pos dim]
    scores = score_tokens(model, hidden[real], completion_ids[real], temperature, chunk)  # [token]
    return torch.zeros(real.shape, device=scores.device).masked_scatter(real, scores)


@torch.no_grad()
def check_model(model):
    """ValueError if logits are not head(hidden), as they are taken to be here. Gemma 2
    caps them, Granite scales them: other probabilities are sampled than trained."""
    ids, seen = torch.arange(8, device=model.device)[None], {}  # [1 8], any tokens
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.update(hidden=inputs[0], logits=output)
    )
    logits, hidden = model(ids).logits, model.base_model(ids).last_hidden_state
    hook.remove()
    same = torch.equal(logits.float(), seen["logits"].float())
    if not same or not torch.allclose(hidden, seen["hidden"], rtol=0.05, atol=1e-3):
        text = "its logits are capped or scaled, which this script does not compute"
        raise ValueError(f"{type(model).__name__} can't be trained here: {text}")


# 6. The loss ============================================================================
# With ρ = exp(log π − log π_old), the ratio to the policy that sampled, a token's loss is
#     ℓ = −min(ρ Â, clip(ρ, 1 − ε, 1 + ε_high) Â) + β k3        GRPO, arXiv 2402.03300, eq. 3
#     k3 = exp(log π_ref − log π) − (log π_ref − log π) − 1     eq. 4: KL to the reference
# Once ρ has passed 1 + ε_high with Â > 0, or 1 − ε with Â < 0, the token is not pushed
# any further; the minimum keeps the way back open. In the first update ρ = 1: with type
# grpo the loss is minus the mean advantage, 0, plus β k3. Its gradient, −Â ∇log π, is
# what teaches.
# As a loss, k3 has the gradient of KL(π_ref ‖ π). k3_weighted = ρ k3 (DeepSeek-V3.2,
# 2512.02556) has that of KL(π ‖ π_ref), each token by itself (2506.09477).

LOSS_TYPES = Literal["grpo", "dapo", "dr_grpo", "cispo"]
RATIO_LEVELS = Literal["token", "sequence"]
KL_ESTIMATORS = Literal["k3", "k3_weighted"]


def grpo_loss(
    log_probs, old_log_probs, ref_log_probs, advantages, completion_mask, *,
    epsilon=0.2, epsilon_high=None, beta=0.04, loss_type="grpo",
    importance_sampling_level="token", kl_estimator="k3", max_completion_length=None,
    num_items=None, num_rows=None,
):  # fmt: skip
    """The loss to minimise and what to log of it → (scalar, dict of detached scalars)
    All tensors are [row pos], the mask 0 for padding; advantages may be [row],
    ref_log_probs None if beta is 0. epsilon_high None: epsilon; max_completion_length:
    dr_grpo's constant. For parts of a batch (micro-batches, processes) num_items and
    num_rows are tokens and completions of all of it: then losses and gradients add up.
    Logged are means over tokens: ratio, kl, and the clipped shares clip_fraction_low, _high"""
    level = importance_sampling_level
    for x, known in (loss_type, LOSS_TYPES), (level, RATIO_LEVELS), (kl_estimator, KL_ESTIMATORS):
        if x not in known.__args__ or x == "dr_grpo" and not max_completion_length:
            raise ValueError(f"{x!r}: not of {known.__args__}, or max_completion_length is None")
    if advantages.shape == log_probs.shape[:1]:
        advantages = advantages.unsqueeze(-1).expand_as(log_probs)  # [row pos]
    tensors = (old_log_probs, advantages, completion_mask, *([ref_log_probs] if beta else []))
    if any(x is None or x.shape != log_probs.shape for x in tensors) or log_probs.dim() != 2:
        raise ValueError(f"all tensors must be [row pos], as log_probs: {list(log_probs.shape)}")
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    mask, padding = completion_mask.to(log_probs.dtype), completion_mask == 0  # [row pos]
    row_tokens = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [row 1]
    tokens = mask.sum().clamp(min=1)

    # (!5) Padding is removed before exp(): 0 · inf is not 0.
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(padding, 0)  # [row pos]
    ratio = token_ratio = log_ratio.exp()  # [row pos]
    if level == "sequence":  # the geometric mean: GSPO, arXiv 2507.18071, eq. 7
        ratio = (log_ratio.sum(dim=-1, keepdim=True) / row_tokens).exp()  # [row 1]
    low, high = ratio < 1 - epsilon, ratio > 1 + epsilon_high  # as ratio
    if loss_type == "cispo":  # clips the weight, every token keeps a gradient: 2506.13585
        low, weight = torch.zeros_like(low), ratio.detach().clamp(max=1 + epsilon_high)
        token_loss = -weight * advantages * log_probs.masked_fill(padding, 0)  # [row pos]
    else:
        low, high = low & (advantages < 0), high & (advantages > 0)
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages)  # [row pos]
    to_log = {"ratio": ratio, "clip_fraction_low": low, "clip_fraction_high": high}
    if beta:
        x = (ref_log_probs.detach() - log_probs).masked_fill(padding, 0)  # [row pos]
        kl = x.exp() - x - 1  # [row pos]
        # weighted by the token's own ratio, at both levels: else it is no KL's gradient
        to_log["kl"] = token_ratio * kl if kl_estimator == "k3_weighted" else kl
        token_loss = token_loss + beta * to_log["kl"]

    token_loss = token_loss.masked_fill(padding, 0)  # [row pos]
    if loss_type == "grpo":  # rows count the same: tokens of a long completion less
        loss = (token_loss / row_tokens).sum() / (num_rows or len(mask))
    elif loss_type == "dr_grpo":  # over a constant: Dr. GRPO, arXiv 2503.20783
        loss = token_loss.sum() / ((num_rows or len(mask)) * max_completion_length)
    else:  # every token counts the same: DAPO, arXiv 2503.14476
        loss = token_loss.sum() / (num_items or tokens)
    return loss, {name: (x * mask).sum().detach() / tokens for name, x in to_log.items()}


# 7. A worked example, to follow with a pencil ===========================================
EXAMPLE = """\
Ann sold 48 clips in April and half as many in May. How many did she sell? (72) Four completions:

reasoning         48/2 = 24        48/2 = 24        48/2 = 26        none
                  48+24 = 72       48+24 = 73       48+26 = 74
answer            72               73               74               72, without tags
correctness        2.00             0.00             0.00             0.00
format             0.80             0.80             0.80             0.00
reward             2.80             0.80             0.80             0.00   mean 1.10, std 1.19
normalized         1.42            -0.25            -0.25            -0.92
centered           1.70            -0.30            -0.30            -1.10
leave_one_out      2.27            -0.40            -0.40            -1.47
max_likelihood     1.55            -0.27            -0.27            -1.00
step rewards      1 1 1            1 0 0            0 1 0            0       (section 11)
process           2.8 1.9 0.9      -0.9 -1.9 -0.9   -0.9 0.0 -0.9    -0.9    a token of each step

In the first update every ratio is 1, and the loss (type grpo) is minus the mean advantage: 0. Its
gradient at log π of each of a completion's n tokens is −Â / (4 n): only the first gets likelier."""

# 8. Settings ============================================================================
# Task, rewards and most values are those of A. Burkov's tutorial
# (github.com/aburkov/theLMbook). Changed: ε from 0.1 to 0.2, gradient norm from 0.1 to 1,
# 7 prompts to 8, weight decay from 0.01 to 0, and learning rate from 5e-6 to 2e-6:
# float32 weights (section 12) round no update away.


def setting(default, text):
    """A field of Settings, with the help of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    model: str = setting("Qwen/Qwen2.5-1.5B-Instruct", "hub name or local folder")
    train_file: str | None = setting(None, "JSONL to train on; None: openai/gsm8k")
    eval_file: str | None = setting(None, "JSONL to test on; None: GSM8K's, or held out")
    output_dir: str = setting("runs/gsm8k", "folder for metrics, checkpoints, final model")
    example_turn: bool = setting(False, "show one solved problem as an earlier turn")
    num_iterations: int = setting(1, "rounds of --num-steps, each with a new reference")
    num_steps: int = setting(500, "steps a round; each samples once, then updates --mu times")
    batch_size: int = setting(8, "prompts a step, over all processes")
    num_generations: int = setting(12, "completions of each prompt: the group size G")
    max_completion_length: int = setting(400, "tokens, at most")
    temperature: float = setting(1.0, "divides the logits, in sampling and in log π")
    reward: Literal["combined", "correctness", "format"] = setting("combined", "of an outcome")
    supervision: Literal["outcome", "process"] = setting("outcome", "reward the end, or steps")
    advantage: ADVANTAGES = setting("normalized", "how outcomes of a group are compared")
    loss_type: LOSS_TYPES = setting("grpo", "how tokens are averaged; cispo clips otherwise")
    importance_sampling_level: RATIO_LEVELS = setting("token", "what has a ratio of its own")
    epsilon: float = setting(0.2, "ε: clip range of the ratio")
    epsilon_high: float | None = setting(None, "upper clip range; None: --epsilon")
    beta: float = setting(0.04, "β: weight of the KL penalty; 0 holds no reference model")
    kl_estimator: KL_ESTIMATORS = setting("k3", "of the KL penalty")
    mu: int = setting(1, "µ: updates on the same samples (TRL calls it num_iterations)")
    sampler_cap: float | None = setting(None, "weigh tokens by min(π scored / sampled, cap)")
    learning_rate: float = setting(2e-6, "of AdamW, constant")
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to it")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "bfloat16 if a GPU can")
    micro_batch_size: int = setting(12, "completions of a prompt that are scored together")
    cuda_graph: bool = setting(True, "on a GPU, sample with a CUDA graph")
    gradient_checkpointing: bool = setting(False, "less memory, more computation")
    offload_optimizer: bool = setting(False, "keep AdamW and its weights in host memory")
    eval_examples: int | None = setting(None, "evaluate the first N rows only; 0: none")
    eval_every: int = setting(100, "steps between evaluations; 0: only before and after")
    eval_batch_size: int = setting(128, "completions sampled at a time in an evaluation")
    save_every: int = setting(50, "steps between checkpoints; the last two are kept")
    resume: bool = setting(False, "go on in --output-dir, with its settings")
    eval_only: bool = setting(False, "only evaluate --model, or final/ of --output-dir")
    rehearsal: bool = setting(False, "the whole job in miniature, nothing to download")
    seed: int = setting(0, "same seed, same run (on a GPU: except for rounding)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto needs a GPU")


def check_settings(settings, num_problems=math.inf):
    """Raise ValueError for what would fail late, or silently train on the wrong thing."""
    least = dict(num_generations=2, eval_every=0, seed=0, eval_examples=int(settings.eval_only))
    for name, value in asdict(settings).items():
        flag, bound = f"--{name.replace('_', '-')}", least.get(name, 1)
        if type(value) is int and value < bound:
            raise ValueError(f"{flag} {value} must be at least {bound}")
        if type(value) is float and not (0 < value < math.inf or name == "beta" and value == 0):
            raise ValueError(f"{flag} {value} must be a finite number above 0")
    if settings.reward == "format" and settings.supervision == "process":
        raise ValueError("--supervision process rewards steps: --reward format has no meaning")
    if not WORLD_SIZE <= settings.batch_size <= num_problems:
        bounds = f"from {WORLD_SIZE} (processes) to {num_problems} (training rows)"
        raise ValueError(f"--batch-size {settings.batch_size} must be {bounds}")


# 9. Evaluation ==========================================================================
# Greedy, on problems that were not trained on. Strict: correctness_reward gives points.
# Lenient also takes the last number of a text that has none in the answer tag: a model
# may know the answer and not the format. (Processes share the work: section 12.)


def wilson_interval(successes, n, z=1.959964):
    """95 % confidence interval of a success rate → (low, high). Wilson 1927."""
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2) / shrink
    return max(centre - half, 0.0), min(centre + half, 1.0)


def evaluate_model(
    model, tokenizer, problems, max_completion_length,
    batch_size=128, decoder=None, example_turn=False, save_to=None,
):  # fmt: skip
    """Greedy accuracy on problems of load_problems → dict: examples, strict, its interval
    strict_low, strict_high, lenient, format (share with all tags), finished_fraction,
    mean_length. save_to: a path for all completions, as JSONL"""
    ends, rows = get_eos_token_ids(model, tokenizer), []
    mine = sorted(problems[RANK::WORLD_SIZE], key=lambda problem: len(problem["question"]))
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=RANK > 0):
        prompts = [build_prompt(p["question"], tokenizer, example_turn) for p in batch]
        _, _, completion_ids, completion_mask, _ = generate_completions(
            model, tokenizer, prompts, 1, max_completion_length, temperature=0, decoder=decoder
        )
        for problem, ids, mask in zip(batch, completion_ids, completion_mask):
            tokens, gold = ids[mask == 1].tolist(), parse_number(problem["answer"])
            text = decode_tokens(tokenizer, tokens, ends)
            strict = checked_rewards(correctness_reward, [text], [problem["answer"]])[0] > 0
            number = parse_number(extract_answer_from_model_output(text) or "")
            lenient = strict or (number is None and gold is not None and last_number(text) == gold)
            row = dict(strict=strict, lenient=lenient, format=all(tag in text for tag in TAGS))
            row |= dict(finished_fraction=tokens[-1] in ends, mean_length=len(tokens))
            rows.append({**problem, "completion": text, **row})
    rows, n = gather_lists(rows), len(problems)
    if save_to and RANK == 0:
        write_lines(save_to, rows)
    names = ("strict", "lenient", "format", "finished_fraction", "mean_length")
    result = {"examples": n} | {name: sum(row[name] for row in rows) / n for name in names}
    result["strict_low"], result["strict_high"] = wilson_interval(result["strict"] * n, n)
    return result


# 10. The training loop ==================================================================
# A step: prompts → completions → rewards → advantages, with the policy that is then
# π_old. Then µ times: log-probabilities → loss → gradient over all rows → AdamW. What
# goes to metrics.jsonl is explained where it is computed.


def step_indices(step, batch_size, num_problems, seed):
    """The problems of a step: every epoch is a new permutation, and none is left out."""
    first, order = step * batch_size, []
    for epoch in range(first // num_problems, (first + batch_size - 1) // num_problems + 1):
        order += random.Random(f"{seed}, epoch {epoch}").sample(range(num_problems), num_problems)
    return order[first % num_problems :][:batch_size]


def collect_rollout(model, tokenizer, problems, settings, generator, decoder=None):
    """Sample a group for each problem of this process, reward it, compare it →
    (micro-batches, metrics of all processes, a sample to look at)"""
    G, ends = settings.num_generations, get_eos_token_ids(model, tokenizer)
    prompts = [build_prompt(p["question"], tokenizer, settings.example_turn) for p in problems]
    answers = [p["answer"] for p in problems for _ in range(G)]
    sampled = generate_completions(
        model, tokenizer, prompts, G, settings.max_completion_length,
        settings.temperature, ends, generator, decoder,
    )  # fmt: skip
    _, _, completion_ids, completion_mask, log_probs = sampled
    tokens = [ids[mask == 1].tolist() for ids, mask in zip(completion_ids, completion_mask)]
    texts = [decode_tokens(tokenizer, row, ends) for row in tokens]
    correctness = checked_rewards(correctness_reward, texts, answers)
    form = checked_rewards(format_reward, texts)
    combined = checked_rewards(combined_reward, texts, answers)
    rewards = dict(combined=combined, correctness=correctness, format=form)[settings.reward]
    if settings.supervision == "process":
        steps = [step_rewards(text, answer) for text, answer in zip(texts, answers)]
        steps = [locate_steps(x, row, tokenizer, ends) for x, row in zip(steps, tokens)]
        advantages = compute_process_advantages(steps, completion_mask, G)  # [row pos]
    else:
        # The rewards of all processes: batch_normalized must see the whole step.
        everyone = torch.tensor(gather_lists(rewards)).view(-1, G)  # [batch trial]
        own = my_share(compute_advantages(everyone, settings.advantage))  # [own batch trial]
        advantages = own.reshape(-1, 1).to(model.device) * completion_mask  # [row pos]

    rows = {  # of each completion; logged are the means over those of all processes
        "reward_mean": rewards,  # what is trained on
        "correctness": correctness,
        "format": form,
        "accuracy": [score >= FULL_MARKS for score in correctness],
        "completion_length": [len(row) for row in tokens],  # tokens
        "finished_fraction": [row[-1] in ends for row in tokens],  # not cut off
        "entropy": (-log_probs.sum(dim=-1)).tolist(),  # nats a token; at 0 nothing is tried
        "silent": (advantages == 0).all(dim=-1).tolist(),
    }
    rows = {k: torch.tensor(gather_lists(x)).double().view(-1, G) for k, x in rows.items()}
    silent = rows.pop("silent")  # [batch trial], as all rows
    record = {name: x.mean().item() for name, x in rows.items()}
    record["entropy"] /= record["completion_length"]
    record["reward_std"] = rows["reward_mean"].std(dim=-1).mean().item()  # within a group
    record["zero_std_groups"] = int(silent.all(dim=-1).sum())  # silent groups
    record["num_rows"] = silent.numel()  # completions of the step …
    record["num_items"] = int(rows["completion_length"].sum())  # … and their tokens
    # of the first group the best and the worst, with the advantage of their first token
    graded = sorted(zip(rewards[:G], texts[:G], advantages[:G, 0].tolist()))
    shown = [dict(reward=r, text=x, advantage=a) for r, x, a in (graded[-1], graded[0])]
    sample = {"question": problems[0]["question"], "answer": answers[0], "completions": shown}
    keep_silent = settings.beta > 0  # the KL penalty pulls on all rows
    batches = make_micro_batches(sampled, advantages, G, settings.micro_batch_size, keep_silent)
    return batches, record, sample


def make_micro_batches(sampled, advantages, num_generations, micro_batch_size, keep_silent):
    """What generate_completions returns, and advantages → list of dicts, of one prompt
    each: prompt_ids [prompt_pos]; completion_ids, mask, sampled, advantages [row pos]"""
    prompt_ids, prompt_mask, completion_ids, completion_mask, log_probs = sampled
    columns = {"completion_ids": completion_ids, "mask": completion_mask}
    columns |= {"sampled": log_probs, "advantages": advantages}
    lengths, batches = completion_mask.sum(dim=-1).tolist(), []
    for first in range(0, len(lengths), num_generations):
        group = sorted(range(first, first + num_generations), key=lambda i: -lengths[i])
        for start in range(0, num_generations, micro_batch_size):
            rows = group[start : start + micro_batch_size]  # of like length: little padding
            batch = {name: x[rows, : lengths[rows[0]]] for name, x in columns.items()}
            batch["prompt_ids"] = prompt_ids[first][prompt_mask[first] == 1]
            if keep_silent or (batch["advantages"] != 0).any():  # else no gradient
                batches.append(batch)
    return batches


def update_policy(model, reference, optimizer, batches, settings, num_rows, num_items):
    """µ gradient steps on one rollout → metrics of all processes. num_rows, num_items: of
    the whole step, silent rows too, so that micro-batches and processes change nothing"""
    if settings.gradient_checkpointing:
        switch_on_checkpointing(model)
    weights, norms, totals = optimizer.param_groups[0]["params"], [], Counter()
    # Without any batch there is no update: AdamW's momentum alone would move the weights.
    for update in range(settings.mu if any(gather_lists([bool(batches)])) else 0):
        for batch in batches:
            mask, advantages = batch["mask"], batch["advantages"]  # [row pos]
            inputs = {name: batch[name] for name in ("prompt_ids", "completion_ids", "mask")}
            inputs["temperature"] = settings.temperature
            log_probs = compute_group_log_probs(model, **inputs)  # [row pos]
            if update == 0:
                # (!6) Before the first update these are log π_old; later ones keep them.
                batch["old"], batch["ref"] = log_probs.detach(), None
                if reference is not None:
                    with torch.no_grad():
                        batch["ref"] = compute_group_log_probs(reference, **inputs)  # [row pos]
            gap = batch["old"] - batch["sampled"]  # [row pos]
            if settings.sampler_cap:  # truncated importance sampling: both are π_old
                advantages = advantages * gap.exp().clamp(max=settings.sampler_cap)
            loss, metrics = grpo_loss(
                log_probs, batch["old"], batch["ref"], advantages, mask,
                epsilon=settings.epsilon, epsilon_high=settings.epsilon_high, beta=settings.beta,
                loss_type=settings.loss_type, kl_estimator=settings.kl_estimator,
                importance_sampling_level=settings.importance_sampling_level,
                max_completion_length=settings.max_completion_length,
                num_rows=num_rows, num_items=num_items,
            )  # fmt: skip
            loss.backward()
            tokens = mask.sum().item()
            totals["tokens"] += tokens
            totals["loss"] += loss.item()
            totals["gap"] += (gap.abs() * mask).sum().item()
            totals["kl"] += float(metrics.get("kl", 0)) * tokens
            clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
            totals["clipped"] += clipped.item() * tokens
        for weight in weights if WORLD_SIZE > 1 else ():
            if weight.grad is None:  # this process's groups were all silent
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
        norms.append(torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        optimizer.zero_grad()
    parts = gather_lists([totals])

    def mean(name):
        return sum(part[name] for part in parts) / settings.mu

    learned = {
        "loss": mean("loss"),  # no measure of progress: near 0 if µ = 1 (section 6)
        "kl": mean("kl") / num_items if settings.beta else math.nan,  # nats a token
        "clip_fraction": mean("clipped") / num_items,  # of tokens; 0 if µ = 1
        # mean |log π as sampled − as scored|: 1e-6 in float32, 1e-2 in bfloat16
        "logprob_gap": mean("gap") / (mean("tokens") or 1),
        "grad_norm": sum(norms) / settings.mu,  # before clipping
        "skipped_updates": sum(not math.isfinite(norm) for norm in norms),
    }
    return {name: x if math.isfinite(x) else None for name, x in learned.items()}  # for JSON


def train_with_grpo(model, tokenizer, train_problems, settings, eval_problems=(), decoder=None):
    """Train the model in place → the signal that ended it early, or 0"""
    check_settings(settings, len(train_problems))
    out, total = Path(settings.output_dir), settings.num_iterations * settings.num_steps
    optimizer = make_optimizer(model, settings.learning_rate, settings.offload_optimizer)
    # (!7) A frozen copy: a reference that shares tensors would be trained too.
    reference = copy.deepcopy(model).requires_grad_(False) if settings.beta else None
    start = load_checkpoint(out, model, optimizer, reference) if settings.resume else 0
    optimizer.param_groups[0]["lr"] = settings.learning_rate  # may be another than before
    evaluated, caught, recent = start_logs(out, start, settings), [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(note_signal, caught))

    def evaluate_if_due(step):
        due = step in (0, total) or step % (settings.eval_every or total) == 0
        if eval_problems and due and step not in evaluated:
            evaluate_and_log(model, tokenizer, eval_problems, settings, decoder, step)

    evaluate_if_due(start)
    bar = tqdm(range(start, total), "training", initial=start, total=total, disable=RANK > 0)
    for done in bar:
        if reference is not None and done % settings.num_steps == 0:  # a new round
            reference.load_state_dict(model.state_dict())
        # The random state is a function of seed, step and rank: there is none to save.
        started, step = time.perf_counter(), done + 1
        source = random.Random(f"{settings.seed}, step {step}, rank {RANK}")
        generator = torch.Generator(model.device).manual_seed(source.getrandbits(63))
        chosen = step_indices(done, settings.batch_size, len(train_problems), settings.seed)
        problems = [train_problems[i] for i in my_share(chosen)]
        batches, record, sample = collect_rollout(
            model, tokenizer, problems, settings, generator, decoder
        )
        size = dict(num_rows=record["num_rows"], num_items=record["num_items"])
        record |= update_policy(model, reference, optimizer, batches, settings, **size)
        seconds = time.perf_counter() - started
        record |= {"tokens_per_second": record["num_items"] / seconds, "step_seconds": seconds}
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated() or None  # of rank 0
        record["learning_rate"] = settings.learning_rate
        append_line(out / "metrics.jsonl", {"step": step, **record})
        append_line(out / "samples.jsonl", {"step": step, **sample})
        bar.set_postfix(reward_mean=record["reward_mean"], accuracy=record["accuracy"])
        recent = [*recent[-9:], record]
        comment_on(step, recent, sample)
        if len(recent) > 2 and all(x["skipped_updates"] for x in recent[-3:]):
            text = f"step {step}: three steps in a row had numbers that are not finite"
            raise FloatingPointError(f"{text}; --resume with a smaller --learning-rate")
        stopping = any(gather_lists(caught))
        if not stopping or step == total:
            evaluate_if_due(step)
        if RANK == 0 and (step == total or step % settings.save_every == 0 or stopping):
            save_checkpoint(out, optimizer, reference, step)
        if stopping and step < total:
            say(f"stopped after step {step}, all saved; --resume goes on from here")
            return caught[0] if caught else signal.SIGTERM  # another rank got one
    return 0


def evaluate_and_log(model, tokenizer, problems, settings, decoder, step):
    """Evaluate, print, add to eval.jsonl; completions go to completions-STEP.jsonl."""
    out = Path(settings.output_dir)
    result = evaluate_model(
        model, tokenizer, problems, settings.max_completion_length, settings.eval_batch_size,
        decoder, settings.example_turn, save_to=out / f"completions-{step:06d}.jsonl",
    )  # fmt: skip
    found = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    say(f"{settings.model}, step {step}: {found}")
    append_line(out / "eval.jsonl", {"step": step, "model": settings.model, **result})


def comment_on(step, recent, sample):
    """Show a sample now and then, say what goes wrong. recent: the last ten records"""
    if step % 10 == 1:
        say(f"\nstep {step}: {sample['question']} (answer: {sample['answer']})")
        for x in sample["completions"]:
            lines = [repr(line)[1:-1] for line in x["text"].split("\n")]  # no raw \x1b
            say(f"  reward {x['reward']:.1f}: " + "\n    ".join(lines))
    if (recent[-1]["logprob_gap"] or 0) > 0.1:
        say(f"step {step}: sampler and trainer disagree, see logprob_gap in metrics.jsonl")
    form, accuracy = (sum(x[name] for x in recent) / 10 for name in ("format", "accuracy"))
    if step % 10 == 0 and form > 0.7 and accuracy < 0.1:
        flags = "--example-turn, --advantage centered, --loss-type dapo"
        say(f"step {step}: the format is learned, the answers are not. These may help: {flags}")


# 11. Step rewards: process supervision ==================================================
# An outcome reward treats every token alike. Process supervision (arXiv 2402.03300, 4.1.3)
# rewards each step of the reasoning. The paper trained a model for it. Here a step is a
# line with an equation, because arithmetic can be checked. Judged is only what can be read
# in one way: a op b (op c …) = d with plain numbers, and nothing next to it that could
# belong to it. Not brackets, powers, variables, number words.

TERM = rf"(?!0[0-9])(?:{NUMBER})%?"
EQUATION = re.compile(
    rf"(?<![\w.,:^%)+*/√-])({TERM}(?: ?[-+*/] ?{TERM})+) ?= ?(-?{TERM})(?![\w^%]|[.,:/][0-9])"
)
LABEL = r"^\s*(?:[-*•]|[0-9]+[.)])\s|\b[SDsd](?:tep|ay) [0-9]+ - "
PLAIN = {  # pattern: what it becomes
    rf"(?<![0-9])\*\*|\*\*(?![0-9])|\\[()\[\]$]|[$£€`]|<<.*?>>|{LABEL}": "",
    r"\\times|\\cdot|(?<=[0-9]) ?[xX×·⋅] ?(?=[0-9])|(?<=%) of (?=[0-9])": "*",
    r"\\div|÷": "/",
    r"[−–]": "-",
}
BEFORE = re.compile(r"(?:^|[A-Za-z]{2,}|[A-Za-z]{2,} ?=|[,.:;])\s*\(?$")  # a word, a sign, nothing
CHANGED = re.compile(  # but no word that changes the number: half of 10 + 3 = 8
    r"(?i)\b(?:hal(?:f|ves)|thirds?|quarters?|[a-z]+ths?|percent|twice|double|triple|minus|plus"
    r"|times|by|less|more|than|number|two|three|four|five|six|seven|eight|nine|ten)"
    r"(?: (?:of|the|as|than|many|much|by))* \(?$"
)
AFTER = re.compile(  # the end, a sign, or a word that does not go on with the number
    r"(?i)\s*(?:$|[.,;:?)](?![0-9]| [0-9]{3}\b)|(?!(?:and|or|remainder|r|hundred|thousand|million"
    r"|dozen|half|quarter|third|whole|full|more|times|to|am|pm|cents)\b)"
    r"[a-z]{2,}\b(?! ?[-+*/=^]| and [0-9]))"
)
CONVERSIONS = (3, 7, 12, 16, 24, 30, 36, 52, 60, 100, 365, 1000, 3600)  # 30 + 30 = 1 hour


def judge_equation(left, right):
    """'48/2', '24' → True, False, or None: digits may be cut off, or the unit another"""
    tokens = ["+", *re.findall(rf"[-+*/]|{TERM}", left), "=", right]
    numbers = [Fraction(x.strip("%").replace(",", "")) for x in tokens[1::2]]
    numbers = [x / 100 if "%" in text else x for x, text in zip(numbers, tokens[1::2])]
    shown, total, term = numbers.pop(), Fraction(0), Fraction(0)
    for operator, number in zip(tokens[::2], numbers):
        if operator == "/" and number == 0:
            return None
        if operator in "+-":
            total, term = total + term, number if operator == "+" else -number
        else:
            term = term * number if operator == "*" else term / number
    place = Fraction(1, 10 ** len(right.strip("%").partition(".")[2]))  # of the last digit
    place = place / 100 if "%" in right else place
    off = abs(total + term - shown)
    if "%" in right and "%" not in left:  # 5/20*100 = 25%
        off = min(off, abs((total + term) / 100 - shown))
    rounded = "/" in left or "%" in left + right  # 100/3 = 33.3, but not 33.4
    if off == 0 or rounded and off <= place / 2 and place < 1:
        return True
    cut_off = rounded and off < place and (place == 1 or shown < total + term)
    return None if cut_off or shown and (total + term) / shown in CONVERSIONS else False


def step_rewards(completion, answer):
    """Where each step of a completion ends, and its reward → list[(character, reward)]
    A step is a line of the reasoning with an equation that is judged: 1.0 if all on it
    hold, otherwise 0.0. The last step, the answer, earns half its correctness_reward."""
    steps, inside = [], r"(?s)(?:.*?<reasoning>)?(.*?)(?:</reasoning>|<answer>|$)"
    for line in re.compile(".+").finditer(completion, *re.match(inside, completion).span(1)):
        end, text, verdicts = line.end(), line[0], []
        if len(text) > 2000:
            continue
        for pattern, plain in PLAIN.items():
            text = re.sub(pattern, plain, text)
        for equation in EQUATION.finditer(text):
            left, right = equation.groups()
            before, after = text[: equation.start()][-60:], text[equation.end() :]
            cut = end == len(completion) and not after.strip(" .,")  # its number may go on
            unclear = "%" in left and re.search("[-+]", left) or re.search("/ [0-9.]+/", left)
            clear = BEFORE.search(before) and not CHANGED.search(before) and AFTER.match(after)
            if clear and not cut and not unclear:
                verdicts.append(judge_equation(left, right))
        if set(verdicts) - {None}:
            steps.append((end, float(False not in verdicts)))
    return [*steps, (len(completion), correctness_reward([completion], [answer])[0] / 2)]


def locate_steps(steps, tokens, tokenizer, eos_token_ids):
    """(character offset, reward) → list[(end token index, reward)], for sampled tokens
    Encoding the text again may split it differently. So each end is searched for, by
    halving: the shortest prefix of the tokens that decodes to the text up to there."""
    text, last = decode_tokens(tokenizer, tokens, eos_token_ids), len(tokens) - 1
    found, index = [], 0
    for end, reward in steps[:-1]:

        def reaches(i, end=end):
            return decode_tokens(tokenizer, tokens[: i + 1], eos_token_ids)[:end] == text[:end]

        index = bisect.bisect_left(range(last), True, lo=index, key=reaches)
        found.append((index, reward))
    return [*found, (last, steps[-1][1])]


# 12. Around the loop: processes, precision, logs, checkpoints, signals ==================
# torchrun starts a process for each GPU. Each samples and learns from its share of the
# prompts. Gradients are summed by hand: numbers of micro-batches may differ.


def my_share(items):
    """This process's part of a list: consecutive items, in the order of the ranks."""
    first, end = (rank * len(items) // WORLD_SIZE for rank in (RANK, RANK + 1))
    return items[first:end]


def gather_lists(items):
    """The lists of all processes, joined in the order of the ranks."""
    parts = [items] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def say(text):
    """Print above the progress bar, in one process only."""
    if RANK == 0:
        tqdm.write(text)


def make_optimizer(model, learning_rate, offload=False):
    """AdamW on float32 weights: the model's own, or copies (masters), with offload in
    host memory. bfloat16 alone hardly learns: near 0.02 its values are 1.2e-4 apart, and
    steps of 2e-6 are rounded away. Hooks carry gradients there and weights back."""
    weights = masters = list(model.parameters())
    if offload or any(weight.dtype != torch.float32 for weight in weights):
        options = dict(device="cpu" if offload else None, dtype=torch.float32, copy=True)
        masters = [weight.detach().to(**options).requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0, fused=True)
    if masters is weights:
        return optimizer

    def move_gradient(weight, master):
        gradient = weight.grad.to(master.device, torch.float32)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    def copy_back(*_):
        for weight, master in zip(weights, masters):
            weight.data.copy_(master.data)  # rounded, if the model is bfloat16

    for weight, master in zip(weights, masters):
        weight.register_post_accumulate_grad_hook(partial(move_gradient, master=master))
    optimizer.register_step_post_hook(copy_back)
    return optimizer


def switch_on_checkpointing(model):
    """transformers checkpoints layers in train mode only, which brings dropout and other
    noise. So just the layers are set to it, not what is in them, until model.eval(). (OPT's
    layers hold dropout as a number.)"""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            vars(layer).update({k: 0.0 for k, x in vars(layer).items() if "drop" in k and x})


def note_signal(caught, number, frame):
    """Add the signal to a list; a second SIGINT ends the process at once."""
    caught.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    say("stopping after this step, with a checkpoint; Ctrl-C ends at once, without")


def replace_file(path, write):
    """write(temporary path), then rename: `path` is there whole, or as it was before"""
    temporary = path.with_name("incomplete.tmp")  # one name: killed runs leave one file
    write(temporary)
    temporary.replace(path)


def write_lines(path, rows):
    """Rows as JSON lines"""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_lines(path):
    """Rows of a log; a last line that was cut off is left out"""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def append_line(path, record):
    """One line of JSON, by rank 0 only"""
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def start_logs(out, step, settings):
    """Drop what logs say of later steps → the steps that this model was evaluated at"""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl") if RANK == 0 else ():
        write_lines(out / name, [x for x in read_lines(out / name) if x["step"] <= step])
    rows = read_lines(out / "eval.jsonl") if RANK == 0 and settings.resume else []
    return gather_lists([x["step"] for x in rows if x["model"] == settings.model])


def save_checkpoint(out, optimizer, reference, step):
    """All that --resume needs; random state and data position follow from the step."""
    state = {
        "step": step,
        "masters": [master.detach() for master in optimizer.param_groups[0]["params"]],
        "optimizer": optimizer.state_dict(),
        "reference": None if reference is None else reference.state_dict(),
    }
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    replace_file(folder / f"step-{step:06d}.pt", partial(torch.save, state))
    for old in sorted(folder.glob("step-*"))[:-2]:  # the last two are kept
        old.unlink()


def load_checkpoint(out, model, optimizer=None, reference=None):
    """Put the newest checkpoint into all of these → its step, or 0 if there is none"""
    paths = sorted((out / "checkpoints").glob("step-*"))
    if not paths:
        return 0
    state = torch.load(paths[-1], map_location="cpu", weights_only=True)
    for weight, master in zip(model.parameters(), state["masters"]):
        weight.data.copy_(master)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        for weight, master in zip(optimizer.param_groups[0]["params"], state["masters"]):
            weight.data.copy_(master)
    if reference is not None and state["reference"] is not None:
        reference.load_state_dict(state["reference"])
    return state["step"]


def draw_curves(out, model_name):
    """curves.png from a run's metrics.jsonl and eval.jsonl, if matplotlib is there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return say("matplotlib is not installed, so no curves.png: pip install matplotlib")
    plt.switch_backend("Agg")  # no window
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    panels = {
        "reward of the samples": ("reward_mean", "correctness", "format"),
        "length of the samples, tokens": ("completion_length",),
        "nats a token": ("entropy", "kl"),
        "held-out accuracy, greedy": ("strict", "lenient", "strict_low"),
    }
    evaluations = [x for x in read_lines(out / "eval.jsonl") if x["model"] == model_name]
    rows = read_lines(out / "metrics.jsonl") + evaluations
    for axis, (title, names) in zip(axes, panels.items()):
        for name, style in zip(names, ("-", "--", ":")):
            points = [(x["step"], x[name]) for x in rows if x.get(name) is not None]
            axis.plot(*zip(*points), style, label=name) if points else None
        axis.set(title=title, xlabel="step", ylim=(-0.03 * axis.get_ylim()[1], None))  # shows 0
        axis.locator_params(axis="x", integer=True)
        axis.legend()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


# 13. The rehearsal ======================================================================
# The whole job in miniature: problems of one and two steps, and a Qwen2 of half a million
# random weights. That never answers, so it is first shown demonstrations with a bad habit:
# seven in ten stop a two-step problem half way. Greedy, it then always does; sampled, it
# goes on at times, and GRPO rewards that.
REHEARSAL = dict(
    output_dir="runs/rehearsal", num_steps=40, batch_size=32, num_generations=8, beta=0.0,
    max_completion_length=48, learning_rate=5e-5, eval_every=10, save_every=20, device="cpu",
)  # fmt: skip
TEMPLATES = {  # operations are applied from left to right: "+*" is (a + b) · c
    "Ann has {} apples and gets {} more. How many has she now?": "+",
    "Ben has {} bags with {} books in each. How many books is that?": "*",
    "Eva has {} coins, finds {} and earns {}. How many has she now?": "++",
    "Tom fills {} boxes with {} pens each, and {} are left over. How many has he?": "*+",
    "{} old and {} new cups are in each of {} boxes. How many cups are there?": "+*",
}
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def make_problems(seed):
    """→ (training problems, with all facts of arithmetic as drills; held-out problems)"""
    rng, train, test, facts = random.Random(f"problems {seed}"), [], [], set()
    for question, operations in TEMPLATES.items():
        rows = []
        for numbers in itertools.product(range(1, 6), repeat=len(operations) + 1):
            value, steps = numbers[0], ""
            for operation, number in zip(operations, numbers[1:]):
                left = f"{value} {operation} {number}"
                value = value + number if operation == "+" else value * number
                facts.add((f"What is {left}?", f"{left} = {value}\n#### {value}"))
                steps += f"{left} = {value}\n"
            rows.append((question.format(*numbers), f"{steps}#### {value}"))
        rng.shuffle(rows)
        test += rows[: len(rows) // 5]
        train += rows[len(rows) // 5 :] * (5 if len(operations) == 1 else 1)  # alike often
    train += sorted(facts)
    return [[{"question": q, "answer": a} for q, a in rows] for rows in (train, test)]


def demonstrate(problem, keep_steps=None, tags=True):
    """A problem's worked answer as a completion, with all its steps or the first ones."""
    lines = "\n".join(problem["answer"].split("\n")[:-1][:keep_steps])
    reasoning = f"<reasoning>\n{lines}\n</reasoning>" if tags else lines
    return f"{reasoning}\n<answer>\n{lines.split()[-1]}\n</answer>"


def make_tokenizer(problems):
    """Qwen2's own kind, trained on the problems; tags and system prompt are one token each"""
    texts = [text for p in problems for text in (p["question"], demonstrate(p))]
    options = dict(new_special_tokens=["<|im_start|>"], show_progress=False)
    tokenizer = transformers.Qwen2Tokenizer(eos_token="<|im_end|>").train_new_from_iterator(
        [*texts, "system\nuser\nassistant\n"], vocab_size=1000, **options
    )
    tokenizer.add_tokens([*TAGS, SYSTEM_PROMPT])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fine_tune(model, tokenizer, problems, num_steps, seed, learning_rate=2e-3):
    """Supervised: −mean log π of demonstrations that stop early, or leave out two tags."""
    rng = random.Random(f"demonstrations {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    for step in tqdm(range(num_steps), desc="warming up", leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        prompts, texts = [], []
        for problem in rng.choices(problems, k=32):
            habit = 1 if rng.random() < 0.7 else None, rng.random() < 0.8
            prompts.append(build_prompt(problem["question"], tokenizer))
            texts.append(demonstrate(problem, *habit) + tokenizer.eos_token)
        prompt_ids, prompt_mask = encode(tokenizer, prompts, "left", model.device)
        ids, mask = encode(tokenizer, texts, "right", model.device)  # each [row pos]
        whole, whole_mask = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
        log_probs = compute_log_probs(model, whole, whole_mask, ids.shape[1])  # [row pos]
        (-(log_probs * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make_start(folder, seed, num_steps=1500, device="cpu"):
    """A model folder, train.jsonl and test.jsonl in `folder`, unless they are there."""
    if RANK == 0 and not (folder / "test.jsonl").exists():
        train, test = make_problems(seed)
        tokenizer = make_tokenizer([*train, *test])
        torch.manual_seed(seed)
        config = transformers.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True, max_position_embeddings=256, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config).to(device)
        fine_tune(model, tokenizer, train, num_steps, seed)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_lines(folder / "train.jsonl", train)
        write_lines(folder / "test.jsonl", test)  # last: it says that all is there
    gather_lists([])  # wait for rank 0


# 14. Command line =======================================================================
FIXED = ("model", "train_file", "batch_size", "seed")  # they decide on a step's problems


def parse_settings(parser, argv):
    """The command line as Settings. --rehearsal brings other defaults; so does the
    config.json of --output-dir, with --resume and for evaluating its final/."""
    args = parser.parse_args(argv)
    if args.rehearsal:
        parser.set_defaults(**REHEARSAL)
        args = parser.parse_args(argv)
    config, final = Path(args.output_dir, "config.json"), Path(args.output_dir, "final")
    named = args.resume or any(x.startswith("--model") for x in argv)
    trained = args.eval_only and final.exists() and not named
    if args.resume or trained:
        if not config.exists():
            parser.error(f"{config} is not there: no run to go on with")
        saved = json.loads(config.read_text(encoding="utf-8"))["settings"]
        parser.set_defaults(**saved | {"resume": False, "eval_only": False})
        args = parser.parse_args([*argv, "--output_dir", args.output_dir])
        args.model = str(final) if trained else args.model
        changed = [name for name in FIXED if args.resume and getattr(args, name) != saved[name]]
        if changed:
            parser.error(f"--resume with another {', '.join(changed)} would mix two runs")
    elif config.exists() and not args.eval_only and RANK == 0:
        parser.error(f"{config.parent} already holds a run: --resume it, or choose --output-dir")
    return Settings(**vars(args))


def load_data(settings):
    """→ (training problems, evaluation problems: of training rows if there is no file)"""
    if settings.rehearsal:
        start = Path(settings.output_dir) / "start"
        make_start(start, settings.seed, device=settings.device.replace("auto", "cuda"))
        if settings.model == Settings.model:
            settings.model = str(start / "model")
        settings.train_file = settings.train_file or str(start / "train.jsonl")
        settings.eval_file = settings.eval_file or str(start / "test.jsonl")
    if settings.eval_file or not settings.train_file:
        test = load_problems(settings.eval_file, "test")
        train = [] if settings.eval_only else load_problems(settings.train_file, "train")
    else:  # a tenth, and no more than GSM8K's own test set has
        problems = load_problems(settings.train_file)
        cut = len(problems) - min(max(len(problems) // 10, 1), 1319)
        train, test = problems[:cut], problems[cut:]
        say(f"no --eval-file: the last {len(test)} training rows are held out instead")
    check_settings(settings, math.inf if settings.eval_only else len(train))
    return train, test[: settings.eval_examples]


def load_model(settings):
    """→ (model, tokenizer); ValueError for what cannot be loaded or trained here"""
    device, gpu = torch.device("cpu"), settings.device != "cpu"
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # (!8) The checkpoint's own precision is not followed. (Qwen2.5's is bfloat16.)
    dtype = settings.dtype
    if dtype == "auto":
        capable = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if capable else "float32"
    dtype = getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {settings.model} can't be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = get_eos_token_ids(model, tokenizer)[0]
    check_model(model)
    if settings.gradient_checkpointing:  # renamed in the course of transformers 5
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, tokenizer


def start_run(settings, model):
    """Say what is about to run, write config.json. FileExistsError if it is there."""
    out, parameters = Path(settings.output_dir), model.num_parameters()
    config = {"torch": torch.__version__, "transformers": transformers.__version__}
    config |= {"dtype": str(model.dtype), "processes": WORLD_SIZE, "parameters": parameters}
    say(", ".join(f"{name} {value}" for name, value in config.items()))
    # float32 weights and AdamW's two moments; the reference in the model's precision
    size = 12 * parameters + model.get_memory_footprint() * (settings.beta > 0)
    free = shutil.disk_usage(out).free / 1e9
    say(f"checkpoints: {size / 1e9:.2f} GB each, at most 3 at a time; {free:.0f} GB free in {out}")
    if RANK == 0:  # "x" fails if another run has begun here meanwhile
        with open(out / "config.json", "w" if settings.resume else "x", encoding="utf-8") as file:
            json.dump(config | {"settings": asdict(settings)}, file, indent=2)


def save_final(settings, model, tokenizer):
    """Model and tokenizer in the precision that was evaluated, and the curves"""
    out, step = Path(settings.output_dir), settings.num_iterations * settings.num_steps
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    trained = {"step": step, "system_prompt": SYSTEM_PROMPT, "settings": asdict(settings)}
    (out / "final" / "grpo.json").write_text(json.dumps(trained, indent=2), encoding="utf-8")
    draw_curves(out, settings.model)
    say(f"{out} holds final/ (model and tokenizer), metrics, evaluations, samples, curves")


def main(argv=None):
    """Run the command line. → exit status"""
    for stream in (sys.stdout, sys.stderr):  # a console that knows no π shows a ? for it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    transformers.utils.logging.disable_progress_bar()
    parser = HfArgumentParser(Settings, prog="grpo_gsm8k.py", description=__doc__.split("\n")[0])

    def fail(error, status=2):  # with one line, instead of the whole usage
        parser.exit(status, f"{parser.prog}: {' '.join(str(error).split())}\n")

    parser.error = fail
    settings = parse_settings(parser, sys.argv[1:] if argv is None else argv)
    out, stopped = Path(settings.output_dir), 0
    try:
        try:
            check_settings(settings)
            out.mkdir(parents=True, exist_ok=True)
            if WORLD_SIZE > 1:  # gloo for flags: a slow save must not be an NCCL timeout
                backend = "gloo" if settings.device == "cpu" else "cpu:gloo,cuda:nccl"
                dist.init_process_group(backend)
            if settings.device != "cpu" and not torch.cuda.is_available():
                text = "torch sees no GPU: use --rehearsal, or --device cpu (small models)"
                raise ValueError(text)
            if settings.rehearsal:
                say(f"{EXAMPLE}\n")
            train, test = load_data(settings)
            model, tokenizer = load_model(settings)
            if not settings.eval_only:
                start_run(settings, model)
        except (ValueError, OSError) as error:
            fail(error)
        decoder = GraphDecoder() if settings.cuda_graph and model.device.type == "cuda" else None
        if settings.eval_only:
            notes = Path(settings.model) / "grpo.json"
            step = json.loads(notes.read_text(encoding="utf-8"))["step"] if notes.exists() else 0
            step = load_checkpoint(out, model) if settings.resume else step
            evaluate_and_log(model, tokenizer, test, settings, decoder, step)
        else:
            stopped = train_with_grpo(model, tokenizer, train, settings, test, decoder)
            if RANK == 0 and not stopped:
                save_final(settings, model, tokenizer)
    except (RuntimeError, MemoryError) as error:
        known = re.search("out of|allocate|enough", str(error)) and "memory" in str(error)
        if not known and not isinstance(error, MemoryError):
            raise
        flags = "--micro-batch-size 1, --gradient-checkpointing, --offload-optimizer, --beta 0"
        fail(f"out of memory; these help: {flags}, a smaller --eval-batch-size", status=1)
    # Only here: after an error the others may never arrive, and this would wait for them.
    if dist.is_initialized():
        time.sleep(0.2)  # until torch's threads are done: before 2.8 it may hang
        dist.destroy_process_group()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
