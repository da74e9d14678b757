"""`unicl-doctor`: finds what on this machine would stop or slow down the other programs.

`software.py` has the checks of what is installed, `machine.py` those of cores, threads,
memory and disks. `rows.py` runs them so that none can end the program. Versions for a bug report
come from `python -m torch.utils.collect_env`.
"""
