"""The error of a trace that cannot be used."""


class TraceError(ValueError):
    """A trace that cannot be used; the message names the line and what is wrong with it."""
