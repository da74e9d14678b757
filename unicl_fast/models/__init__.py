"""The image encoders (timm's and small ones), the text encoder, and `UniCL`, which holds both.

Also how they compute: precision, compilation, activation checkpointing, the average of weights.
"""
