"""From (seed, step) to a `Batch`; the README here draws the stages and says who owns which thread.

Models, losses and trainers are not known here.
"""
