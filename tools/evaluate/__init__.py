"""`unicl-eval`: a file for each command, with its options, its run, and what it prints and writes.

`registry` lists them, `command` has their bases. All else is `unicl_fast.evaluation`'s.
"""
