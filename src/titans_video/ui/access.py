"""Who may use the page: a browser that has the token. Every user of this machine can reach 127.0.0.1.

A page of another site must not act through the user's browser. So requests must name this server in their Host header
(or a foreign name could be pointed at 127.0.0.1), and changes need a header that other sites cannot send.
"""

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-titans-video"
"""Header of every request that changes something. Browsers do not let another site's page set it."""

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
FORBIDDEN = "Open the address that `titans-video ui` printed: it has a token."


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Answer only requests with the token, and keep the page from loading anything from elsewhere.

    Args:
        token: in the address of the first visit, then in a cookie.
        port: names the cookie; browsers send the cookies of one port to all ports.
        local: whether the server only listens on a loopback address.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, *, local: bool) -> None:
        self.app, self.token, self.cookie, self.local = app, token, f"titans-video-{port}", local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                extra = {b"content-security-policy": POLICY.encode(), b"x-content-type-options": b"nosniff"}
                extra |= {b"referrer-policy": b"no-referrer"}
                message["headers"] = [*message["headers"], *((k, v) for k, v in extra.items() if k not in names)]
            await send(message)

        await self.app(scope, receive, with_policy)

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that must not reach the page."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local and not is_loopback(_name(host)):
            return PlainTextResponse("This server only answers on 127.0.0.1 and localhost.", 403)
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None and hmac.compare_digest(given.encode(), self.token.encode()):
            answer: Response = RedirectResponse(scope["path"] or "/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", max_age=30 * 86400)
            return answer
        if not hmac.compare_digest(self._cookie(headers).encode(), self.token.encode()):
            return PlainTextResponse(FORBIDDEN, 403)
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if scope["method"] not in ("GET", "HEAD") and (foreign or headers.get(HEADER) is None):
            return PlainTextResponse("This request does not come from the page.", 403)
        return None

    def _cookie(self, headers: Headers) -> str:
        cookies = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return ""
        found = cookies.get(self.cookie)
        return found.value if found else ""


def _name(host: str) -> str:
    """Return a Host header without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
