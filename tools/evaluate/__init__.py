"""`unicl-eval`: its options, what it prints, and the files that it writes.

`options` has the commands; `protocols` runs those that evaluate a model, with the `figures` that
they draw, and `using` those that use one. All else is `unicl_fast.evaluation`'s.
"""
