"""A run's state on disk: written while training continues, checked, loaded, exported.

`files` knows folders and tensors by name, `load` gives models, `state` saves and restores a run,
`writer` decides when, `hub` downloads and uploads exports. Other formats are
`unicl_fast.conversion`'s.
"""
