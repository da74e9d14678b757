"""From images and texts to a packed data set, and work on packed data sets.

`sources/` reads files of all kinds into items; `build` packs them. `verify` and `folder_check`
compare a data set with itself, `inspect`, `near_duplicates` and `page` describe it. Imports neither
torch nor a command line, so that workers start at once.
"""
