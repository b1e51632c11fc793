"""Errors raised by the public operations on bad arguments."""


class KernelInputError(ValueError):
    """An argument of an operation is outside its contract; the message names it and its value."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""
