# SPDX-License-Identifier: MIT
"""Speed and memory of grpo_gsm8k.py against TRL's GRPOTrainer (pip install trl):

    python results/gsm8k/benchmark.py [DIR]                a small model on a CPU, about 16 minutes
    python results/gsm8k/benchmark.py [DIR] --full-size    one GPU of 80 GB, under seven minutes

They write benchmark.json, full_size.json and their .md: the latter with a model of the size of
Qwen2.5-1.5B and the script's default job. Weights and rewards are random, the same for all, and
completions of one length. Measurements are processes that take turns: a slow minute hits not one.
"""

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
SPENT, STEPS = {}, []  # seconds by function; (end, SPENT) of finished steps
ENDLESS = 10**6  # an end token for which the model has no logit: completions get the full length


def plan(full_size):
    """→ list of (contender, its settings of the script), in the order of measuring"""
    if full_size:  # the script's defaults; TRL mixes bfloat16 in by autocast, or has it throughout
        less, two = dict(gradient_checkpointing=True), dict(num_steps=2)
        jobs = [("ours", {}), ("TRL", two | dict(dtype="float32")), ("ours, β = 0", dict(beta=0.0))]
        jobs += [("ours, --no-cuda-graph", dict(num_steps=1, cuda_graph=False))]
        jobs += [("ours, --gradient-checkpointing", less)]
        jobs += [("ours, also --offload-optimizer", less | two | dict(offload_optimizer=True))]
        jobs += [("TRL, bfloat16 weights", two)]
        return [(what, dict(num_steps=3) | settings) for what, settings in jobs]
    # Tokens, steps, and completions in a forward pass: TRL takes all 32 if memory is no concern,
    # ours 8, the default of both. At 512 tokens TRL would need 25 GB.
    jobs = [("ours", 128, 3, 8), ("TRL", 128, 3, 32)] * 3 + [("TRL, 8 at a time", 128, 3, 8)]
    jobs += [("ours", 64, 2, 8), ("TRL", 64, 2, 32), ("ours", 256, 2, 8), ("TRL", 256, 2, 32)]
    jobs += [("ours", 512, 2, 8)]
    names = ("max_completion_length", "num_steps", "micro_batch_size")
    base = dict(batch_size=4, num_generations=8, beta=0.0, loss_type="dapo", device="cpu")
    return [(what, base | dict(zip(names, numbers))) for what, *numbers in jobs]


def clock(owner, name):
    """Replace a function by one that adds its seconds to SPENT. AdamW's step ends a step."""
    function = getattr(owner, name)
    wait = torch.cuda.synchronize if CUDA else int  # kernels run on while Python goes ahead

    def timed(*arguments, **options):
        wait()
        started = time.perf_counter()
        result = function(*arguments, **options)
        wait()
        SPENT[name] = SPENT.get(name, 0) + time.perf_counter() - started
        if owner is torch.optim.AdamW:
            STEPS.append((time.perf_counter(), dict(SPENT)))
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
    for name in "generate_completions", "compute_group_log_probs":
        clock(gsm, name)
    gsm.get_eos_token_ids = lambda *_: [ENDLESS]
    gsm.combined_reward = lambda texts, answers: torch.rand(len(texts)).tolist()
    gsm.save_checkpoint = lambda *_: None
    decoder = gsm.GraphDecoder() if CUDA and settings.cuda_graph else None
    gsm.train_with_grpo(model, tokenizer, problems, settings, (), decoder)
    last = json.loads([*open(f"{settings.output_dir}/metrics.jsonl")][-1])
    assert last["completion_length"] == settings.max_completion_length and last["grad_norm"] > 0
    return last["logprob_gap"]


