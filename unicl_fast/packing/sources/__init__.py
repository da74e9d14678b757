"""Readers of the data that people have: from a folder, an archive or a list to items to pack.

`read_sources` decides what a path is. Items wait in the `spool` until they are packed; `entries`
say where their images lie.
"""
