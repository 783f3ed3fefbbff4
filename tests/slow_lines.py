"""A task for jobs that must last: `task._target_=slow_lines.SlowLines`, with this folder on PYTHONPATH."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from mikv.tasks.base import Sample
from mikv.tasks.lines import LineRecall

SECONDS = {3: 0.54, 4: 0.14, 5: 0.07} if os.environ.get("SLOW_LINES") != "0" else {}
"""What judging a sample takes, by task.lines; nothing with SLOW_LINES=0."""


@dataclass(frozen=True)
class SlowLines(LineRecall):
    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        time.sleep(SECONDS.get(self.lines, 0) / 2)  # of two policies each
        return super().score(sample, answer)
