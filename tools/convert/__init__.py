"""`unicl-convert`: its options and output."""
