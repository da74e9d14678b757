"""A run (`run.py`), its loop (`trainer.py`) and step (`step.py`), its numbers and limits.

Training takes any `Loader` of batches; it knows no DALI and no command line. The loss itself is in
`unicl_fast.objectives`, the files of a checkpoint in `unicl_fast.checkpoints`.
"""
