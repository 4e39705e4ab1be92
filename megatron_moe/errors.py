"""Errors a user can cause and fix. Anything else that is raised is a bug of ours."""


class UserError(Exception):
    """Base class: the command line prints the message without a traceback."""


class ConfigError(UserError):
    """The configuration asks for something impossible, before any GPU is touched."""


class CheckpointError(UserError):
    """A checkpoint on disk is not what its config promises."""


class DataError(UserError):
    """Text or tokens that cannot be what the run needs."""


class JobError(UserError):
    """Training cannot go on, whatever the configuration: a lost rank, a loss that is no number."""


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` below and above ``value``."""
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
