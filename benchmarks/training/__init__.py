"""Stages on training: texts, the loss, whole steps and their parts and checkpoints."""
