# SPDX-License-Identifier: MIT
"""GRPO fine-tuning of Qwen2.5-1.5B-Instruct on GSM8K, whole and in one file.

The model answers a word problem several times over. Each completion earns points, two for the
right answer and a few tenths for the format. From that alone it learns.

    python grpo_gsm8k.py --rehearsal             all of it in miniature: a CPU, minutes, no download
    python grpo_gsm8k.py                         the full job on one GPU of 80 GB
    torchrun --nproc-per-node=8 grpo_gsm8k.py --batch-size 64    on eight; --help lists all settings

    1 data, prompts      5 log-probabilities     9 evaluation      12 processes, precision,
    2 rewards            6 loss                 10 training loop      checkpoints, signals
    3 sampling           7 worked example       11 step rewards    13 rehearsal
    4 advantages         8 settings                                14 command line

grpo_sort.py explains the same algorithm on a small task; read it first if the words are new. The
policy π is the model in training, π_old the one that sampled, π_ref a frozen copy of the start. A
group is the completions of one prompt, the advantage Â how much better one is than its group.

Shapes are written [row pos]: a row is one completion, pos counts tokens; [batch trial] are the same
rows by prompt. → means "returns". (!1) to (!8) mark lines that are easy to get wrong. A function
that says "Needs:" can be copied with what it names, and what that needs.
"""

import ast
import bisect
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import os
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
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are slow on a busy machine

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser

# 1. The data ======================================================================================
# GSM8K (arXiv 2110.14168): 7,473 word problems of primary school to train on, 1,319 to test. The
# worked answer ends with "#### " and a number, and only that is used. (For answers of another kind
# change SYSTEM_PROMPT, load_problems, correctness_reward; in evaluate_model strict and lenient.)

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
    """The text after '####' in a GSM8K answer, stripped; None if there is none."""
    return text.partition("####")[2].strip() or None


def load_problems(path=None, split="train"):
    """GSM8K from the hub, or a JSONL file in its format → list of {"question": str, "answer": str}.
    The answer is the number after '####', as text. ValueError names the first line that is wrong.
    """
    if path is None:
        from datasets import load_dataset

        path = f"openai/gsm8k {split}"
        lines = [json.dumps(row) for row in load_dataset("openai/gsm8k", "main", split=split)]
    else:
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], extract_answer_from_dataset(row["answer"])
            question.encode()  # half a surrogate pair is no text
            if not question.strip() or parse_number(answer or "") is None:
                raise ValueError("a question is empty, or no single number follows '####'")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            text = "not a JSON object with texts under question and answer"
            raise ValueError(f"{path}:{number}: {text} ({error!r})") from None
        problems.append({"question": question, "answer": answer})
    if not problems:
        raise ValueError(f"{path}: no problems")
    return problems


