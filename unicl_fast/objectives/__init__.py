"""The training objectives: TargetM (`targets.py`), the loss (`loss.py`), mixup.

Models and optimizers are not known here: the training step puts these functions together.
"""
