"""Pixels and JPEG bytes: loops in Numba, and the operators that bring them into a graph."""
