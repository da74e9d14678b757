"""Reads a packed data set byte by byte and says what is damaged."""
