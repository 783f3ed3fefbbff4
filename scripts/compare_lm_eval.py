"""With the full cache, are our scores those of plain lm-eval, sample by sample?

python scripts/compare_lm_eval.py --data ../shared/data                    # smollm2-135m on mmlu, gsm8k and truthfulqa
python scripts/compare_lm_eval.py --data FOLDER --tasks mmlu --limit 20

FOLDER holds mmlu/, gsm8k/ and truthfulqa/ as README's "Data without the hub" lists them. Exits with 1 where a choice or a
text differs. Log-likelihoods differ by rounding: a float32 model's full cache holds 16 bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mikv.config import compose
from mikv.lm import Harness
from mikv.lm.plain import evaluate_plain, plain_lm
from mikv.models.load import load
from mikv.records import read_rows
from mikv.runner import execute

TASKS = {
    "mmlu": ["task.only=[anatomy,astronomy,high_school_world_history]", "task.limit=10"],
    "gsm8k": ["task.limit=10"],
    "truthfulqa": ["task.limit=20"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/, gsm8k/, truthfulqa/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, help="documents of each task; default: 10 to 20")
    args = parser.parse_args()
    differing = sum(compare(name, args.model, args.data, args.limit) for name in args.tasks)
    sys.exit(differing > 0)


def compare(name: str, model: str, data: Path, limit: int | None) -> int:
    """Print how far the two are apart. Returns the number of documents that differ in a choice or a text."""
    overrides = [*TASKS[name], *([f"task.limit={limit}"] if limit else [])]
    with tempfile.TemporaryDirectory() as out:
        run = compose(
            "policy=full", f"model={model}", f"task={name}", f"task.data_dir={data / name}", f"out={out}", "seed=1", *overrides
        )
        assert isinstance(run.task, Harness)
        (summary,) = execute(run)
        ours = {(row["subtask"], row["doc_id"]): row for row in read_rows(run.folder() / "samples.jsonl")}
    lm = plain_lm(load(run.model, attention="sdpa"), run.batch_size)
    results, theirs = evaluate_plain(lm, run.task, run.model, run.limit, run.seed)
    assert ours.keys() == theirs.keys()
    differing, gaps, tokens = 0, [0.0], 0
    for place, row in ours.items():
        plain = theirs[place]
        if "replies" in row:  # log-likelihoods
            pairs = list(zip(row["replies"], plain["replies"], strict=True))
            gaps += [abs(mine[0][0] - reference[0][0]) for mine, reference in pairs]
            best = [max(range(len(pairs)), key=lambda i, side=side: pairs[i][side][0][0]) for side in (0, 1)]  # type: ignore[misc]
            same = best[0] == best[1]
            what = f"choice {best[0]} here, {best[1]} there"
        else:
            same, what = (
                row["answer"] == plain["replies"][0][0],
                f"{row['answer']!r} here,\n    {plain['replies'][0][0]!r} there",
            )
            tokens += row["answer_tokens"]
        if not same:
            differing += 1
            print(f"  {place[0]} {place[1]}: {what}")
    print(f"\n{name}: {len(ours)} documents, {differing} differ in a choice or a text")
    if tokens:
        print(f"  {tokens} tokens generated")
    else:
        print(f"  log-likelihoods differ by at most {max(gaps):.2g}, on average {sum(gaps[1:]) / max(1, len(gaps) - 1):.2g}")
    for task, metrics in summary["by_task"].items():
        print_metrics(task, metrics, results.get(task, {}))
    return differing


def print_metrics(task: str, ours: dict[str, Any], theirs: Any) -> None:
    for key, value in ours.items():
        if isinstance(value, float) and "stderr" not in key and key in theirs:
            print(f"  {task} {key}: {value:.4f} here, {theirs[key]:.4f} plain lm-eval")


if __name__ == "__main__":
    main()
