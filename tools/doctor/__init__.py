"""`unicl-doctor`: finds faults of this machine that would stop or slow down the other programs.

`software.py` checks installed packages, `machine.py` cores, threads and disks. `rows.py` runs the
checks so that none can end the program. (`pip check` compares versions, and
`python -m torch.utils.collect_env` prints them for a bug report.)
"""
