"""A run (`run.py`), its loop (`trainer.py`) and step (`step.py`), its measurements and reports.

Takes any `Loader` of batches; knows no DALI and no command line.
"""
