"""Tandem: DPO from raw preference pairs to a judged model."""

import os

# All environment variables that Tandem sets for its whole process. Other packages read them once, when they are
# imported or first take memory, so they are set here, before any of those is imported. What the user has set stays.
for _names, _value in (
    # Intel's plugin, which torch loads: eager mode, unless the user asks for lazy mode (1)
    (("PT_HPU_LAZY_MODE",), "0"),
    # torch, at its first tensor: tensors of 2 MiB and more on the CPU begin at a page, which leaves fewer holes in
    # glibc's heap (bench/RESULTS.md)
    (("THP_MEM_ALLOC_ENABLE",), "1"),
    # libgomp, which torch brings on Linux, when torch is imported: by default a waiting thread spins 300,000 times
    # before it sleeps, milliseconds of a core that other processes could use (bench/RESULTS.md)
    (("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), "1000"),
    # torch, when it first uses a GPU: memory in segments that can grow. Every micro-batch has another shape, and a
    # block of fixed size that one leaves free rarely fits the next
    (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"), "expandable_segments:True"),
    # huggingface_hub: by default TRL reports each run to a server
    (("HF_HUB_DISABLE_TELEMETRY",), "1"),
    # vLLM: nothing is reported to anybody, and the progress bar is not buried in its log
    (("VLLM_NO_USAGE_STATS",), "1"),
    (("VLLM_LOGGING_LEVEL",), "WARNING"),
):
    if not os.environ.keys() & set(_names):
        os.environ[_names[0]] = _value

__version__ = "0.1.0"