def run_trl(model, tokenizer, problems, settings):
    """The same work with TRL, micro-batches by gradient accumulation"""
    import datasets
    import trl

    def rewards(completions, completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {settings.max_completion_length}
        return torch.rand(len(completions)).tolist()

    clock(model, "generate")
    rows, size = settings.batch_size * settings.num_generations, settings.micro_batch_size
    same = "num_generations max_completion_length beta learning_rate gradient_checkpointing".split()
    config = trl.GRPOConfig(
        **{name: getattr(settings, name) for name in same}, top_k=0, top_p=1.0, temperature=1.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=rows // size,
        max_steps=settings.num_steps, use_cpu=model.device.type == "cpu", shuffle_dataset=False,
        bf16=model.device.type == "cuda", output_dir=settings.output_dir, save_strategy="no",
        logging_strategy="no", report_to=[],
    )  # fmt: skip
    prompts = [{"prompt": gsm.build_prompt(p["question"], tokenizer)} for p in problems]
    prompts = datasets.Dataset.from_list(prompts)
    trl.GRPOTrainer(model, rewards, config, prompts, processing_class=tokenizer).train()


def measure(what, folder, settings):
    """Train as one contender → row for the json file"""
    settings = gsm.Settings(model=folder, output_dir=f"{folder}/run", **settings)
    model, tokenizer = gsm.load_model(settings)
    tokenizer.__class__ = type("Endless", (type(tokenizer),), {"eos_token_id": ENDLESS})
    # Seven of the rehearsal's questions make a prompt as long as GSM8K's.
    texts = [problem["question"] for problem in gsm.make_problems(0)[1]]
    texts = [" ".join(texts[i : i + 7]) for i in range(0, 21 * settings.batch_size, 7)]
    job = model, tokenizer, [{"question": x, "answer": "1"} for x in texts], settings
    clock(torch.Tensor, "backward")
    clock(torch.optim.AdamW, "step")
    STEPS.append((time.perf_counter(), {}))
    gap = run_trl(*job) if what.startswith("TRL") else run_ours(*job)
    ends, spent = zip(*STEPS)
    rows = settings.batch_size * settings.num_generations
    row = dict(what=what, tokens=settings.max_completion_length, completions=rows, logprob_gap=gap)
    row |= {"seconds": [b - a for a, b in zip(ends, ends[1:])], "spent": spent[-1]}
    row["sampling"] = sum(x for name, x in spent[-1].items() if name.startswith("generate"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process
    if CUDA:  # 2 operations a weight and token forward, 4 backward, 2 for the reference
        lengths = map(len, tokenizer([gsm.build_prompt(x, tokenizer) for x in texts])["input_ids"])
        tokens = rows * (row["tokens"] + statistics.fmean(lengths))
        row["operations"] = (8 if settings.beta else 6) * model.num_parameters() * tokens
        row["host_peak"], peak = peak, torch.cuda.max_memory_allocated()
    return row | {"peak": peak}


def run_alone(script, function, *arguments):
    """Call a function of a script of this folder in a process of its own → what it returned"""
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {Path(script).stem} as x;"
    code += f"print(json.dumps(x.{function}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return json.loads(done.stdout.splitlines()[-1])


def format_table(head, *lines):
    """Lists of cells → Markdown"""
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines))


def format_benchmark(command, made_with, rows):
    """A line for each contender and length. Times are medians over steps, without the first of each
    process, which warms up. Where it is the only one, it counts, but not its peak: AdamW has no
    states yet. TFLOP/s are those of the weights, without attention and what is computed twice."""
    heads = "tokens|one step, s|peak, GB|sampling, tokens/s|the rest, tokens/s|fastest, slowest, s"
    lines, runs, found = [["", *f"{heads}|TFLOP/s|logprob_gap|time".split("|")]], {}, {}
    for row in rows:
        runs.setdefault((row["what"], row["tokens"]), []).append(row)
    for (what, tokens), same in runs.items():
        seconds = [x for row in same for x in row["seconds"][1:] or row["seconds"]]
        step, sampling = map(statistics.median, (seconds, [row["sampling"] for row in same]))
        last, peak, rest = same[-1], max(row["peak"] for row in same) / 1e9, step - sampling
        found[what, tokens] = step, peak
        cells = [what, tokens, f"{step:.1f}", f"{peak:.2f}" if last["seconds"][1:] else ""]
        cells += [f"{last['completions'] * tokens / x:,.0f}" for x in (sampling, rest)]
        cells += [f"{min(seconds):.1f}, {max(seconds):.1f}"]
        cells += [f"{last['operations'] / rest / 1e12:.0f}" if "operations" in last else ""]
        cells += ["" if last["logprob_gap"] is None else f"{last['logprob_gap']:.0e}"]
        shares = (f"{part} {x / last['seconds'][-1]:.0%}" for part, x in last["spent"].items())
        lines.append([*map(str, cells), ", ".join(shares)])
    for tokens in (tokens for what, tokens in runs if what == "TRL" and ("ours", tokens) in runs):
        ratios = (f"{a / b:.2f}" for a, b in zip(found["ours", tokens], found["TRL", tokens]))
        lines.append(["ours / TRL", f"{tokens}", *ratios, *[""] * 6])
    made = ", ".join(f"{name} {value}" for name, value in made_with.items() if value)
    return f"# {command}\n\n{made}\n\n{format_table(*lines)}\n"


def run_benchmark(out, name, sizes, jobs):
    """Measure the jobs of plan(); write NAME.json and NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    made = {"command": "python results/gsm8k/benchmark.py" + " --full-size" * (sizes is QWEN)}
    made |= {"made_with": MADE_WITH | {"trl": "".join(TRL)}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        run_alone(__file__, "make_model", folder, sizes)
        for what, settings in jobs:
            made["rows"].append(run_alone(__file__, "measure", what, folder, settings))
            print(json.dumps(made["rows"][-1]), flush=True)
            (out / f"{name}.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
            (out / f"{name}.md").write_text(format_benchmark(**made), encoding="utf-8")


if __name__ == "__main__":
    full_size = "--full-size" in sys.argv
    out = next((Path(argument) for argument in sys.argv[1:] if argument[0] != "-"), HERE)
    job = ("full_size", QWEN) if full_size else ("benchmark", SMALL)
    run_benchmark(out, *job, plan(full_size))
