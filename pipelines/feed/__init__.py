"""From a plan to what DALI takes: bytes, token rows, substitutes for bad samples."""
