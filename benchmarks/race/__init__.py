"""`unicl-bench race`: accuracy by images and by CPU seconds, next to open_clip's own loop."""
