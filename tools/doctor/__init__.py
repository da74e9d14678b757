"""`unicl-doctor`: what of this machine would stop or slow down the other programs.

`packages.py` has the checks of Python and what is installed, `machine.py` those of devices, cores,
memory, limits and networks, `storage.py` those of folders and disks. `rows.py` runs them so that
none can end the program.
"""
