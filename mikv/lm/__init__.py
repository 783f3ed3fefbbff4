"""lm-evaluation-harness (the only package that imports it): its tasks, metrics and filters, our cache under them."""

from mikv.lm.harness import Harness as Harness
from mikv.lm.model import PanelLM as PanelLM
