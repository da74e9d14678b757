"""`unicl-bench resume`: what loaders lose and double that are killed and resumed."""
