"""Tandem: DPO from raw preference pairs to a judged model."""

import os

# Read when torch loads Intel's plugin, so by any stage before it imports torch: lazy mode has to be asked for
os.environ.setdefault("PT_HPU_LAZY_MODE", "0")

__version__ = "0.1.0"
