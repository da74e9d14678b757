"""`unicl-bench gpu`: everything to measure on a GPU that is lent for half an hour, in one command.

    python benchmarks/gpu --out REPORT                  # a bare checkout: no install, no DALI
    unicl-bench gpu --out REPORT --data PACKED          # an install

`--dry-run` runs part A (stages.py) on the CPU, tiny. Part B (dali_stages.py) needs DALI and data.
"""
