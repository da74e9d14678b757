"""The loop (`trainer.py`), its step (`step.py`), and what a run measures, limits and reports.

Takes any `Loader` of batches; knows no DALI and no command line.
"""
