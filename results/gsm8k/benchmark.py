# SPDX-License-Identifier: MIT
"""Speed and memory of grpo_gsm8k.py against TRL's GRPOTrainer (pip install trl):

    python results/gsm8k/benchmark.py [DIR]                a small model on a CPU, about 16 minutes
    python results/gsm8k/benchmark.py [DIR] --full-size    one GPU of 80 GB, under nine minutes

They write benchmark.json and .md, and full_size.json and .md: there a model of the size of
Qwen2.5-1.5B, and the script's default job. Nothing is downloaded: weights are random, tokenizer and
problems those of the rehearsal, rewards random numbers, so that no group is silent and skipped.

All contenders have the same weights and prompts, and completions of one fixed length. Each
measurement is a process of its own, and they take turns: a slow minute of the machine does not hit
one contender alone.
"""

import collections
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch
import transformers

import grpo_gsm8k as gsm

CUDA = torch.cuda.is_available()
MADE_WITH = {module.__name__: module.__version__ for module in (torch, transformers)}
MADE_WITH |= {"cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if CUDA else None}
TRL = [found.version for found in importlib.metadata.distributions(name="trl")]
# hidden and intermediate size, layers, heads, key-value heads, vocabulary
SMALL, QWEN = (256, 1024, 4, 4, 2, 32_000), (1536, 8960, 28, 12, 2, 151_936)
SPENT, STEPS = collections.Counter(), []  # seconds by function; (end, SPENT) of finished steps


def plan(full_size):
    """→ list of (contender, its settings of the script), in the order of measuring"""
    if full_size:  # the script's defaults, but β = 0 unless it is named; TRL's bfloat16 is autocast
        less = dict(gradient_checkpointing=True)
        jobs = [("ours", {}), ("TRL", dict(dtype="float32")), ("ours, β = 0.04", dict(beta=0.04))]
        jobs += [("TRL, bfloat16 weights", {}), ("ours, --gradient-checkpointing", less)]
        jobs += [("ours, also --offload-optimizer", less | dict(offload_optimizer=True))]
        return [(what, dict(beta=0.0, num_steps=2) | settings) for what, settings in jobs]
    # Tokens, steps, and completions in a forward pass: TRL takes all 32 if memory is no concern,
    # ours 8, the default of both. At 512 tokens TRL would need 25 GB.
    jobs = [("ours", 128, 3, 8), ("TRL", 128, 3, 32)] * 3 + [("TRL, 8 at a time", 128, 3, 8)]
    jobs += [("TRL, continuous batching", 128, 2, 32), ("ours", 64, 2, 8), ("TRL", 64, 2, 32)]
    jobs += [("ours", 256, 2, 8), ("TRL", 256, 2, 32), ("ours", 512, 2, 8)]
    names = ("max_completion_length", "num_steps", "micro_batch_size")
    base = dict(batch_size=4, num_generations=8, beta=0.0, loss_type="dapo", device="cpu")
    return [(what, base | dict(zip(names, numbers))) for what, *numbers in jobs]


def clock(owner, name):
    """Replace a function by one that adds its seconds to SPENT. AdamW's step ends a step."""
    function = getattr(owner, name)

    def now():
        if CUDA:
            torch.cuda.synchronize()  # kernels run on while Python goes ahead
        return time.perf_counter()

    def timed(*arguments, **options):
        started = now()
        result = function(*arguments, **options)
        SPENT[name] += now() - started
        if owner is torch.optim.AdamW:
            STEPS.append((now(), dict(SPENT)))
            SPENT.clear()
        return result

    setattr(owner, name, timed)


def make_model(folder, sizes):
    """A Qwen2 of random weights and the rehearsal's tokenizer, as load_model wants them."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip((*names, "num_key_value_heads", "vocab_size"), sizes))
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, bos_token_id=None)
    with torch.device("cuda" if CUDA else "cpu"):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16 if CUDA else torch.float32)
    model.save_pretrained(folder)
    gsm.make_tokenizer(gsm.make_problems(seed=0)[0]).save_pretrained(folder)


def run_ours(model, tokenizer, problems, settings):
    """train_with_grpo as it is, without checkpoints → the last step's logprob_gap"""
    for name in "generate_completions", "compute_log_probs":
        clock(gsm, name)
    gsm.combined_reward = lambda texts, answers: torch.rand(len(texts)).tolist()
    gsm.save_checkpoint = lambda *_: None
    gsm.train_with_grpo(model, tokenizer, problems, settings)
    last = json.loads([*open(f"{settings.output_dir}/metrics.jsonl")][-1])
    assert last["completion_length"] == settings.max_completion_length and last["grad_norm"] > 0
    return last["logprob_gap"]


def run_trl(model, tokenizer, problems, settings, continuous):
    """The same work with TRL, micro-batches by gradient accumulation"""
    import datasets
    import trl

    def rewards(completions, completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {settings.max_completion_length}
        return torch.rand(len(completions)).tolist()

    clock(model, "generate_batch" if continuous else "generate")
    rows, size = settings.batch_size * settings.num_generations, settings.micro_batch_size
    same = "num_generations max_completion_length beta learning_rate gradient_checkpointing".split()
    config = trl.GRPOConfig(
        **{name: getattr(settings, name) for name in same}, top_k=0, top_p=1.0, temperature=1.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=rows // size,
        max_steps=settings.num_steps, use_cpu=model.device.type == "cpu", shuffle_dataset=False,
        bf16=model.device.type == "cuda", use_transformers_continuous_batching=continuous,
        output_dir=settings.output_dir, save_strategy="no", logging_strategy="no", report_to=[],
    )  # fmt: skip
    prompts = [{"prompt": gsm.build_prompt(p["question"], tokenizer)} for p in problems]
    prompts = datasets.Dataset.from_list(prompts)
    trl.GRPOTrainer(model, rewards, config, prompts, processing_class=tokenizer).train()


def measure(what, folder, settings):
    """Train as one contender → row for the json file"""
    settings = gsm.Settings(model=folder, output_dir=f"{folder}/run", **settings)
    device = torch.device("cpu" if settings.device == "cpu" else "cuda")
    model, tokenizer = gsm.load_model(folder, settings, device)
    # An end token for which the model has no logit: every completion gets the full length.
    tokenizer.__class__ = type("Endless", (type(tokenizer),), {"eos_token_id": 10**6})
    # Seven of the rehearsal's questions make a prompt of 153 to 175 tokens, as long as GSM8K's.
    texts = [problem["question"] for problem in gsm.make_problems(0, drills=0)[0]]
    texts = [" ".join(texts[i : i + 7]) for i in range(0, 21 * settings.batch_size, 7)]
    job = model, tokenizer, [{"question": x, "answer": "1"} for x in texts], settings
    clock(torch.Tensor, "backward")
    clock(torch.optim.AdamW, "step")
    STEPS.append((time.perf_counter(), {}))
    gap = run_trl(*job, "continuous" in what) if what.startswith("TRL") else run_ours(*job)
    ends, spent = zip(*STEPS)
    row = dict(what=what, tokens=settings.max_completion_length, spent=spent[-1], logprob_gap=gap)
    row["seconds"] = [end - begin for begin, end in zip(ends, ends[1:])]
    row["sampling"] = sum(x for name, x in spent[-1].items() if name.startswith("generate"))
    rows = settings.batch_size * settings.num_generations
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process
    return row | {"completions": rows, "peak": torch.cuda.max_memory_allocated() or peak}


def run_alone(script, function, *arguments, timeout=None):
    """Call a function of a script of this folder in a process of its own → what it returned"""
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {Path(script).stem} as x;"
    code += f"print(json.dumps(x.{function}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return json.loads(done.stdout.splitlines()[-1])


def format_table(head, *lines):
    """Lists of cells → Markdown"""
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines))


