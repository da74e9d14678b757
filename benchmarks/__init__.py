"""`unicl-bench`: how fast each part is, beside what one would take instead. See README.md here."""
