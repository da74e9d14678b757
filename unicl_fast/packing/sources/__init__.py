"""Readers of the data that people have: from a folder, an archive or a list to items to pack.

`read_sources` decides what a path is, and reads class folders; `image_folders` those whose texts
lie beside the images. `lists`, `tables`, `tars` and `coco` read one family of formats each;
`trees` finds and reads files in folders and zips. All of them give `items`, which wait in the
`spool` until they are packed. Images are decoded elsewhere (`build`).
"""
