"""Small tasks in lm-eval's format, with rows of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

YAML = {
    "own_choice": """
task: own_choice
dataset_path: somewhere/own_choice
dataset_name: words
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
description: "Questions about words.\\n\\n"
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "own_letters": """
task: own_letters
dataset_path: somewhere/own_choice
dataset_name: words
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: "{{answer % 2}}"
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
""",
    "own_answer": """
task: own_answer
dataset_path: somewhere/own_answer
output_type: generate_until
test_split: test
training_split: train
fewshot_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
num_fewshot: 1
generation_kwargs: {until: ["e", "Q:"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]
  - name: loose
    filter: [{function: take_first}]
metadata: {version: 1.0}
""",
    "own_cloze": """
task: own_cloze
dataset_path: somewhere/own_answer
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "own_pages": """
task: own_pages
dataset_path: somewhere/own_pages
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: page
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
""",
    "own_group": """
group: own_group
task: [own_choice, own_letters]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1}
""",
    "own_bare": """
task: own_bare
dataset_path: somewhere/own_answer
output_type: loglikelihood
test_split: test
doc_to_text: ""
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "own_code": """
task: own_code
dataset_path: somewhere/own_answer
output_type: generate_until
unsafe_code: true
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "own_scored": """
task: own_scored
dataset_path: somewhere/own_answer
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function own_scores.share
generation_kwargs: {until: ["e"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "own_texts": """
task: own_texts
dataset_path: somewhere/own_texts
dataset_name: texts
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}} {{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
SCORES = """
def share(doc, results):
    return {"exact_match": 1.0}
"""
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "knoll",
    "lilac",
    "maple",
    "north",
    "ocean",
    "petal",
    "quill",
    "river",
]


def _rows(name: str, count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        some = [WORDS[(3 * i + k * (i + 1)) % len(WORDS)] for k in range(12)]
        if name == "choice":
            question = f"which of these words comes after {' and '.join(some[:6])}?"
            made.append({"question": question, "choices": [some[7], f"{some[8]} {some[9]}", some[10]], "answer": i % 3})
        elif name == "answer":
            made.append({"question": f"how many words are in {' '.join(some)}?", "answer": str(i % 10)})
        else:
            made.append({"page": ". ".join(" ".join(some[k:] + some[:k]) for k in range(2 + i))})
    return made


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(tasks: Path, data: Path) -> None:
    """Write the task YAMLs into one folder and their data into another."""
    for name, text in YAML.items():
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "own_scores.py").write_text(SCORES)
    asked = [{"context": page["page"], **row} for page in _rows("pages", 3) for row in _rows("answer", 6)]
    write(data / "texts" / "test.jsonl", asked)
    write(data / "words" / "test.jsonl", _rows("choice", 9))
    write(data / "words" / "dev.jsonl", _rows("choice", 12)[9:])
    write(data / "test.jsonl", [a | p for a, p in zip(_rows("answer", 7), _rows("pages", 7), strict=True)])
    write(data / "train.jsonl", _rows("answer", 12)[7:])
