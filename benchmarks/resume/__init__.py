"""`unicl-bench resume`: loaders that are killed and resumed, and the samples they lose or double."""
