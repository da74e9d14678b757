"""`unicl-pack`, a file for each of its commands."""
