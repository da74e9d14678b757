"""`unicl-bench loss`: the parts of a training step other than the image encoder."""
