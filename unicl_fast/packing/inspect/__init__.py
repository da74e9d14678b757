"""Describes a packed data set: counts, classes, captions, near duplicates, a page to look at."""
