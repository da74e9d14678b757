"""`unicl-convert`: its options, and what it prints."""