def format_benchmark(rows):
    """A line for each contender and length.

    Times are medians over processes, without the first step of each, which warms up. The shares of
    a step are those of the last one. logprob_gap should be rounding: 1e-7 in float32.
    """
    heads = "|tokens|one step, s|peak, GB|sampling, tokens/s|the rest, tokens/s|logprob_gap|time"
    lines, runs, found = [heads.split("|")], collections.defaultdict(list), {}
    for row in rows:
        runs[row["what"], row["tokens"]].append(row)
    for (what, tokens), same in runs.items():
        step = statistics.median(x for row in same for x in row["seconds"][1:])
        sampling = statistics.median(row["sampling"] for row in same)
        last, peak = same[-1], max(row["peak"] for row in same) / 1e9
        found[what, tokens] = step, peak
        speeds = (last["completions"] * tokens / x for x in (sampling, step - sampling))
        gap = "" if last["logprob_gap"] is None else f"{last['logprob_gap']:.0e}"
        shares = (f"{part} {x / last['seconds'][-1]:.0%}" for part, x in last["spent"].items())
        lines.append([what, f"{tokens}", f"{step:.1f}", f"{peak:.2f}"])
        lines[-1] += [*(f"{x:,.0f}" for x in speeds), gap, ", ".join(shares)]
    for tokens in (tokens for what, tokens in runs if what == "TRL" and ("ours", tokens) in runs):
        ratios = (f"{a / b:.2f}" for a, b in zip(found["ours", tokens], found["TRL", tokens]))
        lines.append(["ours / TRL", f"{tokens}", *ratios, *[""] * 4])
    return format_table(*lines)


def run_benchmark(out, name, sizes, jobs, minutes=60):
    """Measure the jobs of plan() until the minutes are over; write NAME.json and NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + 60 * minutes, []
    if not TRL:
        print("TRL is not installed, so its rows are missing: pip install trl", flush=True)
        jobs = [job for job in jobs if not job[0].startswith("TRL")]
    with tempfile.TemporaryDirectory() as folder:
        run_alone(__file__, "make_model", folder, sizes)
        for what, settings in jobs:
            left = max(end - time.monotonic(), 1)
            try:
                rows.append(run_alone(__file__, "measure", what, folder, settings, timeout=left))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{what}: failed\n{error}", flush=True)
                continue
            print(json.dumps(rows[-1]), flush=True)
            made = {"made_with": MADE_WITH | {"trl": "".join(TRL)}, "rows": rows}
            (out / f"{name}.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
            text = f"# python results/gsm8k/benchmark.py\n\n{format_benchmark(rows)}\n"
            (out / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    full_size = "--full-size" in sys.argv
    if full_size and not CUDA:
        sys.exit("--full-size needs a GPU")
    out = next((Path(argument) for argument in sys.argv[1:] if argument[0] != "-"), HERE)
    job = ("full_size", QWEN) if full_size else ("benchmark", SMALL)
    run_benchmark(out, *job, plan(full_size), minutes=8.5 if full_size else 60)
