"""Addresses that services listen on."""

import ipaddress


def host_and_port(address: str, name: str) -> tuple[str, int]:
    """Takes `HOST:PORT` or `[HOST]:PORT` apart."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"`{name}` must look like HOST:PORT, got {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
