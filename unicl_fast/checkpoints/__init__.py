"""A run's state on disk: written while training continues, checked, loaded, exported.

`files` knows folders and tensors by name, `load` gives models, `state` saves and restores a run,
`writer` decides when. Other formats are `unicl_fast.conversion`'s.
"""
