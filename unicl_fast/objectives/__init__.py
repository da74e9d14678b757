"""The training objectives: TargetM (`targets.py`), the loss (`loss.py`)."""
