"""Tandem: DPO from raw preference pairs to a judged model."""

__version__ = "0.1.0"
