"""A run's state on disk: written while training continues, checked, loaded, exported.

`files` writes, lists and removes checkpoint folders, `writer` does so in a thread, `state` collects
and restores a run's tensors, `load` checks checkpoints and builds models from them, `export` reads
models without a run, `hub` downloads and uploads them, `average` mixes two models' weights. Other
formats are in `unicl_fast.conversion`.
"""
