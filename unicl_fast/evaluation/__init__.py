"""How good a trained model is: one file a protocol, whose functions return results.

`zero_shot` (with the `levels` of a hierarchy), `retrieval`, and `probes` (linear probe and nearest
neighbours, on features of `labelled` images and by the `splits` of them). They share `data` (what
may be evaluated on), `features` (a model over images and texts, on all ranks) and `report` (counts,
intervals, tables). `inference` is a model for use, and `serving` a page for it. Options, prints and
files are `tools/evaluate/`'s; the trainer, which knows no evaluation, is handed one by
`tools/pretrain.py`.
"""
