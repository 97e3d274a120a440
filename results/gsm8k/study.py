# SPDX-License-Identifier: MIT
"""Variants and controls of the rehearsal, 80 steps from the same warmed-up model, three seeds:

    python results/gsm8k/study.py [DIR]      two processes, 40 minutes on two busy cores

results.json has the evaluations and settings of each run, tables.md means, study.png four variants.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from benchmark import HERE, MADE_WITH, format_table, run_alone

import grpo_gsm8k as gsm

# Changes of the rehearsal's settings; None: demonstrations, no GRPO. Clip ranges need µ = 2: in the
# first update of a rollout every ratio is 1, and dapo and cispo have the same gradient.
VARIANTS = {
    "GRPO as in the rehearsal": {},
    "process supervision": dict(supervision="process"),
    "Dr. GRPO": dict(loss_type="dr_grpo", advantage="centered"),
    "GRPO, µ = 2": dict(mu=2),
    "DAPO, µ = 2": dict(mu=2, loss_type="dapo", epsilon_high=0.28),
    "CISPO, µ = 2": dict(mu=2, loss_type="cispo", epsilon_high=4.0),
    "control: format reward only": dict(reward="format"),
    "control: more SFT, no GRPO": None,
}
DRAWN = dict(zip((list(VARIANTS)[i] for i in (0, 1, 6, 7)), ("-o", "--s", ":.", "^")))
COLORS = "#0072B2", "#009E73", "#E69F00", "#D55E00"  # distinct for every colour vision


def make_start(folder, seed, num_steps):
    """→ (seconds, paths of the model's folder, of training and of held-out problems)"""
    torch.set_num_threads(1)
    started = time.perf_counter()
    gsm.make_start(Path(folder), seed, num_steps)
    paths = (f"{folder}/{name}" for name in ("model", "train.jsonl", "test.jsonl"))
    return time.perf_counter() - started, *paths


def train(name, settings, start):
    """One run from a start that make_start made → row for results.json"""
    torch.set_num_threads(1)
    start_seconds, folder, train_file, test_file = start
    its = gsm.Settings(**settings | {"model": folder})
    model, tokenizer = gsm.load_model(its)
    test, started = gsm.load_problems(test_file), time.perf_counter()
    if VARIANTS[name] is not None:
        gsm.train_with_grpo(model, tokenizer, gsm.load_problems(train_file), its, test)
        evaluations = [json.loads(line) for line in open(f"{its.output_dir}/eval.jsonl")]
    else:  # as many demonstrations as GRPO has completions, in batches of 32
        demonstrations = [json.loads(line) for line in open(train_file)]
        steps = its.num_steps * its.batch_size * its.num_generations // 32
        job = model, tokenizer, test, its.max_completion_length, its.eval_batch_size
        evaluations = [{"step": 0, **gsm.evaluate_model(*job)}]
        gsm.fine_tune(model, tokenizer, demonstrations, steps, its.seed + 1000)
        evaluations += [{"step": its.num_steps, **gsm.evaluate_model(*job)}]
    row = {"variant": name, "seed": its.seed, "evaluations": evaluations}
    row |= dict(start_seconds=start_seconds, train_seconds=time.perf_counter() - started)
    return row | {"settings": vars(its) | {"output_dir": "", "model": ""}} | MADE_WITH


def format_study(rows):
    """The Markdown table: mean (lowest to highest seed) of each variant."""
    lines = ["|strict before, %|strict after, %|lenient after, %|all tags, %|tokens".split("|")]
    for name in dict.fromkeys(row["variant"] for row in rows):
        runs = [row["evaluations"] for row in rows if row["variant"] == name]
        values = [[100 * run[0]["strict"] for run in runs]]  # [column][seed]
        values += [[100 * run[-1][k] for run in runs] for k in ("strict", "lenient", "format")]
        values += [[run[-1]["mean_length"] for run in runs]]
        cells = (f"{statistics.fmean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in values)
        lines.append([name, *cells])
    n, text = runs[0][0]["examples"], f"\n\nMean of {len(runs)} seeds (lowest to highest);"
    return f"{format_table(*lines)}{text} {n} held-out problems."


def draw_study(rows, folder):
    """study.png: held-out accuracy by step, mean and range over the seeds."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for (name, style), color in zip(DRAWN.items(), COLORS):
        runs = [row["evaluations"] for row in rows if row["variant"] == name]
        x = [evaluation["step"] for evaluation in runs[0]]
        y = [[100 * e["strict"] for e in same] for same in zip(*runs)]  # [step][seed]
        axis.plot(x, [*map(statistics.fmean, y)], style, color=color, label=name)
        axis.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.2, lw=0)
    axis.set(xlabel="step (256 completions, or as many demonstrations)", ylim=(-2, 102))
    axis.set(ylabel="held-out problems right, greedy, %", title="Mean and range of the seeds")
    axis.legend(loc="center right")
    figure.savefig(folder / "study.png")


def run_study(out=HERE, seeds=(0, 1, 2), processes=2, start_steps=1500, **changes):
    """Measure everything and write it to the folder `out`; changes: settings for all runs."""
    out.mkdir(parents=True, exist_ok=True)
    began, rows, runs = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        job = run_alone, __file__, "make_start"
        starts = {n: pool.submit(*job, f"{folder}/{n}/start", n, start_steps) for n in seeds}
        for seed, (name, variant) in itertools.product(seeds, VARIANTS.items()):
            its = gsm.REHEARSAL | dict(num_steps=80, seed=seed) | changes | (variant or {})
            its["output_dir"] = f"{folder}/{seed} {name}"
            runs.append(pool.submit(run_alone, __file__, "train", name, its, starts[seed].result()))
        for run in runs:
            if run.exception():  # not for the others, which may take half an hour
                pool.shutdown(cancel_futures=True)
            rows.append(run.result())
            strict = [round(evaluation["strict"], 3) for evaluation in rows[-1]["evaluations"]]
            print(f"seed {rows[-1]['seed']}, {rows[-1]['variant']}: {strict}", flush=True)
            minutes, text = (time.perf_counter() - began) / 60, ",\n".join(map(json.dumps, rows))
            text = f'{{"minutes": {minutes:.1f}, "rows": [\n{text}\n]}}\n'
            (out / "results.json").write_text(text, encoding="utf-8")
    text = f"# python results/gsm8k/study.py\n\n{format_study(rows)}\n"
    (out / "tables.md").write_text(text, encoding="utf-8")
    draw_study(rows, out)


if __name__ == "__main__":
    run_study(*map(Path, sys.argv[1:2]))
