"""An error that the command line reports in one message instead of a traceback."""


class ClusterError(Exception):
    """A step failed; the message has the finding and the remedy."""
