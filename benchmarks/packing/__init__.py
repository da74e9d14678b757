"""Packing and tokenizing rates, and builds of very many samples."""
