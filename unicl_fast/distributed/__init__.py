"""Ranks: how they start, meet, exchange tensors, stop together, and how a hung one is found."""
