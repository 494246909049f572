"""Kernels in Triton for GPUs, each beside the plain-torch twin that defines it; tensors on the CPU go to the twin.

Nothing here is imported where there is no Triton: `infopt.runtime.graph_step` says so instead.
"""
