"""`unicl-bench scale`: a model of a training step on many GPUs."""
