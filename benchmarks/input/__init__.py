"""Stages on the input pipeline: against other loaders, with augmentation, from URLs."""
