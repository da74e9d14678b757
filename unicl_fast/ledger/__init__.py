"""The record of which sample was fed when, and the proof that none was lost or fed twice."""
