"""Stages on packing: a build against a bare loop, and builds of very many samples."""
