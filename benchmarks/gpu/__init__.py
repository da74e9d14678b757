"""`unicl-bench gpu`: everything to measure on a GPU that is lent for half an hour, in one command.

    python benchmarks/gpu --out REPORT                  # a bare checkout: no install, no DALI
    unicl-bench gpu --out REPORT --data PACKED          # an install

Its stages are the other programs with `--device cuda`, each in a process of its own. `--dry-run`
runs them on the CPU, tiny.
"""
