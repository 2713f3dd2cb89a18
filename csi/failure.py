"""What a request is refused with. Everything below `rpc.py` raises these; only `rpc.py` knows gRPC codes."""


class Failure(Exception):
    """The root. The message is one line without secrets and without values that the request carried as secrets."""


class BadRequest(Failure):
    """A field is missing, malformed, unknown or not allowed: INVALID_ARGUMENT."""


class Unknown(Failure):
    """No such volume or publication: NOT_FOUND."""


class Conflict(Failure):
    """The same target or name with other arguments: ALREADY_EXISTS."""


class Busy(Failure):
    """Another request works on the same target: ABORTED, the caller tries again."""


class NotAllowedNow(Failure):
    """A second target of a single-node volume, a foreign mount in the way: FAILED_PRECONDITION."""


class Denied(Failure):
    """The store refused the credentials: PERMISSION_DENIED."""


class Unreachable(Failure):
    """The server or the store does not answer: UNAVAILABLE."""


class TooSlow(Failure):
    """The server did not answer in time; the work may still be done: DEADLINE_EXCEEDED."""


class Full(Failure):
    """No space, or too many requests: RESOURCE_EXHAUSTED."""


class Broken(Failure):
    """A failure of this node that nobody can mend by another request: INTERNAL."""
