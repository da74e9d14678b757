"""A model of a training step on many GPUs (`unicl-bench scale`), and its check on slow links.

model.py has the collectives of a step, their bytes, and the clock of computing and sending;
run.py the stage; check.py real ranks on throttled links.
"""
