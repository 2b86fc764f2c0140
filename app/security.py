"""What a page elsewhere on the web, or another machine, may not do with the dashboard.

The dashboard is for one person on one machine. It answers on the loopback interface only, to requests that name it by
a loopback host (this stops DNS rebinding) and that come from its own pages (this stops cross-site requests). To serve
any other interface a token is required: it is given once in the address, checked in constant time, and then kept in a
cookie that no other site can send.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, abort, redirect, request

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
LARGEST_REQUEST = 2 * 2**20
COOKIE = "workbench_token"
TOKEN_FORM = re.compile(r"[A-Za-z0-9_-]{16,256}")
HOST_HEADER = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
DATA_PATHS = ("/img/", "/value/", "/export/")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_host_and_token(host: str, token: str | None) -> None:
    """Raise ValueError when `host` would serve other machines without a good token, or when the token is malformed."""
    if token is not None and not TOKEN_FORM.fullmatch(token):
        raise ValueError("a token is 16 to 256 letters, digits, - or _; make one with: python -c 'import secrets; "
                         "print(secrets.token_urlsafe())'")  # fmt: skip
    if not is_loopback(host) and token is None:
        raise ValueError(f"host {host!r} can be reached from other machines: give a token too, or serve 127.0.0.1")


def host_is_allowed(header: str, allowed: Sequence[str]) -> bool:
    """Whether the Host header names one of the allowed hosts; its port does not matter.

    (Flask's own TRUSTED_HOSTS cuts every name at its first colon, and so never accepts an IPv6 address.)
    """
    found = HOST_HEADER.fullmatch(header)
    return found is not None and found[1].lower() in {host.lower() for host in allowed}


def protect(server: Flask, *, token: str | None, allowed_hosts: Sequence[str], script_hashes: Sequence[str]) -> None:
    """Add the checks and headers to the server. `script_hashes` are the CSP hashes of the page's own inline scripts."""
    server.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
    policy = "; ".join([
        "default-src 'self'",
        "script-src 'self' " + " ".join(script_hashes),
        "style-src 'self' 'unsafe-inline'",  # plotly and mantine set style attributes and insert style elements
        "img-src 'self' data: blob:",  # blob: and data: are the figures that the reader exports
        "font-src 'self'", "connect-src 'self'", "object-src 'none'", "base-uri 'none'", "form-action 'self'",
        "frame-ancestors 'none'",
    ])  # fmt: skip

    @server.before_request
    def check_request() -> Any:
        if not host_is_allowed(request.headers.get("Host", ""), allowed_hosts):
            abort(400, "this server does not answer to that host name")
        if request.method not in _SAFE_METHODS or request.path.startswith(DATA_PATHS):
            _check_same_origin()
        if token is not None:
            return _check_token(token)
        return None

    @server.after_request
    def add_headers(response: Response) -> Response:
        response.headers.setdefault("Content-Security-Policy", policy)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        return response


def _check_same_origin() -> None:
    """Refuse (403) what another site sent. A browser cannot leave out or forge these two headers."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        abort(403, "this address answers only the dashboard's own pages")
    origin = request.headers.get("Origin")
    if origin is not None:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or parts.netloc != request.host:
            abort(403, "this address answers only the dashboard's own pages")


def _check_token(token: str) -> Any:
    given = request.args.get("token")
    if given is not None and request.method == "GET" and _same(given, token):
        # The token leaves the address bar at once, so that it is not shared with a permalink.
        parts = request.query_string.decode("latin-1").split("&")
        rest = "&".join(part for part in parts if not part.startswith("token="))
        answer = redirect("/" + request.path.lstrip("/") + (f"?{rest}" if rest else ""))
        answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict", secure=request.is_secure)
        return answer
    if not _same(request.cookies.get(COOKIE, ""), token):
        abort(401, "open the address with its token once: …/?token=…")
    return None


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
