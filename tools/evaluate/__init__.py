"""`unicl-eval`: a file for each command; `registry` lists them, `command` has their bases."""
