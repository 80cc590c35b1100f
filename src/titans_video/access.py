"""Who may use a page of this machine: a browser that has the token. Every user of the machine can reach 127.0.0.1.

A page of another site must not act through the user's browser. So requests must name this server in their Host header
(or a foreign name could be pointed at 127.0.0.1), and changes must not come from another origin.
"""

import hmac
import ipaddress
import logging
import secrets
import threading
import time
from urllib.parse import urlsplit

CODE_SECONDS = 60.0
"""Seconds in which a browser that is opened must ask for the page."""

logger = logging.getLogger(__name__)


class Access:
    """The rules for the requests to a page.

    Args:
        token: a new one if it is missing.
        local: whether the server only listens on a loopback address.
    """

    def __init__(self, token: str | None = None, *, local: bool = True) -> None:
        self.token, self.local = token or secrets.token_urlsafe(24), local
        self._code, self._until, self._is_used = "", 0.0, False
        self._lock = threading.Lock()

    def names_server(self, host: str | None) -> bool:
        """Whether a Host header may be one of this server."""
        return not self.local or is_loopback(_name(host or ""))

    def has_token(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def is_foreign(self, origin: str | None, host: str | None) -> bool:
        """Whether an Origin header is of another page than this server's."""
        return origin is not None and urlsplit(origin).netloc != host

    def new_code(self) -> str:
        """Return a code that stands for the token once, for the address with which a browser is started.

        The command lines of all processes are readable for every user of a machine, so the token must not be in one.
        """
        with self._lock:
            self._code, self._until, self._is_used = secrets.token_urlsafe(24), time.monotonic() + CODE_SECONDS, False
            return self._code

    def take_code(self, given: str | None) -> bool:
        """Whether this is the code, in time and for the first time. A second time is reported."""
        with self._lock:
            if given is None or not self._code or not hmac.compare_digest(given.encode(), self._code.encode()):
                return False
            if self._is_used:
                logger.warning(
                    "The address that opened the browser was used twice. If you do not see the page, another user of "
                    "this machine may have it: end the command and start it again."
                )
            is_good = not self._is_used and time.monotonic() < self._until
            self._is_used = True
            return is_good


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """Return a Host header without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
