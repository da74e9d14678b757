"""The DALI room: from (seed, step) to a `Batch`.

`plan/` decides which samples and which random numbers, `feed/` prepares their bytes and texts on
the host, `graph.py` decodes and augments them with DALI, `kernels/` holds the pixel work in Numba,
and `loader.py` puts batches together. Models, losses and trainers are not known here.
"""
