"""How good a trained model is: one file a protocol.

`requests` holds the commands of `unicl-eval`; each is run by the file of its protocol: `zero_shot`
(with the `levels` of a hierarchy), `retrieval`, and `probes` (linear probe and nearest neighbours).
They share `data` (what may be evaluated on),
`features` (a model over images and texts, on all ranks, and what it made of labelled images, kept
in a folder) and `report` (counts, intervals, tables, figures). Reading arguments and starting ranks
is `tools/evaluate.py`'s work; the trainer, which knows no evaluation, is handed
`zero_shot.evaluate_zero_shot` by `tools/pretrain.py`.
"""
