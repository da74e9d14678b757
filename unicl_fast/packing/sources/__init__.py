"""Readers of the data that people have: from a folder, an archive or a list to items to pack.

`read_sources` decides what a path is, and reads class folders; `image_folders` those whose texts
lie next to the images. `lists`, `tables`, `tars`, `coco`, `karpathy` and `packed` read one
family of formats each, by `rows` where these have columns; `trees` finds files in folders and zips.
All of them give `items`, with `entries` that say where the images lie. They wait in the `spool`
until they are packed. Images are decoded elsewhere (`workers`).
"""
