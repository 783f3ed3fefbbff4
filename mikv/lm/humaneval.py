"""HumanEval with generated code run in this project's confinement.

lm-eval's own configuration downloads its metric from the hub and runs the code with that metric's guard, which says of
itself that it is no sandbox. Prompt, stop sequences and score are lm-eval's (humaneval, version 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mikv.tasks.sandbox import run_program


def pass_at_1(doc: Mapping[str, Any], results: Sequence[Sequence[str] | str]) -> dict[str, float]:
    """Share of a document's completions whose program passes its tests."""
    completions = [results[0]] if isinstance(results[0], str) else results[0]
    tests = f"{doc['test']}\ncheck({doc['entry_point']})"
    passed = [run_program(f"{doc['prompt']}{completion}\n{tests}").passed for completion in completions]
    return {"pass@1": sum(passed) / len(passed)}


HUMANEVAL: dict[str, Any] = {
    "task": "humaneval",
    "dataset_path": "openai/openai_humaneval",
    "unsafe_code": True,
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "process_results": pass_at_1,
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "repeats": 1,
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
