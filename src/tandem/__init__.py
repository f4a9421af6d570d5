"""Tandem: DPO from raw preference pairs to a judged model."""

import os

# All that Tandem sets for its whole process: what other packages read once, when they are imported or first take
# memory, so that it is set before any of them is imported. What the user has set stays.
for _names, _value in (
    # Intel's plugin, which torch loads: lazy mode has to be asked for
    (("PT_HPU_LAZY_MODE",), "0"),
    # torch, at its first tensor: tensors of 2 MiB and more on the CPU begin at a page, which leaves fewer holes in
    # glibc's heap (bench/RESULTS.md)
    (("THP_MEM_ALLOC_ENABLE",), "1"),
    # libgomp, which torch brings on Linux, when torch is imported: a thread that waits asks 300,000 times, for
    # milliseconds, before it sleeps, and takes them from whatever else runs (bench/RESULTS.md)
    (("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), "1000"),
    # torch, when it first uses a GPU: memory in segments that can grow. Every micro-batch has another shape, and blocks
    # of fixed size left from one are of no use to the next
    (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"), "expandable_segments:True"),
    # huggingface_hub: TRL counts runs on a server unless told not to
    (("HF_HUB_DISABLE_TELEMETRY",), "1"),
    # vLLM: nothing is reported to anybody, and the progress bar is not buried in its log
    (("VLLM_NO_USAGE_STATS",), "1"),
    (("VLLM_LOGGING_LEVEL",), "WARNING"),
):
    if not os.environ.keys() & set(_names):
        os.environ[_names[0]] = _value

__version__ = "0.1.0"
