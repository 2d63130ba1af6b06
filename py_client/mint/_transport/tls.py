"""TLS: what this client trusts and shows, and in plain words why a server cannot be spoken to."""

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from mint._transport.address import SAMPLER_PORT, TRAINER_PORT, Address
from mint.errors import refused

_PROBE_S = 3.0
_EXPIRED, _OTHER_NAME, _OTHER_IP = 10, 62, 64  # of OpenSSL's verification


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """All in PEM. Empty: the authorities that gRPC knows, and no certificate of the client's."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidInputError for files that cannot be read or do not go together."""
        if bool(self.cert) != bool(self.key):
            raise refused("MINT_TLS_CERT", "and MINT_TLS_KEY go together; set both, or neither")
        ca = _read(self.ca, "MINT_TLS_CA")
        key, cert = _read(self.key, "MINT_TLS_KEY"), _read(self.cert, "MINT_TLS_CERT")
        self.context()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except ssl.SSLError:
            raise refused("MINT_TLS_CA", f"{self.ca} holds no certificates") from None
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key, password="")
            except (ssl.SSLError, ValueError):
                raise refused(
                    "MINT_TLS_KEY", f"{self.key} is not the private key of {self.cert}"
                ) from None
        context.set_alpn_protocols(["h2"])
        return context


def trouble(address: Address, files: TlsFiles) -> str | None:
    """Tries a handshake, and says why TLS, its absence, or another protocol keeps a client and a
    server that is there apart; empty: none does. None: nobody is there.
    """
    try:
        connection = socket.create_connection((address.host, address.port), _PROBE_S)
    except OSError:
        return None
    with connection:
        if not address.tls:
            return _plain_at_tls(address, connection)
        try:
            with files.context().wrap_socket(connection, server_hostname=address.host) as secured:
                if secured.selected_alpn_protocol() != "h2":
                    return _other_protocol(address)
                return "" if secured.recv(1) else _unwelcome(address, files)
        except ssl.SSLCertVerificationError as error:
            return _untrusted(address, files, error)
        except ssl.SSLError as error:
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return _http1(address) or (
                    f"the server at `{address.target}` speaks without TLS; take "
                    f"http://{address.target}, or start it with --tls-cert"
                )
            return f"no TLS comes about with the server at `{address.target}`: {error.reason}"
        except OSError:
            return ""


def _plain_at_tls(address: Address, connection: socket.socket) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with context.wrap_socket(connection, server_hostname=address.host):
            return (
                f"the server at `{address.target}` speaks TLS alone; take https://{address.target}"
            )
    except TimeoutError:
        return ""  # it says nothing at all
    except OSError:
        return _http1(address)


def _http1(address: Address) -> str:
    """Says so if it answers in HTTP/1; a server of gRPC begins with a frame of HTTP/2."""
    try:
        with socket.create_connection((address.host, address.port), _PROBE_S) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return _other_protocol(address) if connection.recv(7) == b"HTTP/1." else ""
    except OSError:
        return ""


def _other_protocol(address: Address) -> str:
    return (
        f"the server at `{address.target}` speaks HTTP/1 and no gRPC; give the port of a trainer "
        f"({TRAINER_PORT} unless it was given another) or sampler ({SAMPLER_PORT}), not that of "
        "metrics or of a web server"
    )


def _unwelcome(address: Address, files: TlsFiles) -> str:
    if files.cert:
        return (
            f"the server at `{address.target}` does not take the client's certificate "
            f"{files.cert}: another authority has issued it, or it has expired"
        )
    return (
        f"the server at `{address.target}` wants a certificate of the client; set MINT_TLS_CERT "
        "and MINT_TLS_KEY"
    )


def _untrusted(address: Address, files: TlsFiles, error: ssl.SSLCertVerificationError) -> str:
    whose = f"the certificate of the server at `{address.target}`"
    if error.verify_code == _EXPIRED:
        return f"{whose} has expired; have it renewed there"
    if error.verify_code in (_OTHER_NAME, _OTHER_IP):
        return (
            f"{whose} is not for the name `{address.host}`; take the name that it is for, or have "
            "it made for this one"
        )
    trusted = f"those in MINT_TLS_CA {files.ca}" if files.ca else "the well-known ones"
    return (
        f"{whose} is of no authority that this client trusts ({trusted}); set MINT_TLS_CA to the "
        f"file of the server's authority ({error.verify_message})"
    )


def _read(file: str, name: str) -> bytes | None:
    if not file:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise refused(name, f"{file} cannot be read: {error.strerror}") from None
