"""Accuracy by images and by CPU seconds, beside open_clip's own training loop (`unicl-bench race`)."""
