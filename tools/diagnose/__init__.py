"""`unicl-bench run`: what limits a user's run, and what to do about it."""
