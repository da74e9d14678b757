"""Errors of packed data that several rooms raise and catch."""

from __future__ import annotations


class TooManyBadSamplesError(RuntimeError):
    """Too much of the data is bad for the run to mean what was asked for."""
