"""Where a web server's redirects may lead, and what of a request goes along."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from edge_agent.errors import printable

_HUB_HOSTS = ("huggingface.co", "hf.co")
_HUB_TOKEN = "Bearer hf_"  # noqa: S105  # how those begin that the hub hands out


class LessSafe(urllib.error.HTTPError):
    """A redirect that is not followed; its reason is in our words."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other web addresses, never out of TLS, with credentials only on the same server or to the
    hub, and without reading what comes along with them.
    """

    last: urllib.request.Request
    """Where they have led so far. Whoever opens an address sets it."""

    commit: str
    """That the hub named on the way: where it redirects to, none may be known. Set likewise."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,  # noqa: ARG002  # urllib passes it
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request:
        """The request that follows; raises LessSafe where none may."""
        self.commit = headers.get("X-Repo-Commit") or self.commit
        fp.close()  # urllib would read its body, which may have no end, into memory
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            reason = printable(f"redirects to {new.scheme}://{host_of(newurl)}, which is less safe")
            raise LessSafe(req.full_url, code, reason, headers, fp)
        # A user's name, which no redirect needs, http.client would take for a part of the host's.
        newurl = new._replace(netloc=host_of(newurl)).geturl()
        # What opens the proxy is added anew where the next request goes through it, too.
        headers = {name: value for name, value in req.headers.items() if name != "Proxy-authorization"}
        request = urllib.request.Request(newurl, headers=headers)  # noqa: S310  # http or https
        same_server = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        to_the_hub = new.scheme == "https" and new.hostname in _HUB_HOSTS
        authorization = req.unredirected_hdrs.get("Authorization", "")
        # Mirrors such as hf-mirror.com leave private repositories to the hub. A mirror's own token is not for it.
        if authorization and (same_server or (to_the_hub and authorization.startswith(_HUB_TOKEN))):
            request.add_unredirected_header("Authorization", authorization)
        self.last = request
        return request


def host_of(address: str) -> str:
    """Host and port, without the password that somebody may have written before them."""
    return urllib.parse.urlsplit(address).netloc.rpartition("@")[2]
