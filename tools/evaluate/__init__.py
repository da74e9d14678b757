"""`unicl-eval`: a file for each command, with its options, its run, and its output.

`registry` lists them, `command` has their bases. All else is `unicl_fast.evaluation`'s.
"""
