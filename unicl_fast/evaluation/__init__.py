"""How good a trained model is: one file a protocol.

`requests` holds the commands of `unicl-eval`; each is run by the file of its protocol: `zero_shot`,
`retrieval`, `linear_probe`, `knn`, `finetune`, and `detection` with its data in `coco`. They share
`data` (what may be evaluated on), `encode` (a model over the images of a data set, on all ranks),
`features` (those of labelled images, kept in a folder) and `report` (counts, intervals, tables,
figures). Reading arguments and starting ranks is `tools/evaluate.py`'s work; the trainer, which
knows no evaluation, is handed `zero_shot.evaluate_zero_shot` by `tools/pretrain.py`.
"""
