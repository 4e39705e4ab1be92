"""Errors that a user can cause and fix. Any other exception is a bug in this package."""


class UserError(Exception):
    """Base class. The command line prints the message without a traceback."""


class ConfigError(UserError):
    """The configuration is invalid. Raised before any GPU is used."""


class CheckpointError(UserError):
    """A checkpoint or model folder is missing, damaged, or of another kind than expected."""


class DataError(UserError):
    """Text or tokens that the run cannot use."""


class JobError(UserError):
    """Training cannot continue: a rank is lost, or losses are not finite."""


class DiskError(UserError):
    """A disk is full, read-only, over its quota, or fails."""


def nearest_multiples(value: int, unit: int) -> str:
    """Return the multiples of ``unit`` below and above ``value``."""
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
