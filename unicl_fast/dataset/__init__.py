"""The packed format: writing, reading and checking it, from disk or object stores."""
