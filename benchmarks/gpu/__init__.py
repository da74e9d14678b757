"""`unicl-bench gpu`: everything to measure on a GPU that is lent for half an hour."""
