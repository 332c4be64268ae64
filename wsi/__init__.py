"""Whole-slide pathology analysis. Research use only."""

__version__ = "0.1.0"
