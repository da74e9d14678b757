"""How good a trained model is: one file a protocol, whose functions return results.

`zero_shot` (with the `levels` of a hierarchy), `retrieval`, and `probes` (linear probe and nearest
neighbours). They share `data`, `features` (a model on all ranks) and `report`. `inference` is a
model for use, `search` finds images, and `serving` is a page for both.
"""
