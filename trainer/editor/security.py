"""Who may ask: the token, the host that the browser thinks it talks to, and the page that asks; and what every answer says.

Without a token the editor listens on this machine alone, and a page from elsewhere must not reach it through the user's browser:
a name that points here by DNS fails by its Host, a page of another origin by its Origin or Sec-Fetch-Site.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from comfy_dancegrpo.errors import WorkflowError

from .files import Refused

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "same-origin",
            "X-Frame-Options": "SAMEORIGIN"}


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


class Gate:
    """Lets requests in. `token` is None where none is asked for, on a loopback `address` alone."""

    def __init__(self, address: str, token: str | None):
        self._hosts = {"localhost", "127.0.0.1", "::1", address.lower()}
        self._token = token

    @property
    def token(self) -> str | None:
        return self._token

    def check(self, request: web.Request) -> None:
        """Raises `Refused`: 401 without the token, 403 for a wrong Host or another origin."""
        if self._token is None:
            if _hostname(request) not in self._hosts:
                raise Refused(403, f"found the host {request.headers.get(hdrs.HOST, '')!r}, accepted: {', '.join(sorted(self._hosts))}")
        elif not self._authorised(request):
            raise Refused(401, "a token is asked for: open the URL that was printed, or send 'Authorization: token …'")
        if _from_elsewhere(request):
            raise Refused(403, "requests from pages of another origin are not accepted")

    def _authorised(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        offered = [given.strip() if scheme.lower() in ("token", "bearer") else "", request.query.get("token", "")]
        return any(_same(one, self._token) for one in offered) or _same(request.cookies.get(_cookie_name(request), ""), self._cookie)

    @property
    def _cookie(self) -> str:
        """Not the token itself: a browser sends a host's cookies to every port of it."""
        return hmac.new((self._token or "").encode(), b"dancegrpo editor", hashlib.sha256).hexdigest()

    def _remember(self, request: web.Request, response: web.StreamResponse) -> None:
        """Gives the browser that came with the token a cookie in its place."""
        if self._token is not None and not response.prepared and _same(request.query.get("token", ""), self._token):
            response.set_cookie(_cookie_name(request), self._cookie, httponly=True, samesite="Strict", path="/", secure=request.secure)

    @web.middleware
    async def middleware(self, request: web.Request, handler) -> web.StreamResponse:
        """Checks, and answers whatever was refused with its one line."""
        try:
            self.check(request)
            response = await handler(request)
            self._remember(request, response)
            return response
        except Refused as refused:
            return web.json_response({"error": {"type": "refused", "message": str(refused), "details": "", "extra_info": {}}, "node_errors": {}},
                                     status=refused.status)
        except WorkflowError as error:
            return web.json_response({"error": {"type": "refused", "message": str(error), "details": "", "extra_info": {}}, "node_errors": {}},
                                     status=400)

    @staticmethod
    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        """aiohttp's on_response_prepare: what every answer says."""
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)


def _same(offered: str, wanted: str) -> bool:
    return hmac.compare_digest(offered.encode(), wanted.encode())


def _cookie_name(request: web.Request) -> str:
    port = urlsplit(f"//{request.headers.get(hdrs.HOST, '')}").netloc.rpartition(":")[2]
    return f"dancegrpo_{port}" if port.isdigit() else "dancegrpo"


def _hostname(request: web.Request) -> str | None:
    try:
        return urlsplit(f"//{request.headers.get(hdrs.HOST, '')}").hostname
    except ValueError:
        return None


def _from_elsewhere(request: web.Request) -> bool:
    """Whether a page of another origin asks, and for more than to be opened."""
    site, mode = request.headers.get("Sec-Fetch-Site"), request.headers.get("Sec-Fetch-Mode")
    opened = request.method in (hdrs.METH_GET, hdrs.METH_HEAD) and mode == "navigate"
    if site not in (None, "same-origin", "none") and not opened:
        return True
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or opened:
        return False
    try:
        return urlsplit(origin).netloc.lower() != request.headers.get(hdrs.HOST, "").lower()
    except ValueError:
        return True
