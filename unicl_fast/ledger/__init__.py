"""The record of which sample was fed when, and the proof that none was lost or seen twice.

`writer` records during training, `format` is the files byte by byte, `proof` reads a run's files.
Planning a run again to compare is `tools/ledger.py`'s, since it takes the pipelines.
"""
