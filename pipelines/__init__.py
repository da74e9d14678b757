"""The DALI room: from (seed, step) to a `Batch`.

`plan/` decides which samples and which random numbers, `feed/` reads their bytes, `graph/` decodes
and augments, `kernels/` holds the loops in Numba; `loader.py` puts them together for training,
`evaluation_loader.py` for evaluation. Knows no model, loss or trainer.
"""
