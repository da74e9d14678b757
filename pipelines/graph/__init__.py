"""The DALI graph: one definition for CPU and GPU; nothing in it is random."""
