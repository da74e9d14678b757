"""`unicl-bench gpu`: everything to measure on a GPU that is lent for half an hour, in one command.

    python benchmarks/gpu --out REPORT                  # a bare checkout: no install, no DALI
    unicl-bench gpu --out REPORT --data PACKED          # an install

`run.py` runs the stages, each in a process of its own, and writes the report; `measure.py` times,
and refuses work that was not on the device; `stages.py` is what needs neither DALI nor a network
(part A), `dali_stages.py` the rest (part B). `--dry-run` runs part A on the CPU, tiny.
"""
