"""Explore, run and compare weakly supervised semantic segmentation: image tags in, pixel masks out."""

__version__ = "0.1.0"
