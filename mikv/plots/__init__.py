"""Figures: functions of rows and arrays. Axes in, axes out; no file is read here. Nothing is drawn on import."""

from mikv.plots.curve import curve_figure, save_curve, save_depth_maps
from mikv.plots.grid import curve_grid
from mikv.plots.inside import channel_errors, importance_map, outlier_channels, tier_map
from mikv.plots.risks import risk_grid

__all__ = [
    "channel_errors",
    "curve_figure",
    "curve_grid",
    "importance_map",
    "outlier_channels",
    "risk_grid",
    "save_curve",
    "save_depth_maps",
    "tier_map",
]
