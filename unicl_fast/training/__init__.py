"""The loop (`trainer.py`), its step (`step.py`), and what a run measures, limits and reports.

Training takes any `Loader` of batches; it knows no DALI and no command line. The loss itself is in
`unicl_fast.objectives`, the files of a checkpoint in `unicl_fast.checkpoints`.
"""
