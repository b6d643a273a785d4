"""Errors that the command line reports in one message instead of a traceback."""


class ReleaseError(Exception):
    """A step of a release failed; the message has the finding and the remedy."""
