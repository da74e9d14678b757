"""A run (`run.py`), its loop (`trainer.py`) and step (`step.py`), and what a run measures and reports.

Takes any `Loader` of batches; knows no DALI and no command line.
"""
