"""The certificates of one driver and its agents. The authority lives in the driver's memory and
ends with it; an agent's certificate is for one engine, and its key never leaves its machine.
"""

import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

FRONT = "front.mint.internal"  # as agents know their driver
_DAY = timedelta(days=1)  # clocks of machines differ; an agent's certificate is used once, at once
_LONG = 3650 * _DAY


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def request() -> tuple[bytes, bytes]:
    """A new key, and the request for a certificate of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    asked = x509.CertificateSigningRequestBuilder().subject_name(_name("engine"))
    return _pem(key), asked.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


class Authority:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._own = self._issue("authority", self._key.public_key(), _LONG, authority=True)
        self.certificate = self._own.public_bytes(Encoding.PEM)

    def context(self) -> ssl.SSLContext:
        """For the driver, who answers none but holders of certificates from here."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(FRONT, key.public_key(), _LONG).public_bytes(Encoding.PEM)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return _filled(context, self.certificate, certificate, _pem(key))

    def sign(self, asked: bytes, name: str) -> bytes:
        """The certificate that was asked for, under a name of ours."""
        read = x509.load_pem_x509_csr(asked)
        key = read.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self._issue(name, key).public_bytes(Encoding.PEM)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        life: timedelta = _DAY,
        *,
        authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name("authority"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = x509.SubjectAlternativeName([x509.DNSName(name)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def agent_context(authority: bytes, certificate: bytes, key: bytes) -> ssl.SSLContext:
    """For an agent, who talks to none but its driver."""
    return _filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), authority, certificate, key)


def _filled(
    context: ssl.SSLContext, authority: bytes, certificate: bytes, key: bytes
) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode())
    descriptor, file = tempfile.mkstemp()  # the library reads keys from files alone
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(key + certificate)
        context.load_cert_chain(file)
    finally:
        os.unlink(file)
    return context


def name_of(peer: ssl.SSLObject) -> str:
    """Whose certificate a peer has shown."""
    shown = peer.getpeercert(binary_form=True)
    assert shown is not None, "a peer without a certificate is not let in"
    subject = x509.load_der_x509_certificate(shown).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
