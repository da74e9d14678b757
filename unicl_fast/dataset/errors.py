"""Errors of packed data that several rooms raise and catch."""

from __future__ import annotations


class DamagedSampleError(ValueError):
    """The bytes of one sample are missing or differ from those packed; the message names it."""


class DamagedDatasetError(RuntimeError):
    """A data set was changed under a running job, beyond what the job can recover from."""


class TooManyBadSamplesError(RuntimeError):
    """Too much of the data is bad for the run to mean what was asked for."""
