"""Cores, memory, files, checksums, kernels, random numbers: what any program needs.

Knows nothing of images, texts or training. Imports neither torch nor DALI, but for `keyed_random`
on tensors and `host_buffers`.
"""
