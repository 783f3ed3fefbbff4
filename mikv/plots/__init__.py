"""Figures: functions of rows and arrays. Axes in, axes out; no file is read here. Nothing is drawn on import."""

from mikv.plots.curve import curve_figure
from mikv.plots.depth import save_depth_maps
from mikv.plots.dots import dot_grid
from mikv.plots.grid import curve_grid
from mikv.plots.inside import channel_errors, importance_map, outlier_channels, tier_map
from mikv.plots.risks import risk_grid
from mikv.plots.run import save_figures

__all__ = [
    "channel_errors",
    "curve_figure",
    "curve_grid",
    "dot_grid",
    "importance_map",
    "outlier_channels",
    "risk_grid",
    "save_depth_maps",
    "save_figures",
    "tier_map",
]
