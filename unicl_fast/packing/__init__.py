"""From images and texts as people have them to a packed data set, and what is done with one.

`sources` reads what there is, `build` packs it, `verify` and `inspect` look at the result. Imports
neither torch nor a command line, so that workers start at once.
"""
