"""Ranks: how they start, find each other, stop together, and how one that hangs is noticed."""
