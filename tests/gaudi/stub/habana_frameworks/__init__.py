"""As much of Intel's package as optimum-habana 1.21.2 touches on a CPU. It computes nothing and counts its calls.

`torch.hpu` is not defined here, so that the device stays `cpu`.
"""
