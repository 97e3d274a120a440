# SPDX-License-Identifier: MIT
"""A real model before and after GRPO, on a CPU: Qwen2.5-Coder-0.5B-Instruct on GSM8K.

    python results/gsm8k/real_run.py MODEL BIGGER [DIR]    about an hour a run on two cores

MODEL, BIGGER: hub names or folders of the 0.5B and the 1.5B, which is only evaluated. (Ours are
Qwen's qwen2.5-coder-0.5b-instruct-q4_k_m.gguf, sha256 1d961463…4fff32, and -1.5b-, cc324af0…3bb046,
widened to bfloat16.) What runs/real/ has finished stays."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "grpo_gsm8k.py"
COMMON = "--device cpu --dtype bfloat16 --eval_examples 200 --max_completion_length 256".split()
TRAIN = "--batch_size 4 --num_generations 8 --micro_batch_size 8 --beta 0 --learning_rate 2e-6"
TRAIN = f"{TRAIN} --eval_every 0 --save_every 20".split()
DAPO = "--example_turn --advantage centered --loss_type dapo"
RUNS = {
    "a": ("tutorial's settings", "--num_steps 25"),
    "b": ("example turn, centered, dapo", f"{DAPO} --num_steps 40"),
    "c": ("example turn, normalized, grpo", "--num_steps 40 --example_turn"),
    "d": ("example turn, centered, dapo, 1e-5", f"{DAPO} --num_steps 20 --learning_rate 1e-5"),
}
# Only evaluated; base-all and b-all: before and after b, on the whole test split
EVALUATED = {"base-all": RUNS["b"][0], "b-all": RUNS["b"][0]}
EVALUATED |= {"1.5B-asked": "1.5B", "1.5B-example": "1.5B, example turn"}


def run_all(model, bigger, folder, data=()):
    """Train and evaluate what is not there yet; data: --train_file … --eval_file …"""
    for name, (_, flags) in RUNS.items():
        out = folder / name
        if not (out / "final").exists():
            resume = ["--resume"] if (out / "config.json").exists() else []
            job = ["--model", model, "--output_dir", out, *TRAIN, *flags.split(), *resume]
            subprocess.run([sys.executable, SCRIPT, *COMMON, *data, *job], check=True)
    for name in EVALUATED:
        which = {"base-all": model, "b-all": folder / "b" / "final"}.get(name, bigger)
        job = ["--eval_only", "--model", which, "--output_dir", folder / name]
        job += ["--example_turn"] * (name != "1.5B-asked")
        job += ["--eval_examples=1319"] * name.endswith("all")
        if not (folder / name / "eval.jsonl").exists():
            subprocess.run([sys.executable, SCRIPT, *COMMON, *data, *job], check=True)


def read_lines(path):
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{name: x for name, x in row.items() if name != "model"} for row in rows]


def collect(folder):
    """From the folder of the runs → {name: label, evaluations, steps}"""
    found = {}
    for name, label in ({k: x[0] for k, x in RUNS.items()} | EVALUATED).items():
        steps = read_lines(folder / name / "metrics.jsonl") if name in RUNS else []
        evaluations = read_lines(folder / name / "eval.jsonl")
        found[name] = dict(label=label, steps=steps, evaluations=evaluations)
    paths = (next((folder / name).glob("completions-*")) for name in ("base-all", "b-all"))
    before, after = ({x["question"]: x for x in read_lines(path)} for path in paths)
    for kind in ("strict", "lenient"):
        changed = [after[question][kind] - before[question][kind] for question in before]
        found["b-all"][kind] = [changed.count(1), changed.count(-1)]  # gained, lost
    return found


def format_table(found):
    """The evaluations as Markdown"""
    lines = ["| model | steps | questions | strict, % | lenient, % | all tags, % | tokens |"]
    lines += ["|---" * 7 + "|"]
    for name, row in found.items():
        model = row["label"] if "1.5B" in name else f"0.5B, {row['label']}"
        for x in row["evaluations"]:
            low, high = 100 * x["strict_low"], 100 * x["strict_high"]
            cells = f"{100 * x['strict']:.1f} ({low:.1f} to {high:.1f}) | {100 * x['lenient']:.1f}"
            tail = f"{100 * x['format']:.1f} | {x['mean_length']:.0f}"
            lines.append(f"| {model} | {x['step']} | {x['examples']:,} | {cells} | {tail} |")
    text = "\n\nOf the 1,319 questions, strict {} gained, {} lost; lenient {} gained, {} lost.\n"
    return "\n".join(lines) + text.format(*found["b-all"]["strict"], *found["b-all"]["lenient"])


def draw(found, path):
    """Means over five steps of what the samples got, a colour for each run"""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = "reward for the answer, 0 to 2", "reward for the tags", "length of the samples, tokens"
    for axis, key, title in zip(axes, ("correctness", "format", "completion_length"), titles):
        for row in (row for row in found.values() if row["steps"]):
            y = [step[key] for step in row["steps"]]
            mean = [statistics.fmean(y[max(i - 4, 0) : i + 1]) for i in range(len(y))]
            axis.plot(range(1, len(y) + 1), mean, label=row["label"])
        axis.set(title=title, xlabel="step (mean of the last five)", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    runs = Path(sys.argv[3] if len(sys.argv) > 3 else "runs/real")
    run_all(*sys.argv[1:3], runs, sys.argv[4:])
    results = collect(runs)
    (HERE / "real_run.json").write_text(json.dumps(results, indent=0) + "\n", encoding="utf-8")
    (HERE / "real_run.md").write_text(format_table(results), encoding="utf-8")
    draw(results, HERE / "real_run.png")
