"""What goes wrong with a call, as its caller sees it; and how a handler refuses one."""


class RefusedError(Exception):
    """Raised by a handler to refuse a call. The caller gets the text as the error of its call, and nothing else."""


class JsonRpcError(Exception):
    """A call has not succeeded. By itself: a request that cannot be sent, or a reply that is not what was agreed."""


class RemoteError(JsonRpcError):
    """The server has answered with an error; its text is the message."""


class UnavailableError(JsonRpcError):
    """There was nobody to call, or nobody has answered: the connection broke, or the server is going."""

    def __init__(self, text: str, *, may_have_run: bool = False) -> None:
        super().__init__(text)
        self.may_have_run = may_have_run
        """Whether the request may have reached a server, so that to call again could make it run twice."""


class DeadlineExceededError(JsonRpcError):
    """The call was not answered in time. Whether it has run, or still will, is not known."""
