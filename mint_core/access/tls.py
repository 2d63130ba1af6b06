"""A service's certificates, and those of its clients. The files are read again when one of them has
changed: new connections meet the new ones, and each call is checked against today's authorities.
"""

import logging
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from mint_core.errors import FailedPrecondition, MintError, Unauthenticated
from mint_core.watched_file import WatchedFile, read_file

logger = logging.getLogger(__name__)

# What a certificate raises that has no names, or extensions that nobody can read.
_NO_NAMES = (
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    ValueError,
)
MOST_PEERS = 10_000  # certificates whose issuer is remembered

AuthContext = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files hold at one time."""

    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    authorities: Sequence[x509.Certificate]
    expires: datetime  # the service's own certificate
    peers: dict[bytes, x509.Certificate] = field(default_factory=dict)  # issued by an authority


class Tls:
    """Thread-safe."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """`client_ca`: the authorities that clients' certificates are to be issued by; without it
        clients need none. Raises FailedPrecondition.
        """
        self._paths = cert, key, client_ca
        self._watched = [WatchedFile(path) for path in self._paths if path is not None]
        self._lock = threading.Lock()
        self._files = _read(cert, key, client_ca)
        self.version = 0  # of what was read
        self.asks_clients = client_ca is not None

    def refresh(self) -> None:
        """Takes in what has changed."""
        with self._lock:
            if True not in [file.changed() for file in self._watched]:  # each takes its look
                return
            try:
                self._files = _read(*self._paths)
            except MintError as error:
                # Of a pair, one file is always the first to change.
                logger.error("certificates kept as they were: %s", error.message)
                return
            self.version += 1
        logger.info("certificates read again; ours expires %s", self._files.expires.isoformat())

    def expires_s(self) -> float:
        """When the service's certificate ends, in seconds since 1970."""
        return self._files.expires.timestamp()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._files.configuration, self._configuration, self.asks_clients
        )

    def context(self) -> ssl.SSLContext:
        """For one more connection to a port that is not gRPC's."""
        self.refresh()
        return self._files.context

    def check(self, auth: AuthContext) -> x509.Certificate | None:
        """The certificate of a connection, which was good when that was made. Raises
        Unauthenticated if it is no more.
        """
        if not self.asks_clients:
            return None
        files, pem = self._files, next(iter(auth.get("x509_pem_cert", ())), b"")
        peer = files.peers.get(pem)
        if peer is None:
            try:
                peer = x509.load_pem_x509_certificate(pem)
            except ValueError as error:
                raise Unauthenticated(
                    "the client's certificate cannot be read; connect with another"
                ) from error
            if not any(_issued(peer, authority) for authority in files.authorities):
                raise Unauthenticated(
                    "the client's certificate is of no authority that this server takes now (its "
                    "--client-ca); connect with another"
                )
            if len(files.peers) >= MOST_PEERS:
                files.peers.clear()
            files.peers[pem] = peer
        if datetime.now(UTC) > peer.not_valid_after_utc:
            raise Unauthenticated("the client's certificate has expired; connect with another")
        return peer

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        self.refresh()
        return self._files.configuration


def dns_names(certificate: x509.Certificate) -> list[str]:
    """Of a certificate's subject; none where they cannot be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except _NO_NAMES:
        return []
    return names.value.get_values_for_type(x509.DNSName)


def _issued(peer: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        peer.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return datetime.now(UTC) <= authority.not_valid_after_utc


def _read(cert: Path, key: Path, client_ca: Path | None) -> _Files:
    chain = _pem(cert, "tls_cert")
    secret = _pem(key, "tls_key")
    authorities = _pem(client_ca, "client_ca") if client_ca else None
    own = _certificates(chain, cert, "tls_cert")[0]
    issuers = _certificates(authorities, client_ca, "client_ca") if authorities else ()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise FailedPrecondition(
            f"`tls_key` {key} is not the private key, without a password, of `tls_cert` {cert}: "
            f"{error}"
        ) from error
    if authorities:
        context.load_verify_locations(cadata=authorities.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    if own.not_valid_after_utc < datetime.now(UTC):
        raise FailedPrecondition(
            f"`tls_cert` {cert} expired on {own.not_valid_after_utc.isoformat()}; have it renewed"
        )
    return _Files(
        grpc.ssl_server_certificate_configuration([(secret, chain)], authorities),
        context,
        issuers,
        own.not_valid_after_utc,
    )


def _pem(file: Path, name: str) -> bytes:
    try:
        return read_file(file)
    except OSError as error:
        raise FailedPrecondition(f"`{name}` {file} cannot be read: {error.strerror}") from error


def _certificates(pem: bytes, file: Path | None, name: str) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise FailedPrecondition(f"`{name}` {file} holds no certificates: {error}") from error
