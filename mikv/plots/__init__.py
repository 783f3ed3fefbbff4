"""Figures: functions of rows and arrays. Axes in, axes out; no file is read here. Nothing is drawn on import."""

from mikv.plots.curve import curve, save_curve, save_depth_maps, save_risks
from mikv.plots.grid import curve_grid

__all__ = ["curve", "curve_grid", "save_curve", "save_depth_maps", "save_risks"]
