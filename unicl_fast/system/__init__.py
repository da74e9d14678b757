"""Cores, files, checksums, kernels, random numbers, progress, wording: what any program needs.

Knows nothing of images, texts or training. Importing it does not import torch, except by
`host_buffers`.
"""
