"""Readers of existing data: from a folder, an archive or a list to items to pack.

`read_sources` lists the kinds of sources, each a file with a `KIND`. Items wait in the `spool`
until they are packed; `entries` locate their images.
"""
