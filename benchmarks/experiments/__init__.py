"""The paper's comparisons, at a size that two CPU cores can train.

    python -m unicl_fast.benchmarks.experiments --help              # all of them
    python -m unicl_fast.benchmarks.experiments objectives          # Table 2: CE, SupCon, UniCL
    python -m unicl_fast.benchmarks.experiments labels-and-captions
    python -m unicl_fast.benchmarks.experiments first-weights       # from ImageNet's weights
    python -m unicl_fast.benchmarks.experiments templates
    python -m unicl_fast.benchmarks.experiments switches            # `efficiency` on and off
    python -m unicl_fast.benchmarks.experiments full-size           # the published rows' commands

Each is a list of `unicl-pretrain` and `unicl-eval` commands, with a table and a plot of their
results (harness.py). docs/results.md explains the numbers.
"""
