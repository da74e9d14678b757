"""The training objectives: TargetM (`targets.py`), the loss (`loss.py`), mixup.

Knows no ranks, no model and no optimizer: the training step puts these functions together.
"""
