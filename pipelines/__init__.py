"""The DALI room: from (seed, step) to a `Batch`.

`loader.py` is the table of contents: `plan/` decides which samples and which random numbers,
`feed/` prepares their bytes and texts on the host, `graph.py` decodes and augments them with DALI,
`kernels/` holds the pixel work in Numba. Models, losses and trainers are not known here.
"""
