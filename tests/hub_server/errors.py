"""What the server refuses, in the form in which the client recognises it."""


class HubError(Exception):
    """
    Answered as `status` with the message as JSON. The client chooses its exception class by the header
    X-Error-Code, here `code`, not by the status.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code
