"""How good a trained model is: a file for each protocol; its data, ranks and report."""
