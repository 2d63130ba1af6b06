"""Makes an authority and certificates for trying TLS, never for strangers: `make certs`.

Into the folder: ca.pem (the authority), server.crt and server.key for this host's names, and
client.crt and client.key for the tenant.
"""

import argparse
import os
import socket
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization


def write(file: Path, *blobs: trustme.Blob) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.writelines(blob.bytes() for blob in blobs)


def pkcs8(key: trustme.Blob) -> trustme.Blob:
    """The key in the form that all languages read; Java reads no other."""
    loaded = serialization.load_pem_private_key(key.bytes(), password=None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    return trustme.Blob(loaded.private_bytes(*form, serialization.NoEncryption()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tenant", default="default", help="the client's only DNS name")
    parser.add_argument("--names", default="", help="further names of the server, by commas")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *given.names.split(",")]
    server = dict.fromkeys(filter(None, names))
    authority = trustme.CA()
    write(given.folder / "ca.pem", authority.cert_pem)
    for role, of in {"server": server, "client": [given.tenant]}.items():
        issued = authority.issue_cert(*of)
        write(given.folder / f"{role}.crt", *issued.cert_chain_pems)
        write(given.folder / f"{role}.key", pkcs8(issued.private_key_pem))
    print(f"made in {given.folder}: ca.pem, server.crt and .key, client.crt and .key", flush=True)


if __name__ == "__main__":
    main()
