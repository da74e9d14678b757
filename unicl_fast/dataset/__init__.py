"""The packed format: writing it, reading it, checking it, from disk or from object stores."""
