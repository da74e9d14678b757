"""The image encoders (timm's and small ones), the text encoder, and `UniCL`, which holds both.

Also how they compute: precision, compilation, activation checkpointing, the average of weights. The
loss on their features is in `unicl_fast.objectives`, their files are in `unicl_fast.checkpoints`.
"""
