"""From items to shards: each image decoded once, in a process it may crash; then written."""
