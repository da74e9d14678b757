"""From images and texts as people have them to a packed data set, and what is done with one.

`sources/` reads files of all kinds into items; `build` packs them. `verify` and `folder_check`
compare a data set with itself, `inspect`, `near_duplicates` and `page` describe it. Imports neither
torch nor a command line, so that workers start at once.
"""
