"""What keeps a sampler and a trainer that is there apart, in plain words."""

import socket
import ssl

from mint_core.errors import FailedPrecondition
from sampler_service.wire_store.access import TrainerAccess

_PROBE_S = 3.0


def tls_context(access: TrainerAccess) -> ssl.SSLContext:
    """What the files make. Raises FailedPrecondition where they make nothing."""
    try:
        context = ssl.create_default_context(cafile=access.ca)
    except (ssl.SSLError, OSError) as error:
        raise FailedPrecondition(
            f"`store_tls_ca` {access.ca} holds no certificates: {error}"
        ) from error
    if access.cert:
        try:
            context.load_cert_chain(access.cert, access.cert_key, password="")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise FailedPrecondition(
                f"`store_tls_key` {access.cert_key} is not the private key, without a password, of "
                f"`store_tls_cert` {access.cert}: {error}"
            ) from error
    context.set_alpn_protocols(["h2"])
    return context


def trouble(access: TrainerAccess) -> str:
    """Tries a handshake. Empty: nothing is wrong with it, or nobody is there."""
    try:
        with socket.create_connection((access.host, access.port), _PROBE_S) as connection:
            return _at(access, connection)
    except OSError:
        return ""


def _at(access: TrainerAccess, connection: socket.socket) -> str:
    context = tls_context(access)
    if not access.tls:  # nothing is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with context.wrap_socket(connection, server_hostname=access.host) as secured:
            if not access.tls:
                return "it speaks TLS alone; --store must begin with https://"
            return "" if secured.recv(1) else _unwelcome(access)
    except ssl.SSLCertVerificationError as error:
        trusted = f"--store-tls-ca {access.ca}" if access.ca else "the well-known authorities"
        return f"its certificate is not good by {trusted}: {error.verify_message}"
    except ssl.SSLError as error:
        if access.tls and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "it speaks without TLS; --store must begin with http://"
        return _unwelcome(access) if access.tls and "ALERT" in str(error.reason) else ""


def _unwelcome(access: TrainerAccess) -> str:
    if access.cert is None:
        return "it wants a certificate; give --store-tls-cert and --store-tls-key"
    return f"it does not take the certificate --store-tls-cert {access.cert}"
