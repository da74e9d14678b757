"""The loss, the target map, the text encoder, whole steps and their parts, checkpoints, memory."""
