"""How good a trained model is: a file for each protocol, whose functions return results.

`zero_shot` (with the `levels` of a hierarchy), `retrieval`, and `probes` (linear probe and nearest
neighbours) share `data`, `features` (a model on all ranks) and `report`. `baselines` stand beside a
run's figures, and `bases` compares encoders by them. `inference` is a model for use, `search` finds
images, and `serving` is a page for both.
"""
