"""Addresses that rewards call, and whether the user has allowed them: a workflow alone never chooses a host."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from . import settings
from .errors import RunError
from .workflow.host import host

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<host>\[[0-9a-f:.%]+\]|[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?)\.?(:(?P<port>\d{1,5}))?", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """A host as it is named, in lower case and without brackets, and a port; None is any."""

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """Reads HOST or HOST:PORT, of IPv6 [ADDRESS] or [ADDRESS]:PORT. Raises `ValueError`, in words, for anything else."""
        found = _HOST.fullmatch(text)
        port = int(found["port"]) if found and found["port"] else None
        if found is None or port is not None and not 0 < port < 65536:
            raise ValueError(f"found {text!r}, accepted: HOST or HOST:PORT, such as gpu-box:8190")
        return cls(found["host"].strip("[]").lower(), port)

    def covers(self, other: Place) -> bool:
        return self.host == other.host and self.port in (None, other.port)

    def __str__(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True)
class Address:
    """An http or https URL, taken apart. path: with its query, as it is sent."""

    scheme: str
    place: Place
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises `RunError`, one line, for what is not an http or https URL; one with a user's name in it is none either."""
        wrong = RunError(f'input "address": found {text!r}, accepted: http://HOST:PORT/… or https://HOST/…')
        try:
            parts = urlsplit(text)
        except ValueError:
            raise wrong from None
        if parts.scheme not in _PORTS or re.search(r"[\s\x00-\x1f\\]", text) or parts.fragment:
            raise wrong
        try:
            place = Place.parse(parts.netloc)
        except ValueError:
            raise wrong from None
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else "")
        return cls(parts.scheme, Place(place.host, place.port or _PORTS[parts.scheme]), path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}{self.path}"


def problem(text: str) -> str | None:
    """Why this address is not called, in one line; None where the user has allowed it."""
    try:
        check(Address.parse(text))
    except RunError as error:
        return str(error)
    return None


def check(address: Address) -> None:
    """Raises `RunError`, one line, where neither the command line nor the user's settings allow the address's host."""
    if not any(place.covers(address.place) for place in _places((*host().allowed_hosts, *settings.read().allowed_hosts))):
        raise RunError(f'input "address": found the host {address.place}, which the user has not allowed (a workflow alone does not choose '
                       f'which hosts are called); accepted: one given as "--allow-host {address.place}" to dancegrpo run, or in the '
                       f'list "allowed_hosts" of {settings.path()}')


def api_key(address: Address) -> str | None:
    """The user's key for the address's host, of its port where there are several; None where there is none."""
    keys = settings.read().api_keys
    fitting = [(place.port is not None, keys[text]) for text, place in zip(keys, _places(keys)) if place.covers(address.place)]
    return max(fitting)[1] if fitting else None


def _places(texts: Iterable[str]) -> list[Place]:
    try:
        return [Place.parse(text) for text in texts]
    except ValueError as error:
        raise RunError(f"the settings {settings.path()}: a host: {error}") from None
