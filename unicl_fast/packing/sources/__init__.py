"""Readers of existing data: they turn folders, archives and lists into items to pack.

`read_sources` lists the kinds of sources, each a file with a `KIND`. Items wait in the `spool`
until they are packed; `entries` locate their images.
"""
