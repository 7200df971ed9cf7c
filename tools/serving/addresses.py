"""Connections to public addresses only, so that no client makes the server fetch what only the server can reach.

A name is resolved once, every address that it has is checked, and the connection goes to one of the addresses checked: a
name server that answers differently the next time has no effect. Redirects connect in the same way.
"""

from __future__ import annotations

import ipaddress
import socket

from ...runtime.processor.image_urls import ImageError, connect_in_time
from ...runtime.shown import shown

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, long deprecated: likewise


def connect_publicly(address: tuple[str, int], timeout: float | None) -> socket.socket:
    """A connection to a host; see image_urls.Connect. Raises ImageError unless all addresses of the host are public."""

    def check(place: str) -> None:
        if not is_public(ipaddress.ip_address(place.partition("%")[0])):
            raise ImageError(
                f"the host {shown(address[0])} is refused because it does not lie on the public internet; send the image as "
                "a data: URL, or start the server with --allow-private-urls"
            )

    return connect_in_time(address, timeout, check)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet: not private, loopback, link-local, multicast, reserved or unset, nor
    an IPv6 address that stands for such an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _inner(address)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    if address in NAT64 or address in COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
