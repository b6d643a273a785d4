"""What can go wrong between a user and a cluster: each error's message is one sentence, with what to do."""


class ClusterError(RuntimeError):
    """The cluster could not be asked, or has answered something that leaves no way to go on."""


class UnreachableError(ClusterError):
    """No answer, or one by which the API server says that it cannot answer now: the same request may succeed later."""


class MissingError(ClusterError):
    """There is no such object."""


class ForbiddenError(ClusterError):
    """The user lacks a right; the message names the RBAC rule to ask for."""


class RejectedError(ClusterError):
    """The API server does not accept the object; the message has its reasons."""
