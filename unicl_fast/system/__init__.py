"""Cores, memory, files, checksums, kernels, random numbers, progress, wording: any program's needs.

Knows nothing of images, texts or training. Importing it imports no torch.
"""
