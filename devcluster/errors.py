"""What the command line reports in one message instead of a traceback."""


class ClusterError(Exception):
    """A step failed; the message says what was found and what to do."""
