"""S-IFEval: verifiable instructions, placed in the system prompt.

IFEval's prompts (Zhou et al., 2023, arXiv:2311.07911) with their instructions moved into the system message, by "A Closer Look
at System Prompt Robustness" (Mu et al., 2025, arXiv:2502.12197; evals/ifeval of normster/SystemCheck). Answers are checked by
IFEval's own checkers, which lm-eval has. The metric is strict prompt-level accuracy: all instructions of a prompt are followed
to the letter; `violation_loose` allows for a first or last line too many, and asterisks.

Deviations: the paper scores 470 of the 541 prompts, and its list of the others is not in the data; all are asked here.
langdetect draws at random; its seed is fixed, so that an answer is judged the same each time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

from mikv.tasks.base import Sample
from mikv.tasks.data import Row, Source, draw

SOURCE = Source(
    name="S-IFEval",
    file="system_prompt/sys_ifeval.jsonl",
    rows=541,
    required={"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list, "messages": list},
    origin="https://github.com/normster/SystemCheck, evals/ifeval/inputs/sys_ifeval.jsonl",
)
# Checkers that split text with NLTK's punkt: count_sentences and word_tokenize of lm_eval.tasks.ifeval.
PUNKT = "tokenizers/punkt_tab"
NEEDS_PUNKT = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})


@cache
def _checkers() -> ModuleType:
    """lm-eval's IFEval. In what it takes for the first of several processes, its import tries to download punkt, loudly."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    with patch.dict(os.environ, LOCAL_RANK="1"):
        from lm_eval.tasks.ifeval import utils
    return utils


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find(PUNKT)
    except LookupError:
        return False
    return True


@dataclass(frozen=True)
class SysIFEval:
    """Args:
    data_dir: folder with the data.
    max_new_tokens: limit of an answer in tokens.
    """

    name: ClassVar[str] = "sys_ifeval"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "strict"
    flags: ClassVar[tuple[str, ...]] = ("violation", "violation_loose")

    stored_characters: ClassVar[int | None] = None

    data_dir: str | None = None
    max_new_tokens: int = 512

    def samples(self, limit: int | None, seed: int) -> list[Sample]:
        rows = list(enumerate(SOURCE.load(self.data_dir)))
        if not _has_punkt():
            able = [(doc_id, row) for doc_id, row in rows if not NEEDS_PUNKT & set(row["instruction_id_list"])]
            print(
                f"note: {SOURCE.name}: {len(rows) - len(able)} of {len(rows)} prompts are left out: their checkers need NLTK's "
                "punkt_tab, which is not here (python -m nltk.downloader punkt_tab)"
            )
            rows = able
        return [_sample(doc_id, row) for doc_id, row in draw(rows, limit, seed, self.name)]

    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        utils = _checkers()
        asked = utils.InputExample(**sample.meta)
        strict = utils.test_instruction_following_strict(asked, answer).follow_all_instructions
        loose = utils.test_instruction_following_loose(asked, answer).follow_all_instructions
        return {"correct": strict, "violation": not strict, "violation_loose": not loose}


def _sample(doc_id: int, row: Row) -> Sample:
    meta: Mapping[str, Any] = {name: row[name] for name in ("key", "instruction_id_list", "prompt", "kwargs")}
    return Sample(
        doc_id=doc_id,
        messages=row["messages"],
        question=row["messages"][-1]["content"],
        target=", ".join(row["instruction_id_list"]),
        meta=meta,
        notes={"prompt_id": row["key"], "category": row["instruction_id_list"][0].split(":")[0]},
    )
