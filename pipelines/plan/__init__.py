"""A step as a pure function of (data, seed, step): samples, texts, crops, augmentation.

It imports no DALI, and is in this room because its numbers are the inputs of DALI's graphs and of
the kernels here: their layout (windows, augmentation rows) changes on both sides at once.
"""
