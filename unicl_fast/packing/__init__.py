"""From images and texts as people have them to a packed data set, and what is done with one.

`sources/` reads files of all kinds into items. `build` packs them (`samples`, `workers`,
`ray_engine`, `work_folder`), also from URLs (`staging`) and to URLs (`upload`). `verify` and
`folder_check` compare a data set with itself, `inspect`, `near_duplicates` and `page` describe it;
`quarantine` reads lists of what was left out. The packed format itself is `unicl_fast.dataset`'s,
decoding and encoding `unicl_fast.images`'s.

Imports neither torch nor a command line, so that workers start at once.
"""
