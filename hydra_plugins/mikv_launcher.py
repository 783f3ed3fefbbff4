"""Hydra finds launchers in this namespace package only. All that this one does is in mikv.sweep.

Hydra imports it at every start, so it imports nothing else of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class MikvLauncher(Launcher):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from mikv.sweep.launch import refuse

        refuse(config)  # Hydra writes multirun.yaml next
        self._setting: tuple[Any, Any, DictConfig] = (hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:  # noqa: ARG002
        from mikv.sweep.launch import launch

        launch(*self._setting, job_overrides)
        return []  # outcomes are in the sweep's folder: most jobs have not even begun