def build_prompt(question, tokenizer):
    """System turn, user turn, start of the model's turn, with all special tokens of its template.
    Encode it with add_special_tokens=False. Raises ValueError if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use an instruct model, or set one")
    turns = [dict(role="system", content=SYSTEM_PROMPT), dict(role="user", content=question)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


# 2. Rewards =======================================================================================
# The reward is a program, not a model: right answers can be checked. It is the sum of correctness
# (2.0 same text, 1.5 same number, else 0) and format (0.2 for each of 4 tags), a foothold. The same
# text earns more, so that the model learns to write the number alone. (The patterns that follow
# strip what models write around numbers; on a first reading go on at read_number.)

# Digits, commas and points that begin and end as a number does; read_number judges what is inside.
NUMBER = r"(?:(?<![\w.])\.)?[0-9](?:[0-9.,]*[0-9])?"
VARIABLE = r"(?<![A-Za-z'’])[b-fi-kn-rt-zB-HJKM-Z](?![A-Za-z])"  # k, M, x; not a, I, metres, grams
# Words that make another number of the one beside them: 18 thousand, half of 18, more than 18.
NUMBER_WORD = (
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|mil|[mb]l?n|than"
    r"|(?:twen|thir|four?|fif|six|seven|eigh|nine)t(?:y|een)|(?:hundred|thousand|\w+illion|dozen)s?"
    r"|hal(?:f|ves)|(?:third|quarter|f[a-z]+th|tenth)s?|twice|double|triple|squared|cubed|root"
    r"|minus|negative|plus|(?:divided|multiplied)\sby)\b"
)
HEDGE = r"\b(?:not|or|least|most|(?:over|under|above|below)(?=\s-?[0-9]))\b"
SYMBOLS = str.maketrans("×·⋅÷−–－‑", "***/----") | str.maketrans(
    {"²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34", "⅓": r"\frac13"}
)
MARKUP = [  # (pattern, what it becomes), in this order
    (r"(?<=[0-9])(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),  # 1{,}080
    (r"(?<=[0-9])\*\*(?=[0-9])", "^"),  # other ** are bold
    (r"\*\*|(?:\bUS)?[$£€¥₹]|[&`°]|\\(?=[$%])|\^\{?\\circ\}?|^\s*#+\s", ""),
    (r"\\(?:left|right|q?quad)(?![A-Za-z])|\\[()\[\],;:! ]", " "),
    (r"\\\\|[<>!:=]=+|[-=]>|(?<![0-9])[0-9]+:[0-9]+", "?"),  # line breaks, other signs, clocks
    (r"\\(?:times|cdot)(?![A-Za-z])|\btimes(?= [0-9])|(?<![A-Za-z])[xX](?=\s?\(?\.?[0-9])", "*"),
    (r"\\div(?![A-Za-z])|//", "/"),
    (r"\\approx(?![A-Za-z])", "≈"),
    (r"\\[dt]?frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9])(?=\\[dt]?frac|(?:[cmk]m|k?g|m[lL]|ft|lbs?|oz|hrs?|mins?|mph)\b)", " "),
    (r"\\(?:text|math|boxed|mbox)\w*\s?\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:text|math|boxed|mbox)\w*\s?\{([^{}]*)\}", r" \1 "),  # again, for \frac in \boxed
    (r"[ \t]*([=≈ \t])[ \t]*", r"\1"),
    (r"\(([^()=≈]*(?:[=≈][^()=≈]*)+)\)", r":\1:"),  # (48/2 = 24)
    (r"(?<=[a-z]{2}|\Wm)\s?\^\{?[23]\}?", ""),  # cm²
    (r"\^\{([0-9]+)\}", r"^\1"),
    (r"(%|/ ?[0-9]+|\)) ?of(?= [0-9(])", r"\1 *"),  # 20% of 50
]
PLAIN = r"(?:[A-Za-zÀ-ɏ\s.,:;'’“”\"()\[\]%°¢/]|(?<=\w)-(?=[A-Za-z]))"
ANSWER = re.compile(rf"""(?x)
    {PLAIN}*? (?<![\w)/-])(?<!\w\()                # words; 18 of x18 or f(18) is no number
    ([-+]?)(?:\(\()? (?:([0-9]+)\s+(?:\(\()?(?=[0-9]+\)?\s?/))?  # [1] the sign, [2] the 1 of 1 1/2
    ({NUMBER}) (?:\)?\s?/\s?\(?({NUMBER}))?        # [3] the number, [4] its divisor
    (?![^\W\d_]|\() {PLAIN}*""")
KNOWN = rf"[A-Za-z\s]*|(?:(?!{VARIABLE}|\band\b|,(?![0-9]))[^;\n?])*"  # before the last "="


def strip_markup(text):
    r"""'5 \text{ m} \times **2**' → '5 m * 2'. Needs: re, SYMBOLS, MARKUP."""
    text = text.translate(SYMBOLS)
    for pattern, plain in MARKUP:
        text = re.sub(pattern, plain, text)
    return text.replace("{", "(").replace("}", ")")


def read_number(digits):
    """'1,234.50' → Fraction(2469, 2); None for misplaced commas, or over 40 characters."""
    valid = r"([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?"
    if len(digits) > 40 or not re.fullmatch(valid, digits):
        return None
    return Fraction(digits.replace(",", ""))


def parse_number(text):
    r"""The number in a text that holds exactly one → Fraction, exact; None for none or several.
    Reads signs, thousands, decimals, currency, a/b, \frac{a}{b}, 1 1/2, and what stands behind the
    last "="; ignores units and plain words. Unknown symbols and number words make it None, because
    a wrong reward is worse than a missed one. Never raises; linear. Needs: re, fractions.Fraction,
    NUMBER, VARIABLE, NUMBER_WORD, HEDGE, PLAIN, ANSWER, KNOWN, strip_markup, read_number.
    """
    text = re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9/]))", ",", strip_markup(text))
    *heads, tail = re.split("[=≈]", text)
    match = ANSWER.fullmatch(tail)
    changed = re.search(rf"(?i){NUMBER_WORD}|{HEDGE}", text) or re.search(VARIABLE, tail)
    # x = 18, but not x + 2 = 18 or x = 18, y = 5
    if not match or changed or not all(re.fullmatch(KNOWN, head) for head in heads):
        return None
    whole, number, divisor = map(read_number, (match[2] or "0", match[3], match[4] or "1"))
    if whole is None or number is None or not divisor:
        return None
    return (whole + number / divisor) * (-1 if match[1] == "-" else 1)


def extract_answer_from_model_output(text):
    """The stripped text of the last <answer>; None if that is not closed, empty or '...'."""
    answer, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    if "<answer>" not in text or not closed or answer.strip() in ("", "..."):
        return None
    return answer.strip()


def correctness_reward(completions, answers):
    """2.0 for the same text as the right answer, 1.5 for the same number, otherwise 0.
    Lists of texts → list[float]. Needs: extract_answer_from_model_output, parse_number.
    """
    scores = []
    for completion, answer in zip(completions, answers):
        given = extract_answer_from_model_output(completion)
        number = parse_number(given or "")
        same_number = number is not None and number == parse_number(answer)
        scores.append(2.0 if given == answer.strip() else 1.5 if same_number else 0.0)
    return scores


def format_reward(completions):
    """0.2 for each of the four tags that is present, wherever it stands → list[float]"""
    return [0.2 * sum(tag in completion for tag in TAGS) for completion in completions]


def combined_reward(completions, answers):
    """correctness_reward + format_reward, 0 … 2.8 → list[float]"""
    correctness, form = correctness_reward(completions, answers), format_reward(completions)
    return [c + f for c, f in zip(correctness, form)]


# 3. Sampling ======================================================================================
# The rollout: a group of G = num_generations completions for each prompt, drawn token by token from

#     π(a_t | s, a_<t) = softmax(logits / temperature)[a_t]      s: the prompt, a_<t: tokens so far

# and from nothing else: the ratios of section 6 assume exactly that. model.generate() would follow
# the checkpoint's habits (Qwen2.5-1.5B-Instruct: top_k 20, top_p 0.8, repetition_penalty 1.1). Here
# a group shares one reading of its prompt, and rows that have ended are dropped.


def create_completion_mask(completion_ids, eos_token_ids):
    """1 up to and including the first end token: int[row pos], list → int[row pos]. Needs: torch.
    (!1) By position, not by comparing with the pad token: that is often the end token itself, and a
    model whose end token is outside the mask never learns to stop.
    """
    ends = torch.tensor(eos_token_ids, device=completion_ids.device)  # [end]
    is_end = torch.isin(completion_ids, ends).int()  # [row pos]
    ends_before = is_end.cumsum(dim=-1) - is_end  # [row pos]
    return (ends_before == 0).int()


def get_eos_token_ids(model, tokenizer):
    """Every token that ends a completion (Qwen2.5 has two) → list[int]. ValueError if none does"""
    own = model.generation_config.eos_token_id  # a number, a list, or None
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise ValueError("neither tokenizer nor generation_config has an eos_token_id")
    return sorted(ends)


def encode(tokenizer, texts, padding_side="left", device="cpu"):
    """→ ids, mask int[batch pos]. Left-padded, all prompts end where their completions begin."""
    options = dict(padding=True, padding_side=padding_side, return_tensors="pt")
    encoded = tokenizer(texts, add_special_tokens=False, **options)
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


def decode_completions(tokenizer, completion_ids, completion_mask):
    """→ (texts without special tokens, the tokens inside the mask as lists)"""
    tokens = [row[: int(n)].tolist() for row, n in zip(completion_ids, completion_mask.sum(dim=-1))]
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.batch_decode(tokens, **options), tokens


def sample_tokens(logits, temperature=1.0, generator=None):
    """A token for each row from softmax(logits / temperature), at 0 the likeliest, and its log π.
    float[row vocab] → int[row], float32[row]. FloatingPointError if not finite. Needs: torch.
    """
    logits = logits.float() / (temperature or 1)  # [row vocab]
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    # as torch.multinomial, but with a single random number for a row
    probs = logits.softmax(dim=-1)  # [row vocab]
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    cumulative /= cumulative[:, -1:].clone()  # [row vocab], ends in exactly 1
    options = dict(dtype=torch.float64, device=logits.device, generator=generator)
    uniform = torch.rand(len(logits), 1, **options)  # [row 1], below 1
    tokens = torch.searchsorted(cumulative, uniform, right=True)  # [row 1]
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


# transformers renames past_key_values in 5.24 and will no longer know it in 5.40.
arguments = inspect.signature(transformers.Qwen2ForCausalLM.forward).parameters
CACHE = "cache" if "cache" in arguments else "past_key_values"


class GraphDecoder(DynamicCache):
    """Decoding in fixed shapes, on a GPU as a CUDA graph. Needs: torch, F, DynamicCache, CACHE.
    A token of Qwen2.5-1.5B is a thousand small kernels. Launched one by one from Python they took
    85 ms on an H100; recorded as a graph and replayed, 7. A graph always uses the same memory: so
    there is room for all tokens from the start, and weights may only be changed in place.
    """

    model, rows, room, run = None, 0, 0, None

    def update(self, keys, values, layer_idx, *_, **__):
        """Each layer's keys and values [row head 1 dim] of a token → of all, the rest masked."""
        own = self.kept[2 * layer_idx : 2 * layer_idx + 2]  # two [row head room dim]
        return [x.index_copy_(2, self.column, new) for x, new in zip(own, (keys, values))]

    def start(self, model, cache, mask, position, num_new):
        """Go on from prompts in a DynamicCache: mask int[row prompt_pos], position int[row 1]."""
        rows, used = mask.shape
        read = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        if not self.run or (model, rows) != (self.model, self.rows) or used + num_new > self.room:
            self.run = self.kept = self.logits = None  # frees their memory
            self.model, self.rows, self.room = model, rows, (used + num_new + 255) // 256 * 256
            self.kept = [F.pad(x, (0, 0, 0, self.room - used)) for x in read]
            self.visible = mask.new_zeros(rows, 1, 1, self.room, dtype=torch.bool)
            self.token, self.position = torch.zeros_like(position), position.clone()  # [row 1]
            self.column = position.new_zeros(1)  # where the next token's keys and values go
            self.run = self.step
            if mask.is_cuda:
                self.step()  # what libraries set up when first used can't be recorded
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
                self.run = graph.replay
        for x, new in zip(self.kept, read):
            x.copy_(F.pad(new, (0, 0, 0, self.room - used)))
        self.visible.zero_()[..., :used] = mask[:, None, None]  # [row 1 1 room]
        self.position.copy_(position)
        self.column.fill_(used)

    def step(self):
        self.visible.index_fill_(-1, self.column, True)
        self.position += 1
        inputs = dict(attention_mask=self.visible, position_ids=self.position, use_cache=True)
        self.logits = self.model(self.token, **inputs, **{CACHE: self}).logits[:, -1]
        self.column += 1

    def decode(self, token):
        """Sampled tokens, int[row] → next logits, float[row vocab]. In eval mode, under no_grad."""
        self.token.copy_(token.unsqueeze(-1))
        self.run()
        return self.logits


@torch.no_grad()
def generate_completions(
    model,
    tokenizer,
    prompts,
    num_generations,
    max_completion_length,
    temperature=1.0,
    eos_token_ids=None,
    generator=None,
    decoder=None,
):
    """Sample num_generations completions of each prompt; greedy if temperature is 0.
    model: of transformers, not wrapped; prompts: texts, as of build_prompt. → prompt_ids,
    prompt_mask int[row prompt_pos], left-padded, each prompt num_generations times in a row;
    completion_ids, completion_mask int[row pos], padded behind the end token; and float32[row pos],
    the log-probability of each token as sampled. decoder: a GraphDecoder, kept from call to call.
    Needs: functools, torch, torch.nn.functional as F, DynamicCache, CACHE; encode, sample_tokens,
    create_completion_mask, get_eos_token_ids.
    """
    eos_token_ids = eos_token_ids or get_eos_token_ids(model, tokenizer)
    ends = torch.tensor(eos_token_ids, device=model.device)  # [end]
    prompt_ids, prompt_mask = encode(tokenizer, prompts, device=model.device)  # [batch prompt_pos]
    cache = DynamicCache(config=model.config)
    with_cache = {CACHE: cache, "use_cache": True}

    repeat = functools.partial(torch.repeat_interleave, repeats=num_generations, dim=0)  # → [row …]
    # (!2) In train mode, with checkpointing, completions are wrong up to transformers 5.23.
    training = model.training
    model.eval()
    # Read each prompt once for its whole group. Positions do not count the padding.
    positions = (prompt_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [batch prompt_pos]
    inputs = dict(attention_mask=prompt_mask, position_ids=positions, logits_to_keep=1)
    logits = model(prompt_ids, **inputs, **with_cache).logits[:, -1]  # [batch vocab]
    cache.batch_repeat_interleave(num_generations)
    # [row vocab], [row prompt_pos], [row 1]
    logits, mask, position = repeat(logits), repeat(prompt_mask), repeat(positions[:, -1:])
    active = torch.arange(len(mask), device=model.device)  # [active]: rows that have not ended
    shape, pad = (len(mask), max_completion_length), tokenizer.pad_token_id
    completion_ids = torch.full(shape, pad, device=model.device)  # [row pos]
    log_probs = torch.zeros(shape, device=model.device)  # [row pos]
    if any(cache.is_sliding) or model.config._attn_implementation != "sdpa":
        decoder = None  # it knows no windows, and others would add its mask as a number
    if decoder is not None:
        decoder.start(model, cache, mask, position, max_completion_length)
    for t in range(max_completion_length):
        token, log_prob = sample_tokens(logits, temperature, generator)  # each [active]
        completion_ids[active, t], log_probs[active, t] = token, log_prob
        if decoder is not None:  # keeps all rows, until the last has ended
            if torch.isin(completion_ids[:, : t + 1], ends).any(dim=-1).all():
                break
            logits = decoder.decode(token)  # [row vocab]
            continue
        going = (~torch.isin(token, ends)).nonzero()[:, 0]  # indices into active
        if len(going) == 0 or t == max_completion_length - 1:
            break
        if len(going) < len(active):  # rows that have ended are dropped, from the cache too
            cache.batch_select_indices(going)
            active, mask, position, token = (x[going] for x in (active, mask, position, token))
        mask = F.pad(mask, (0, 1), value=1)  # [active prompt_pos+t+1]
        position = position + 1  # [active 1]
        inputs = dict(attention_mask=mask, position_ids=position)
        logits = model(token.unsqueeze(-1), **inputs, **with_cache).logits[:, -1]  # [active vocab]
    model.train(training)
    completion_ids, log_probs = completion_ids[:, : t + 1], log_probs[:, : t + 1]  # [row pos]
    completion_mask = create_completion_mask(completion_ids, eos_token_ids)  # [row pos]
    completion_ids = torch.where(completion_mask == 1, completion_ids, pad)  # a decoder went on
    log_probs = torch.where(completion_mask == 1, log_probs, 0.0)  # [row pos]
    return repeat(prompt_ids), repeat(prompt_mask), completion_ids, completion_mask, log_probs


# 4. Advantages ====================================================================================
# How much better was a completion than the others of its group? A group whose rewards are all equal
# has advantages of 0 and teaches nothing: a silent group. The 1e-4 is TRL's.

MODES = Literal["normalized", "centered", "leave_one_out", "batch_normalized", "max_likelihood"]


def compute_advantages(rewards, mode="normalized"):
    """rewards float[batch trial], a line for each group → float32[batch trial].
    batch_normalized needs the rewards of all processes. Raises ValueError for an unknown mode,
    another shape, or groups of one. Needs: torch, MODES.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [batch num_generations ≥ 2], not {list(rewards.shape)}")
    rewards = rewards.float()
    mean = rewards.mean(dim=-1, keepdim=True)  # [batch 1]
    # (!3) A mean of equal rewards may be off by rounding, and divided by 1e-4 that would count.
    equal = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)  # [batch 1]
    centered = (rewards - mean).masked_fill(equal, 0.0)  # [batch trial]
    if mode == "normalized":  # GRPO, arXiv 2402.03300, section 4.1.2
        return centered / (rewards.std(dim=-1, keepdim=True) + 1e-4)
    if mode == "centered":  # Dr. GRPO, arXiv 2503.20783
        return centered
    if mode == "leave_one_out":  # r − mean of the others: RLOO, arXiv 2402.14740
        return centered * rewards.shape[1] / (rewards.shape[1] - 1)
    if mode == "batch_normalized":  # by the std of the whole batch: Lite PPO, arXiv 2508.08221
        return centered / (rewards.std() + 1e-4)
    if mode == "max_likelihood":  # (r − mean) / mean, for rewards ≥ 0: MaxRL, arXiv 2602.02710
        return torch.where(mean > 0, centered / mean, 0.0)
    raise ValueError(f"mode {mode!r} is unknown: {', '.join(MODES.__args__)}")


def compute_process_advantages(step_rewards, completion_mask, num_generations=None):
    """Advantages of tokens from rewards of steps: GRPO, arXiv 2402.03300, section 4.1.3.
    The rewards of all steps of a group are normalised together; the advantage of a token is the sum
    of those of its own and all later steps. (So a model is also paid for padding its reasoning.)
    step_rewards: a list of (end token index, reward) for each row; completion_mask int[row pos];
    num_generations: rows of a group, None for all → float32[row pos]. Needs: torch.
    """
    (rows, width), size = completion_mask.shape, num_generations or len(completion_mask)
    ends = [end for row in step_rewards for end, _ in row]
    if len(step_rewards) != rows or rows % size or max(ends, default=0) >= width:
        raise ValueError(f"step_rewards do not fit {rows} rows of {width} tokens, groups of {size}")
    advantages = torch.zeros(completion_mask.shape)  # [row pos]
    for first in range(0, rows, size):
        group = range(first, first + size)
        rewards = torch.tensor([float(reward) for row in group for _, reward in step_rewards[row]])
        if len(rewards) < 2 or rewards.max() == rewards.min():  # [step], of the whole group
            continue
        mean, std = rewards.mean().item(), rewards.std().item()
        for row in group:
            for end, reward in step_rewards[row]:
                advantages[row, : end + 1] += (reward - mean) / (std + 1e-4)
    return advantages.to(completion_mask.device) * completion_mask


# 5. Log-probabilities =============================================================================
# The same log π(a_t | s, a_<t), now with gradients and all positions at once. Logits, 151,936 for
# each token, are the largest tensor, 2 GB for a micro-batch. So the output layer is applied to a
# chunk of tokens at a time, and again in the backward pass: memory depends on the chunk only.


def selective_log_softmax(logits, ids):
    """log softmax at ids: float[… vocab], int[…] → float[…], at least float32. Needs: torch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [… vocab]
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def compute_log_probs(model, input_ids, attention_mask, logits_to_keep, temperature=1.0, chunk=512):
    """log π of the last logits_to_keep tokens of int[row pos] → float32[row logits_to_keep].
    model: of transformers, not wrapped (DistributedDataParallel's .module, PEFT's
    .get_base_model()), whose logits are neither scaled nor capped (as in Gemma 2, Cohere, Granite).
    Needs: torch, checkpoint from torch.utils.checkpoint, selective_log_softmax.
    """
    if not 0 < logits_to_keep < input_ids.shape[1]:
        raise ValueError(f"logits_to_keep {logits_to_keep} of {input_ids.shape[1]} tokens")
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [row pos]
    inputs = dict(attention_mask=attention_mask, position_ids=positions, use_cache=False)
    hidden = model.base_model(input_ids=input_ids, **inputs).last_hidden_state  # [row pos dim]
    # (!4) The output at position t predicts token t + 1.
    hidden = hidden[:, -logits_to_keep - 1 : -1].flatten(0, 1)  # [row*kept dim]
    targets = input_ids[:, -logits_to_keep:].flatten()  # [row*kept]
    head = model.get_output_embeddings()

    def score(h, t):
        logits = head(h).float()  # [chunk vocab]
        if temperature != 1:  # saves a pass over the largest tensor
            logits = logits / temperature
        return selective_log_softmax(logits, t)  # [chunk]

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    log_probs = [checkpoint(score, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat(log_probs).view(len(input_ids), logits_to_keep)  # [row kept]


# 6. The loss ======================================================================================
# With ρ = exp(log π − log π_old), the ratio to the policy that sampled, the loss of a token is

#     ℓ = −min(ρ Â, clip(ρ, 1 − ε, 1 + ε_high) Â) + β k3        GRPO, arXiv 2402.03300, eq. 3
#     k3 = exp(log π_ref − log π) − (log π_ref − log π) − 1     eq. 4: KL to the reference model

# Once ρ has passed 1 + ε_high with Â > 0, or 1 − ε with Â < 0, the token is not pushed any further;
# the minimum keeps the way back open. In the first update ρ = 1: with type grpo the loss is minus
# the mean advantage, 0, plus β k3. Its gradient, −Â ∇log π, is what teaches. k3_weighted = ρ k3
# (DeepSeek-V3.2, arXiv 2512.02556) stays unbiased when π has moved, and has the gradient of KL(π ‖
# π_ref), k3 that of KL(π_ref ‖ π). The README says which flags make which method.

LOSS_TYPES = Literal["grpo", "dapo", "dr_grpo", "cispo"]
LEVELS, KL_ESTIMATORS = Literal["token", "sequence"], Literal["k3", "k3_weighted"]


def grpo_loss(
    log_probs,
    old_log_probs,
    ref_log_probs,
    advantages,
    completion_mask,
    *,
    epsilon=0.2,
    epsilon_high=None,
    beta=0.04,
    loss_type="grpo",
    importance_sampling_level="token",
    kl_estimator="k3",
    max_completion_length=None,
    num_items=None,
    num_rows=None,
):
    """The loss to minimise and what to log of it → (scalar, dict of detached scalars)
    log_probs, old_log_probs, ref_log_probs float32[row pos], the last may be None if beta is 0;
    completion_mask [row pos], 0 for padding; advantages float[row] or [row pos]. epsilon_high None:
    epsilon. max_completion_length is dr_grpo's constant. A row without tokens counts as a row.
    If these rows are a part of a batch (a micro-batch, a process), num_items and num_rows are the
    completion tokens and completions of all of it: then losses and gradients of the parts add up.
    Metrics, means over tokens: kl (if beta is not 0), ratio, and the shares clip_fraction_low and
    clip_fraction_high of tokens whose gradient (in cispo: whose weight) was cut. Raises ValueError
    for names and shapes that do not fit. Needs: torch, LOSS_TYPES, LEVELS, KL_ESTIMATORS.
    """
    level = importance_sampling_level
    for name, allowed in (loss_type, LOSS_TYPES), (level, LEVELS), (kl_estimator, KL_ESTIMATORS):
        if name not in allowed.__args__:
            raise ValueError(f"{name!r} is unknown: {', '.join(allowed.__args__)}")
    if advantages.shape == log_probs.shape[:1]:
        advantages = advantages.unsqueeze(-1).expand_as(log_probs)  # [row pos]
    tensors = [log_probs, old_log_probs, completion_mask, advantages] + [ref_log_probs] * bool(beta)
    shapes = [None if x is None else list(x.shape) for x in tensors]
    if log_probs.dim() != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"all tensors must be [row pos], not {shapes}")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("loss_type dr_grpo needs max_completion_length")
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    mask, padding = completion_mask.to(log_probs.dtype), completion_mask == 0  # [row pos]
    row_tokens = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [row 1]
    tokens = mask.sum().clamp(min=1)

    # (!5) Padding is removed before exp(): 0 · inf is not 0.
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(padding, 0)  # [row pos]
    if level == "sequence":  # the geometric mean: GSPO, arXiv 2507.18071, eq. 7
        log_ratio = log_ratio.sum(dim=-1, keepdim=True) / row_tokens  # [row 1]
    ratio = log_ratio.exp()  # [row pos] or [row 1], and so are low, high and weight
    low, high = ratio < 1 - epsilon, ratio > 1 + epsilon_high
    if loss_type == "cispo":  # clips the weight of the push, which keeps its gradient: 2506.13585
        low, weight = torch.zeros_like(low), ratio.detach().clamp(max=1 + epsilon_high)
        token_loss = -weight * advantages * log_probs.masked_fill(padding, 0)  # [row pos]
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        low, high = low & (advantages < 0), high & (advantages > 0)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages)  # [row pos]
    to_log = {"ratio": ratio, "clip_fraction_low": low, "clip_fraction_high": high}
    if beta:
        x = (ref_log_probs.detach() - log_probs).masked_fill(padding, 0)  # [row pos]
        kl = x.exp() - x - 1  # [row pos]
        to_log["kl"] = ratio * kl if kl_estimator == "k3_weighted" else kl
        token_loss = token_loss + beta * to_log["kl"]

    token_loss = token_loss.masked_fill(padding, 0)  # [row pos]
    if loss_type == "grpo":  # rows count the same: a token of a long completion counts less
        loss = (token_loss / row_tokens).sum() / (num_rows or len(mask))
    elif loss_type == "dr_grpo":  # over a constant: Dr. GRPO, arXiv 2503.20783
        loss = token_loss.sum() / ((num_rows or len(mask)) * max_completion_length)
    else:  # every token counts the same: DAPO, arXiv 2503.14476
        loss = token_loss.sum() / (num_items or tokens)
    return loss, {name: (x * mask).sum().detach() / tokens for name, x in to_log.items()}


# 7. A worked example, to follow with a pencil =====================================================

EXAMPLE = """\
Ann sold 48 clips in April and half as many in May. How many in all? (72) Four completions:

reasoning         48/2 = 24        48/2 = 24        48/2 = 26        none
                  48+24 = 72       48+24 = 73       48+26 = 74
answer            72               73               74               72, without tags
correctness        2.00             0.00             0.00             0.00
format             0.80             0.80             0.80             0.00
reward             2.80             0.80             0.80             0.00      mean 1.10, std 1.19
normalized         1.42            -0.25            -0.25            -0.92
centered           1.70            -0.30            -0.30            -1.10
leave_one_out      2.27            -0.40            -0.40            -1.47
max_likelihood     1.55            -0.27            -0.27            -1.00
step rewards      1 1 1            1 0 0            0 1 0            0          (section 11)
process           2.8 1.9 0.9      -0.9 -1.9 -0.9   -0.9 0.0 -0.9    -0.9       a token of each step

In the first update every ratio is 1, and the loss (type grpo) is minus the mean advantage: 0. Its
gradient at log π of each of a completion's n tokens is −Â / (4 n): only the first gets likelier."""

# 8. Settings ======================================================================================
# Task, rewards and most values are those of A. Burkov's tutorial (github.com/aburkov/theLMbook).
# Changed: ε from 0.1 to 0.2, as in PPO; gradient norm from 0.1, which most steps exceed, to 1; 7
# prompts to 8, which 8 GPUs share; learning rate 5e-6 to 2e-6: float32 masters round nothing away.


def setting(default, text):
    """A field of Settings, with the help of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    model: str = setting("Qwen/Qwen2.5-1.5B-Instruct", "hub name or local folder")
    train_file: str | None = setting(None, "JSONL to train on; None: openai/gsm8k from the hub")
    eval_file: str | None = setting(None, "JSONL to test on; None: GSM8K's test split, or held out")
    output_dir: str = setting("runs/gsm8k", "folder for metrics, checkpoints, final model")
    num_iterations: int = setting(1, "rounds of --num-steps, each with a new reference model")
    num_steps: int = setting(500, "steps a round; each samples once, then makes --mu updates")
    batch_size: int = setting(8, "prompts a step, over all processes: more GPUs need more")
    num_generations: int = setting(12, "completions of each prompt: the group size G")
    max_completion_length: int = setting(400, "tokens, at most")
    temperature: float = setting(1.0, "of the samples, and of log π")
    reward: Literal["combined", "correctness", "format"] = setting("combined", "for outcomes")
    supervision: Literal["outcome", "process"] = setting("outcome", "reward the answer, or steps")
    advantage: MODES = setting("normalized", "for outcome supervision")
    loss_type: LOSS_TYPES = setting("grpo", "how tokens are averaged, and cispo")
    importance_sampling_level: LEVELS = setting("token", "of the ratio")
    epsilon: float = setting(0.2, "ε: clip range")
    epsilon_high: float | None = setting(None, "upper clip range; None: --epsilon")
    beta: float = setting(0.04, "β: weight of the KL penalty; 0 holds no reference model")
    kl_estimator: KL_ESTIMATORS = setting("k3", "of the penalty; k3_weighted is TRL's default")
    mu: int = setting(1, "µ: updates on the same samples (TRL: num_iterations)")
    learning_rate: float = setting(2e-6, "of AdamW, constant")
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to it")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "bfloat16 on a GPU")
    micro_batch_size: int = setting(8, "completions in one forward and backward pass")
    cuda_graph: bool = setting(True, "on a GPU, sample with a CUDA graph (--no-cuda-graph)")
    gradient_checkpointing: bool = setting(False, "less memory, about a third more computation")
    offload_optimizer: bool = setting(False, "float32 weights and AdamW's states in host memory")
    eval_examples: int | None = setting(None, "evaluate the first N rows only; 0: none")
    eval_every: int = setting(100, "steps between evaluations; 0: only before and after")
    eval_batch_size: int = setting(128, "completions sampled at a time in an evaluation")
    save_every: int = setting(50, "steps between checkpoints; the last two are kept")
    resume: bool = setting(False, "go on in --output-dir, with its settings; other flags override")
    eval_only: bool = setting(False, "only evaluate --model (final/ of a run, say)")
    rehearsal: bool = setting(False, "the whole job in miniature, on a CPU, nothing to download")
    seed: int = setting(0, "same seed, same run (on a GPU: except for rounding)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto needs a GPU")


def check_settings(settings, num_problems):
    """Raise ValueError for a setting that cannot work, naming its flag."""
    least = dict(beta=0, eval_every=0, seed=0, num_generations=2)  # others 1, floats above 0
    least["eval_examples"] = int(settings.eval_only)
    for name, value in asdict(settings).items():
        lowest = least.get(name, 1 if isinstance(value, int) else 1e-300)
        below = 1 if name == "epsilon" else math.inf
        if type(value) in (int, float) and not lowest <= value < below:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range")
    if settings.reward == "format" and settings.supervision == "process":
        raise ValueError("--supervision process rewards steps, so --reward format has no meaning")
    if not WORLD_SIZE <= settings.batch_size <= num_problems:
        bounds = f"from {WORLD_SIZE}, the processes, to {num_problems}, the training rows"
        raise ValueError(f"--batch-size {settings.batch_size} must be {bounds}")


# 9. Evaluation ====================================================================================
# Greedy, on problems that were not trained on. Strict wants the right number in the answer tag;
# lenient takes the last number of the text where the tag has none, as a model may know the answer
# and not the format. (From here on several processes may share the work: section 12.)


def evaluate_model(model, tokenizer, problems, max_completion_length, batch_size=128, decoder=None):
    """Greedy accuracy on problems as of load_problems → dict: examples, strict and its interval
    strict_low, strict_high, lenient, format (share with all tags), finished_fraction, mean_length.
    """
    ends = get_eos_token_ids(model, tokenizer)
    mine = sorted(problems[RANK::WORLD_SIZE], key=lambda p: len(p["question"]))
    counts = torch.zeros(5, dtype=torch.float64)  # strict, and `names`
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=RANK > 0):
        prompts = [build_prompt(problem["question"], tokenizer) for problem in batch]
        inputs = model, tokenizer, prompts, 1, max_completion_length
        _, _, ids, mask, _ = generate_completions(*inputs, temperature=0, decoder=decoder)
        for problem, text, tokens in zip(batch, *decode_completions(tokenizer, ids, mask)):
            gold = parse_number(problem["answer"])
            number = parse_number(extract_answer_from_model_output(text) or "")
            strict = number == gold
            sign = r"(?:(?<![\w)])[-\u2212])?(?:[$£€]\s?-?)?"
            numbers = re.findall(rf"{sign}{NUMBER}(?:\s?/\s?{NUMBER})?", text) or [""]
            lenient = strict or (number is None and parse_number(numbers[-1]) == gold)
            has_format, finished = all(tag in text for tag in TAGS), tokens[-1] in ends
            counts += torch.tensor([strict, lenient, has_format, finished, len(tokens)])
    n, totals = len(problems), sum(gather_lists([counts])).tolist()
    rate, z = totals[0] / n, 1.959964  # its 95 % confidence interval: Wilson 1927
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low, high = (min(max((centre + x) / (1 + z * z / n), 0.0), 1.0) for x in (-half, half))
    result = {"examples": n, "strict": rate, "strict_low": low, "strict_high": high}
    names = ("lenient", "format", "finished_fraction", "mean_length")
    result |= {name: total / n for name, total in zip(names, totals[1:])}
    say(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    return result


# 10. The training loop ============================================================================
# A step: prompts → completions → rewards → advantages, with the policy that is then π_old; then µ
# times log-probabilities → loss → gradient over all rows → AdamW.


def step_indices(step, batch_size, num_problems, seed):
    """The problems of one step: every epoch is a new permutation, and none is left out."""
    first, order = step * batch_size, []
    for epoch in range(first // num_problems, (first + batch_size - 1) // num_problems + 1):
        order += random.Random(f"{seed}, epoch {epoch}").sample(range(num_problems), num_problems)
    return order[first % num_problems :][:batch_size]


def collect_rollout(model, tokenizer, problems, settings, generator, decoder=None):
    """Sample a group for each problem of this process, reward it, compare it → (tensors by name, a
    dict for metrics.jsonl, of all processes; a sample to look at)"""
    G = settings.num_generations
    prompts = [build_prompt(problem["question"], tokenizer) for problem in problems]
    inputs = model, tokenizer, prompts, G, settings.max_completion_length
    sampled = generate_completions(*inputs, settings.temperature, None, generator, decoder)
    prompt_ids, prompt_mask, completion_ids, completion_mask, log_probs = sampled
    texts, tokens = decode_completions(tokenizer, completion_ids, completion_mask)
    answers = [problem["answer"] for problem in problems for _ in range(G)]
    correctness, form = correctness_reward(texts, answers), format_reward(texts)
    scores = {"correctness": correctness, "format": form}
    rewards = scores.get(settings.reward) or combined_reward(texts, answers)
    if settings.supervision == "process":
        steps = [step_rewards(text, answer) for text, answer in zip(texts, answers)]
        steps = [locate_steps(x, row, tokenizer) for x, row in zip(steps, tokens)]
        advantages = compute_process_advantages(steps, completion_mask, G)  # [row pos]
    else:
        # The rewards of all processes together, so that batch_normalized sees the whole step.
        everyone = torch.tensor(gather_lists(rewards)).view(-1, G)  # [batch trial]
        own = my_share(compute_advantages(everyone, settings.advantage))  # this process's groups
        advantages = own.reshape(-1, 1).to(model.device) * completion_mask  # [row pos]
    ends = get_eos_token_ids(model, tokenizer)
    rows = {"reward_mean": rewards, "correctness": correctness, "format": form}
    rows["accuracy"] = [score > 0 for score in correctness]
    rows["completion_length"] = [len(row) for row in tokens]
    rows["finished_fraction"] = [row[-1] in ends for row in tokens]
    rows["teaches"] = (advantages != 0).any(dim=-1).tolist()
    rows["entropy"] = (-log_probs.sum(dim=-1)).tolist()
    rows = {name: gather_lists(values) for name, values in rows.items()}  # of all processes
    groups = [slice(i, i + G) for i in range(0, len(rows["reward_mean"]), G)]
    spread = [statistics.stdev(rows["reward_mean"][group]) for group in groups]
    silent = [not any(rows["teaches"][group]) for group in groups]
    record = {name: statistics.fmean(values) for name, values in rows.items() if name != "teaches"}
    record["entropy"] /= record["completion_length"]
    record |= {"reward_std": statistics.fmean(spread), "zero_std_groups": sum(silent)}
    # of the first group the best and the worst, with the advantage of their first token
    graded = sorted(zip(rewards[:G], texts[:G], advantages[:G, 0].tolist()))
    shown = [dict(zip(("reward", "text", "advantage"), x)) for x in (graded[-1], graded[0])]
    sample = {"question": problems[0]["question"], "answer": answers[0], "completions": shown}
    # two [row prompt_pos+pos], three [row pos]
    rollout = {"input_ids": torch.cat([prompt_ids, completion_ids], dim=1)}
    rollout["attention_mask"] = torch.cat([prompt_mask, completion_mask], dim=1)
    rollout |= {"completion_mask": completion_mask, "sampled": log_probs, "advantages": advantages}
    return rollout, record, sample


def split_rollout(rollout, micro_batch_size, keep_all):
    """Micro-batches of rows of like length, without columns of padding → list of dicts as rollout.
    The longest come first, so that a lack of memory shows at once. Rows without advantage have no
    gradient and are left out, unless keep_all (for the KL penalty).
    """
    lengths = rollout["attention_mask"].sum(dim=-1)  # [row]
    teaches = (rollout["advantages"] != 0).any(dim=-1) | keep_all  # [row]
    order = [i for i in lengths.argsort(descending=True).tolist() if teaches[i]]
    prompt_length = rollout["input_ids"].shape[1] - rollout["completion_mask"].shape[1]
    batches = []
    for first in range(0, len(order), micro_batch_size):
        rows = torch.tensor(order[first : first + micro_batch_size], device=lengths.device)
        used = rollout["attention_mask"][rows].any(dim=0).nonzero()[:, 0]  # [used], as indices
        begin, end = used[0].item(), used[-1].item() + 1
        batches.append({})
        for name, tensor in rollout.items():
            whole = name in ("input_ids", "attention_mask")  # prompt and completion
            columns = slice(begin, end) if whole else slice(0, end - prompt_length)
            batches[-1][name] = tensor[rows, columns]
    return batches


def update_policy(model, reference, optimizer, rollout, settings):
    """µ gradient steps on one rollout → dict of what to log. Normalisers are those of the whole
    step, so micro-batches and processes change nothing. Rows that split_rollout leaves out count.
    """
    masters = optimizer.param_groups[0]["params"]
    batches = split_rollout(rollout, settings.micro_batch_size, keep_all=settings.beta > 0)
    scored = sum(batch["completion_mask"].sum().item() for batch in batches)
    mask = rollout["completion_mask"]  # [row pos]
    counts = torch.tensor([len(mask), mask.sum(), len(batches), scored])
    num_rows, num_items, num_batches, num_scored = sum(gather_lists([counts])).tolist()
    options = dict(num_rows=num_rows, num_items=num_items)
    for name in inspect.signature(grpo_loss).parameters.keys() & asdict(settings):
        options[name] = getattr(settings, name)
    totals = dict.fromkeys(("loss", "kl", "clip_fraction", "logprob_gap", "grad_norm"), 0.0)
    totals["skipped_updates"] = 0
    # Without any batch there is no update: AdamW's momentum alone would move the weights.
    for update in range(settings.mu if num_batches else 0):
        sums = torch.zeros(4, dtype=torch.float64)  # the first four of totals
        for batch in batches:
            mask = batch["completion_mask"]  # [row pos], of the micro-batch
            inputs = batch["input_ids"], batch["attention_mask"], mask.shape[1]
            log_probs = compute_log_probs(model, *inputs, settings.temperature)  # [row pos]
            if update == 0:
                # (!6) Before the first update these are log π_old. Later ones (µ > 1) keep them.
                batch["old"], batch["ref"] = log_probs.detach(), None
                if settings.beta:
                    with torch.no_grad():  # [row pos]
                        batch["ref"] = compute_log_probs(reference, *inputs, settings.temperature)
            gap = ((batch["sampled"] - batch["old"]).abs() * mask).sum() / num_scored
            constants = batch["old"], batch["ref"], batch["advantages"], mask
            loss, metrics = grpo_loss(log_probs, *constants, **options)
            loss.backward()
            for parameter, master in zip(model.parameters(), masters):
                if parameter is not master and parameter.grad is not None:  # bfloat16, or offloaded
                    gradient = parameter.grad.to(master.device, torch.float32)
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                    parameter.grad = None
            share = mask.sum() / num_items
            clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
            values = loss.detach(), share * metrics.get("kl", 0.0), share * clipped, gap
            sums += torch.tensor([float(value) for value in values])
        for master in masters if WORLD_SIZE > 1 else ():
            if master.grad is None:  # this process's groups were all silent
                master.grad = torch.zeros_like(master)
            dist.all_reduce(master.grad)
        values = sum(gather_lists([sums])).tolist()
        values += [torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm).item()]
        if math.isfinite(values[0]) and math.isfinite(values[-1]):
            optimizer.step()
            for parameter, master in zip(model.parameters(), masters):
                parameter.data.copy_(master.data)  # in place; rounded, if the model is bfloat16
        else:
            totals["skipped_updates"] += 1
        optimizer.zero_grad(set_to_none=True)
        for name, value in zip(totals, values):  # all but skipped_updates
            totals[name] += value / settings.mu
    totals["kl"] = totals["kl"] if settings.beta else math.nan
    # JSON knows neither nan nor inf; skipped_updates says that there was one.
    return {name: x if math.isfinite(x) else None for name, x in totals.items()}


# What metrics.jsonl says, a line a step, and what is normal:

#     loss                 with loss type grpo, outcome supervision and µ = 1 near 0 from the first
#                          step to the last (section 6). It does not measure progress.
#     reward_mean, correctness, format   means of the reward and of its two parts; noisy
#     reward_std           mean over groups of the spread within one: what there is to learn from
#     accuracy             share of completions with the right number in the answer tag
#     kl                   estimate of KL(π ‖ π_ref) of a token; null if β = 0
#     entropy              −mean log π of the sampled tokens, in nats; near 0 nothing new is tried
#     logprob_gap          mean |log π as sampled − log π as scored|, before the first update:
#                          rounding, 1e-6 in float32, more in bfloat16; if large, two policies
#     clip_fraction        share of tokens whose gradient was clipped; 0 if µ = 1
#     grad_norm            before clipping; this, loss and kl are means over the µ updates
#     completion_length    mean, in tokens; if always the maximum, the model never stops
#     finished_fraction    share that ended with an end token; zero_std_groups: silent groups
#     skipped_updates      updates left out because a number was not finite
#     tokens_per_second    completion tokens sampled, over step_seconds, the time of the whole step
#     peak_memory_bytes    of tensors on the GPU of rank 0 since the start; learning_rate: constant

LOGS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


def train_with_grpo(model, tokenizer, train_problems, settings, eval_problems=(), decoder=None):
    """Train the model in place → the signal that ended it early, or 0. Raises TrainingStopped if
    three steps in a row were not finite, or a checkpoint can't be written or read.
    """
    check_settings(settings, len(train_problems))
    out, total = Path(settings.output_dir), settings.num_iterations * settings.num_steps
    masters = make_masters(model, settings.offload_optimizer)
    optimizer = torch.optim.AdamW(masters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    # (!7) A frozen copy: a reference that shares tensors would be trained too. None if β = 0.
    reference = copy.deepcopy(model).eval().requires_grad_(False) if settings.beta else None
    start, log_sizes, skipped_in_a_row = 0, {}, 0
    if settings.resume:
        start, log_sizes = load_checkpoint(out, model, optimizer, reference)
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in LOGS:  # a new run's are empty, a resumed run's as they were at its checkpoint
            with open(out / name, "ab") as file:
                file.truncate(log_sizes.get(name, 0))
    model.train()
    bar = tqdm(total=total, initial=start, desc="training", disable=RANK > 0)
    caught = []  # signals

    def note(number, frame):  # a second SIGINT ends at once
        if number in caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with bar, contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):  # and back to what it was in the end
            stack.callback(signal.signal, number, signal.signal(number, note))
        for done in range(start, total + 1):
            if eval_problems and (done in (0, total) or done % (settings.eval_every or total) == 0):
                limits = settings.max_completion_length, settings.eval_batch_size
                result = evaluate_model(model, tokenizer, eval_problems, *limits, decoder)
                append_line(out / "eval.jsonl", {"step": done, **result})
            if done == total:
                return 0
            if reference is not None and done % settings.num_steps == 0:  # a new round
                reference.load_state_dict(model.state_dict())

            # The random state is a function of seed, step and rank: there is none to save.
            started, step = time.perf_counter(), done + 1
            source = random.Random(f"{settings.seed}, step {step}, rank {RANK}")
            generator = torch.Generator(model.device).manual_seed(source.getrandbits(63))
            chosen = step_indices(done, settings.batch_size, len(train_problems), settings.seed)
            problems = [train_problems[i] for i in my_share(chosen)]
            inputs = model, tokenizer, problems, settings, generator, decoder
            rollout, seen, sample = collect_rollout(*inputs)
            learned = update_policy(model, reference, optimizer, rollout, settings)
            seconds = time.perf_counter() - started
            record = {"step": step, **learned, **seen, "learning_rate": settings.learning_rate}
            tokens = seen["completion_length"] * settings.batch_size * settings.num_generations
            record |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated() or None
            append_line(out / "metrics.jsonl", record)
            append_line(out / "samples.jsonl", {"step": step, **sample})
            bar.update()
            bar.set_postfix({k: record[k] for k in ("reward_mean", "accuracy")})
            if step % 10 == 1:
                say(f"\nstep {step}: {sample['question']} (answer: {sample['answer']})")
                for completion in sample["completions"]:
                    say(f"  reward {completion['reward']:.1f}: {completion['text']!r}")
            if record["zero_std_groups"] == settings.batch_size:
                say(f"step {step}: rewards are equal within every group")
            skipped_in_a_row = skipped_in_a_row + 1 if record["skipped_updates"] else 0
            if skipped_in_a_row == 3:
                text = f"step {step}: three steps in a row had numbers that are not finite"
                raise TrainingStopped(f"{text}; --resume with a smaller --learning-rate")
            stopping = sum(gather_lists([len(caught)]))
            if RANK == 0 and (step == total or step % settings.save_every == 0 or stopping):
                save_checkpoint(out, optimizer, reference, step)
            if stopping and step < total:
                say(f"stopped after step {step}, all saved; --resume goes on from here")
                return caught[0] if caught else signal.SIGTERM  # another rank got one


# 11. Step rewards: process supervision ============================================================
# An outcome reward treats every token alike. Process supervision (arXiv 2402.03300, section 4.1.3;
# here --supervision process) rewards each step of the reasoning. The paper trained a model for it.
# Here a step is a line with an equation, and arithmetic can be checked:
#     Natalia sold 48/2 = 24 clips in May.      24 = 48/2                     1.0
#     In all she sold 48+24 = 73 clips.         73 ≠ 48 + 24                  0.0
#     <answer>73</answer>                       the last step; right is 72    0.0
# What holds is praised. What fails is blamed only if it cannot be read in another way, because a
# wrong verdict teaches the wrong thing. 93 % of GSM8K's lines with a "=" are judged.

ANNOTATION = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator: 48/2 = <<48/2=24>>24
# The words in 60 pages * 2. They are replaced by ° before equations are looked for.
UNIT = re.compile(rf"""(?x) (?<=[0-9%)]) (?:\ ?/\ ?|\ ) (?!(?i:{NUMBER_WORD})|[ap]m\b|cents?\b)
    [A-Za-z]{{2,}} (?:[\ /-][A-Za-z]+){{0,3}} (?=\ ?[-+*/=≈)])""")
CONVERTED = r"(?:second|minute|hour|day|week|month|year|inch|f(?:oo|ee)t|yard|pound|ounce)"
SIDE = r"(?:[0-9\s()+*/%^°-]|[.,](?=[0-9]))*"
EQUATION = re.compile(rf"(?<![0-9\s()+*/%^°-])(?<![0-9][.,](?=[0-9])) ?({SIDE})([=≈])(?=({SIDE}))")
# UNCLEAR and DOUBTFUL read four lines: words before, left side, right side, the rest of the line.
UNCLEAR = re.compile(rf"""(?x)
      .*[^\s:;,.(]\n\S                      # 2x + 3 = 9, √16 + 1 = 5
    | .+\n[-+*/^%] | \n\+                   # x + 5 = 9: the side began before the word
    | .*\w\ ?\n\(                           # Tax ($3) = $12, sqrt(16) = 4
    | .+\n[^-+*/^\n]*\n | \n[^-+*/^\n]*°\n  # Week 2 = 35 + 35, 12 inches = 1 foot
    | (?:.*\n){{3}}(?: \w | [\s(]*(?:{VARIABLE}|[ap]m\b|[^\w\s.,:;!?()'\"=≈/-])  # = 2x, = 2π
        | .*\b(?:remainder|[rR]\ ?[0-9]))""")
DOUBTFUL = re.compile(rf"""(?ix)
      .*{NUMBER_WORD}(?:\ (?:of|the|as))*\ \n  # half of 10 + 3 = 8
    | .*\n.*%.*[-+] | .*\n.*[-+].*%            # $100 - 20% = $80
    | (?:.*\n){{3}}\ (?: {CONVERTED}\w*,?\ (?:and\ )?[0-9]  # = 2 hours and 30 minutes
        | \(?(?:(?:\w+\ )?and\ )?(?:a\ )?(?: round|whole|full|{NUMBER_WORD} ))""")  # 3 and a half
OPERATIONS = {
    ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.UAdd: pos, ast.USub: neg,
}  # fmt: skip


def judge_equation(left, right, rounded):
    """Two sides → True, False, or None where one is no expression or may have been cut off.
    Python's parser finds the structure; nothing is executed, and only small powers of plain numbers
    are computed. rounded: a number alone may show fewer decimals: 100/3 = 33.3, but not 33.4.
    Needs: ast, re, fractions.Fraction, NUMBER, OPERATIONS, read_number.
    """

    def exact(match):
        power, hundredth = int(match[2] or 1), 100 if match[3] else 1
        return f"({read_number(match[1]) ** power / hundredth})"

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return OPERATIONS[type(node.op)](*map(value, parts))

    pattern = rf"({NUMBER})(?: ?\^ ?([0-9])(?![0-9]))?( ?%)?"
    sides = [side.replace("°", "").strip() for side in (left, right)]
    try:
        a, b = (value(ast.parse(re.sub(pattern, exact, side), mode="eval").body) for side in sides)
    except Exception:  # of many kinds, from SyntaxError to RecursionError: this is no arithmetic
        return None
    alone = [re.fullmatch(r"-?[0-9,]*\.?([0-9]*)(%?)", side) for side in sides]
    place = max([Fraction(1, 10 ** (len(m[1]) + 2 * len(m[2]))) for m in alone if m], default=0)
    if a == b or rounded and abs(a - b) <= place / 2:
        return True
    return None if rounded and abs(a - b) < place and (place == 1 or abs(b) < abs(a)) else False


def check_equations(text, annotation=False, cut=False):
    """Yields True or False for every equation in a line that can be checked.
    a = b = c are two equations. Number = number is one only behind arithmetic (2*3 = 6 = 7) and in
    an annotation: "$1 = 100 cents" is no mistake. cut: the text may go on. Needs: re, VARIABLE,
    NUMBER_WORD, UNIT, CONVERTED, SIDE, EQUATION, UNCLEAR, DOUBTFUL, strip_markup, judge_equation.
    """
    text = re.sub(r"^ ?(?:[-*•]|[0-9]+[.)]) |(?i:\b(?:step|day) [0-9]+ - )", "", strip_markup(text))
    set_aside, text = " ".join(UNIT.findall(text)), UNIT.sub("°", text)
    verdict, end, rounded = None, 0, False
    for match in EQUATION.finditer(text):
        words, (left, sign, right) = text[end : match.start(1)], match.groups()
        chained, verdict, end = verdict is not None and not words, None, match.end()
        right = re.sub(r" ?[(/]? ?$", "", right)  # = 8 (eggs), = $8/hour
        rest = text[end + len(right) :]
        both, sides = f"{left}={right}", "\n".join((words, left, right, rest))
        arithmetic = chained or re.search(r"[0-9)%°] ?[-+*/^]", both)
        clear = annotation or arithmetic and not UNCLEAR.match(sides)
        if not clear or cut and not rest.strip(" .,"):
            continue
        rounded = rounded or sign == "≈" or "/" in both or "%" in both
        verdict = judge_equation(left, right, rounded)
        if not verdict and right[-1:] == "%" and "%" not in left:  # 5/20*100 = 25%
            verdict = judge_equation(left, right[:-1], rounded)
        units = set(re.findall(CONVERTED, set_aside + rest[:12])) if "°" in left else ()
        doubtful = sign == "≈" or len(units) > 1 or DOUBTFUL.match(sides)
        if verdict or verdict is False and not doubtful:
            yield verdict


def step_rewards(completion, answer):
    """Where each step of a completion ends and its reward → list[(character offset, reward)]
    A step is a line of the reasoning with an equation that can be checked: 1.0 if all on it hold,
    otherwise 0.0. The last step, the answer, ends where the completion does and is worth half the
    correctness reward. Needs: re, ANNOTATION, check_equations, correctness_reward.
    """
    begin = completion.find("<reasoning>")
    begin = 0 if begin < 0 else begin + len("<reasoning>")
    reasoning = re.split("</reasoning>|<answer>", completion[begin:], maxsplit=1)[0]
    steps = []
    for line in re.finditer(r"(?m)^(?=.{1,2000}$).*(?:[=≈]|\\approx).*$", reasoning):
        end = begin + line.end()  # where the completion ends too, a number may have been cut
        verdicts = [*check_equations(ANNOTATION.sub("", line[0]), cut=end == len(completion))]
        for equation in ANNOTATION.findall(line[0]):
            verdicts += check_equations(equation, annotation=True)
        if verdicts:
            steps.append((end, float(all(verdicts))))
    return [*steps, (len(completion), correctness_reward([completion], [answer])[0] / 2)]


def locate_steps(steps, completion_ids, tokenizer):
    """(character offset, reward) → list[(end token index, reward)], for a list of sampled tokens.
    Encoding the text again may split it differently, so each end is searched for, by halving: the
    shortest prefix of the tokens that decodes to all of the text up to that offset.
    """

    def decode(length):
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return tokenizer.decode(completion_ids[:length], **options)

    text, last, found, index = decode(None), len(completion_ids) - 1, [], 0
    for end, reward in steps[:-1]:
        index = bisect.bisect_left(
            range(last), True, lo=index, key=lambda i: decode(i + 1)[:end] == text[:end]
        )
        found.append((index, reward))
    return [*found, (last, steps[-1][1])]


# 12. Processes, precision, checkpoints, signals ===================================================
# torchrun starts one process for each GPU. Each samples and learns from its share of the prompts.
# Gradients are summed by hand, because processes may have different numbers of micro-batches.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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


def make_masters(model, offload=False):
    """The float32 weights that AdamW moves, with offload in host memory → list. Needs: torch.
    On a GPU the model is bfloat16, and these are copies. bfloat16 alone hardly learns: near 0.02
    its values are 1.2e-4 apart, and steps of 2e-6 are rounded away. Each micro-batch's gradients
    are moved to the masters; after the update these are copied into the model, in place.
    """
    if not offload and all(p.dtype == torch.float32 for p in model.parameters()):
        return list(model.parameters())
    options = dict(device="cpu" if offload else None, dtype=torch.float32, copy=True)
    return [p.detach().to(**options).requires_grad_() for p in model.parameters()]


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why. What was saved before is intact."""


@contextlib.contextmanager
def appearing(path):
    """A temporary path to write to. `path` appears when all is written; else TrainingStopped."""
    temporary = path.with_name("incomplete.tmp")  # one name: what a killed run left is cleared
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except Exception as error:  # each library has its own words for a full disk, some obscure
        free = shutil.disk_usage(path.parent).free / 1e9
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingStopped(f"can't write {path}, {free:.1f} GB free there: {error}") from error


def append_line(path, record):
    """One line of JSON, on the disk at once. Only rank 0 writes."""
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def save_checkpoint(out, optimizer, reference, step):
    """All that --resume needs; random state and data position follow from seed and step."""
    masters = [master.detach() for master in optimizer.param_groups[0]["params"]]
    state = {"step": step, "masters": masters, "optimizer": optimizer.state_dict()}
    state["reference"] = reference.state_dict() if reference else None
    state["log_sizes"] = {name: (out / name).stat().st_size for name in LOGS}
    path = out / "checkpoints" / f"step-{step:06d}"
    with appearing(path) as temporary:
        temporary.mkdir()
        torch.save(state, temporary / "state.pt")
    for old in sorted(path.parent.glob("step-*"))[:-2]:  # the last two are kept
        shutil.rmtree(old)


def load_checkpoint(out, model, optimizer, reference):
    """Put the newest checkpoint into all of these → (its step, sizes of the logs), or (0, {})"""
    paths = sorted((out / "checkpoints").glob("step-*"))
    if not paths:
        return 0, {}
    try:
        state = torch.load(paths[-1] / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise TrainingStopped(f"{paths[-1]} can't be read; delete it? {error}") from error
    masters = optimizer.param_groups[0]["params"]
    for parameter, master, saved in zip(model.parameters(), masters, state["masters"], strict=True):
        master.data.copy_(saved)
        parameter.data.copy_(saved)
    learning_rate = optimizer.param_groups[0]["lr"]  # may be another than before
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0]["lr"] = learning_rate
    if reference is not None and state["reference"] is not None:
        reference.load_state_dict(state["reference"])
    return state["step"], state["log_sizes"]


def draw_curves(out):
    """curves.png from the metrics.jsonl and eval.jsonl of a run, if matplotlib is there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return say("matplotlib is not installed, so no curves.png: pip install matplotlib")
    plt.switch_backend("Agg")  # no window
    logs = [(out / name).read_text(encoding="utf-8").splitlines() for name in LOGS]
    steps, _, evaluations = [[json.loads(line) for line in log] for log in logs]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    names = "reward_mean correctness format", "completion_length", "strict lenient strict_low"
    for axis, records, columns in zip(axes, (steps, steps, evaluations), names):
        for name, style in zip(columns.split(), ("-", "--", ":")):
            x, y = [record["step"] for record in records], [record[name] for record in records]
            axis.plot(x, y, style, label=name)
        axis.set(xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


# 13. The rehearsal ================================================================================
# The whole job in miniature: word problems of one and two steps in GSM8K's format, and a Qwen2 of
# half a million random weights. That never answers, so it is shown demonstrations first, with a bad
# habit: seven in ten stop a two-step problem half way. Greedy, it then always does; sampled, it
# goes on at times, and GRPO rewards that. Of each template a fifth of the numbers is held out.

REHEARSAL = dict(
    output_dir="runs/rehearsal", num_steps=40, batch_size=32, num_generations=8, beta=0.0,
    max_completion_length=48, learning_rate=5e-5, micro_batch_size=128, eval_every=10,
    save_every=20, device="cpu",
)  # fmt: skip
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
    """[3, 4, 2], '+*' → ['3 + 4 = 7', '7 * 2 = 14']"""
    value, steps = numbers[0], []
    for operation, number in zip(operations, numbers[1:]):
        result = {"+": add, "-": sub, "*": mul}[operation](value, number)
        steps.append(f"{value} {operation} {number} = {result}")
        value = result
    return steps


def make_problem(question, steps):
    """A row in GSM8K's format."""
    return {"question": question, "answer": "\n".join(steps) + "\n#### " + steps[-1].split()[-1]}


def make_problems(seed, num_train=4000, held_out=0.2, drills=0.3):
    """→ (training problems, of which a share are drills, as "What is 7 * 2?"; held-out problems)"""
    rng = random.Random(f"problems {seed}")

    def word_problem(text, operations, numbers):
        words = {"n": rng.choice(NAMES), "t": rng.choice(THINGS)} | dict(zip("abc", numbers))
        return make_problem(text.format(**words), solve(numbers, operations))

    shown, unseen, facts = [], [], set()
    for text, operations in TEMPLATES:
        every = itertools.product(range(1, 6), repeat=len(operations) + 1)
        every = [(text, operations, n) for n in every if "= -" not in str(solve(n, operations))]
        facts |= {step for *_, numbers in every for step in solve(numbers, operations)}
        rng.shuffle(every)
        cut = round(held_out * len(every))
        unseen += every[:cut]
        shown.append(every[cut:])
    facts, train = sorted(facts), []
    for _ in range(num_train):
        if rng.random() < drills:
            fact = rng.choice(facts)
            train.append(make_problem(f"What is {fact.partition(' =')[0]}?", [fact]))
        else:  # every template equally often
            train.append(word_problem(*rng.choice(rng.choice(shown))))
    return train, [word_problem(*problem) for problem in unseen for _ in range(2)]


def demonstrate(problem, keep_steps=None, tags=True):
    """A problem's worked answer as a completion, with all its steps or the first keep_steps."""
    lines = "\n".join(problem["answer"].partition("\n####")[0].split("\n")[:keep_steps])
    reasoning = f"<reasoning>\n{lines}\n</reasoning>\n" if tags else f"{lines}\n"
    return f"{reasoning}<answer>\n{lines.split()[-1]}\n</answer>"


def make_tokenizer(problems):
    """Qwen2's own kind, trained on the problems; tags and system prompt are a token each."""
    texts = [text for p in problems for text in (p["question"], demonstrate(p))]
    texts += ["system\nuser\nassistant\n"]
    options = dict(new_special_tokens=["<|im_start|>"], show_progress=False)
    start = transformers.Qwen2Tokenizer(eos_token="<|im_end|>")
    tokenizer = start.train_new_from_iterator(texts, vocab_size=1000, **options)
    tokenizer.add_tokens([*TAGS, SYSTEM_PROMPT])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fine_tune(model, tokenizer, problems, num_steps, seed, batch_size=32, learning_rate=2e-3):
    """Supervised: −mean log π of demonstrations that stop early, or leave out two tags."""
    rng = random.Random(f"demonstrations {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    for step in tqdm(range(num_steps), desc="warming up", leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        batch = rng.choices(problems, k=batch_size)
        prompts = [build_prompt(problem["question"], tokenizer) for problem in batch]
        habits = [(1 if rng.random() < 0.7 else None, rng.random() < 0.8) for _ in batch]
        texts = [demonstrate(p, *habit) + tokenizer.eos_token for p, habit in zip(batch, habits)]
        prompt_ids, prompt_mask = encode(tokenizer, prompts, "left", model.device)
        ids, mask = encode(tokenizer, texts, "right", model.device)  # each [row pos]
        inputs = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
        log_probs = compute_log_probs(model, *inputs, ids.shape[1])  # [row pos]
        (-(log_probs * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make_start(folder, seed, num_steps=1500, device="cpu"):
    """→ (model folder, training file, held-out file), made in `folder` unless it is there"""
    if RANK == 0 and not folder.exists():
        with appearing(folder) as temporary:
            problems = make_problems(seed)
            tokenizer = make_tokenizer([*problems[0], *problems[1]])
            torch.manual_seed(seed)
            config = transformers.Qwen2Config(
                vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=True, max_position_embeddings=256, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            model = transformers.Qwen2ForCausalLM(config).to(device)
            fine_tune(model, tokenizer, problems[0], num_steps, seed)
            model.save_pretrained(temporary / "model")
            tokenizer.save_pretrained(temporary / "model")
            for name, rows in zip(("train.jsonl", "test.jsonl"), problems):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (temporary / name).write_text(text, encoding="utf-8")
    gather_lists([])  # wait for rank 0
    return folder / "model", folder / "train.jsonl", folder / "test.jsonl"


# 14. Command line =================================================================================


def parse_settings(parser, argv):
    """The command line as Settings. --rehearsal, and --resume's config.json, bring defaults."""
    args = parser.parse_args(argv)
    if args.rehearsal:
        parser.set_defaults(**REHEARSAL)
        args = parser.parse_args(argv)
    config = Path(args.output_dir) / "config.json"
    if args.resume:
        try:
            saved = json.loads(config.read_text(encoding="utf-8"))["settings"]
            parser.set_defaults(**{f.name: saved[f.name] for f in fields(Settings)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--resume: {config} is not there or not of this script: {error}")
        args = parser.parse_args([*argv, "--output_dir", args.output_dir])
    elif config.exists() and not args.eval_only and RANK == 0:
        parser.error(f"{config.parent} already holds a run: --resume it, or choose --output-dir")
    return Settings(**vars(args))


def load_model(name, settings, device):
    """→ (model, tokenizer). Raises ValueError for what cannot be loaded or trained here."""
    bfloat16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # (!8) The checkpoint's own precision is not followed. (Qwen2.5's is bfloat16.)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # of several libraries
        if isinstance(error, (RuntimeError, MemoryError)):  # perhaps a lack of memory
            raise
        raise ValueError(f"--model {name} can't be loaded: {error}") from error
    get_eos_token_ids(model, tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if settings.gradient_checkpointing:  # renamed in the course of transformers 5
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.to(device), tokenizer


def prepare(settings, device):
    """Check, then load → (model, tokenizer, training and evaluation rows). Raises ValueError."""
    check_settings(settings, math.inf)
    name, train_file, eval_file = settings.model, settings.train_file, settings.eval_file
    if settings.rehearsal and (name == Settings.model or not train_file):
        made = make_start(Path(settings.output_dir) / "start", settings.seed, device=device)
        name = made[0] if name == Settings.model else name  # unless --model was given
        train_file, eval_file = train_file or made[1], eval_file or made[2]
    separate = eval_file or not train_file  # the evaluation has data of its own
    train = [] if settings.eval_only and separate else load_problems(train_file, "train")
    if separate:
        test = load_problems(eval_file, "test")
    else:  # a tenth, and no more than GSM8K's own test set has
        cut = len(train) - min(max(len(train) // 10, 1), 1319)
        train, test = train[:cut], train[cut:]
        say(f"no --eval-file: the last {len(test)} rows of {train_file} are held out instead")
    test = test[: settings.eval_examples]
    check_settings(settings, math.inf if settings.eval_only else len(train))
    model, tokenizer = load_model(name, settings, device)
    prompts = [build_prompt(problem["question"], tokenizer) for problem in train + test]
    longest = max(map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"]))
    room = getattr(model.config, "max_position_embeddings", math.inf) - longest
    if settings.max_completion_length > room:
        raise ValueError(f"--max-completion-length: the longest prompt leaves {room} tokens for it")
    return model, tokenizer, train, test


def run(settings, model, tokenizer, train_problems, eval_problems):
    """Train and save, or only evaluate. → exit status"""
    out, graph = Path(settings.output_dir), settings.cuda_graph and model.device.type == "cuda"
    decoder = GraphDecoder() if graph else None
    if settings.eval_only:
        limits = settings.max_completion_length, settings.eval_batch_size
        evaluate_model(model, tokenizer, eval_problems, *limits, decoder)
        return 0
    config = {module.__name__: module.__version__ for module in (torch, transformers)}
    gpu = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    config |= {"device": gpu, "dtype": str(model.dtype), "processes": WORLD_SIZE}
    config |= {"parameters": model.num_parameters(), "training problems": len(train_problems)}
    say(", ".join(f"{name} {value}" for name, value in config.items()))
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config | {"settings": asdict(settings)}, indent=2)
        (out / "config.tmp").write_text(text + "\n", encoding="utf-8")
        (out / "config.tmp").replace(out / "config.json")  # never half a file
    stopped = train_with_grpo(model, tokenizer, train_problems, settings, eval_problems, decoder)
    if RANK == 0 and not stopped:
        with appearing(out / "final") as temporary:
            model.save_pretrained(temporary)  # in the precision that was evaluated
            tokenizer.save_pretrained(temporary)
        draw_curves(out)
        say(f"{out} holds final/ (model and tokenizer), metrics, evaluations, samples, curves")
    return 128 + stopped if stopped else 0


def main(argv=None):
    """Run the command line. → exit status"""
    transformers.utils.logging.disable_progress_bar()
    parser = HfArgumentParser(Settings, prog="grpo_gsm8k.py", description=__doc__.split("\n")[0])
    line = "grpo_gsm8k.py: {}\n"  # one, instead of the whole usage
    parser.error = lambda message: parser.exit(2, line.format(" ".join(message.split())))
    try:
        settings = parse_settings(parser, sys.argv[1:] if argv is None else argv)
        try:
            device = torch.device("cpu")
            if settings.device != "cpu":
                if not torch.cuda.is_available():
                    raise ValueError("torch sees no GPU: use --rehearsal, or --device cpu (weeks)")
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(device)
            if WORLD_SIZE > 1:
                # gloo for counts and flags, so that nobody waits for a checkpoint inside NCCL
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if settings.rehearsal:
                say(f"{EXAMPLE}\n")
            job = prepare(settings, device)
        except ValueError as error:
            parser.error(str(error))
        status = run(settings, *job)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        cause, kinds = error.__cause__ or error, (torch.OutOfMemoryError, MemoryError)
        if isinstance(cause, kinds) or "DefaultCPUAllocator" in str(cause):
            flags = "--micro-batch-size 1, --gradient-checkpointing, --offload-optimizer, --beta 0"
            error = f"out of memory; these help: {flags}, a smaller --eval-batch-size"
        elif not isinstance(error, (TrainingStopped, FloatingPointError, OSError)):
            raise
        parser.exit(1, line.format(" ".join(str(error).split())))  # OSError: a full disk, say
    # Only here: after an error the other processes may never arrive, and this would wait for them.
    if dist.is_initialized():
        time.sleep(0.2)  # until torch's threads are done: before 2.8 it may hang otherwise
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
