"""Tandem: DPO from raw preference pairs to a judged model."""

import os

# Read when torch loads Intel's plugin, so by any stage before it imports torch: lazy mode has to be asked for
os.environ.setdefault("PT_HPU_LAZY_MODE", "0")
# Read when torch takes memory for its first tensor, while TRL is imported: tensors of 2 MiB and more on the CPU begin
# at a page, which leaves fewer holes in glibc's heap (bench/RESULTS.md)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
