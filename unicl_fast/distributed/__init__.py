"""Ranks: how they start, meet, exchange tensors, stop together, and how a hung one is found.

`launch` starts them, `ranks` brings them together and has the collectives, `signals` the exit codes
and what a signal does, `watchdog` ends a rank that hangs. Knows no model and no loss.
"""
