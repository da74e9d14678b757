"""Cores, memory, files, checksums, kernels, random numbers, progress, wording: for any program.

Knows nothing about images, texts or training, and importing it does not import torch.
"""
