"""Errors raised by the public operations on bad arguments."""


class KernelInputError(ValueError):
    """An argument of an operation is outside its contract; the message names it and its value."""


class BackendError(RuntimeError):
    """A backend requested by name cannot run here."""
