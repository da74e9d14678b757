"""What is learnt: TargetM (`targets.py`), the loss (`loss.py`), the other objectives, mixup.

Knows no ranks, no model and no optimizer: the training step puts these functions together.
"""
