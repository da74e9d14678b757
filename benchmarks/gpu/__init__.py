"""`unicl-bench gpu`: what there is to measure on a GPU, in commands of less than nine minutes."""
