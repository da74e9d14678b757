"""Packed data sets under a URL: the store, the bounded cache on disk, ranges of files."""
