"""Authorities that issue certificates, in files as an operator has them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from examples.certificates import pkcs8

DAY = timedelta(days=1)


class Authority:
    """Writes what it issues into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self.folder = folder
        self.name = name
        self.file = folder / f"{name}.pem"
        folder.mkdir(parents=True, exist_ok=True)
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, name: str, *names: str, expires: datetime | None = None) -> tuple[Path, Path]:
        """Certificate and key for names, `name` if there are none."""
        issued = self._ca.issue_cert(*(names or (name,)), not_after=expires)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return self._write(name, chain, pkcs8(issued.private_key_pem).bytes())

    def issue_odd(self, name: str, *extensions: x509.ExtensionType) -> tuple[Path, Path]:
        """Certificate and key with these extensions and no others."""
        own = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        signer = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        builder = x509.CertificateBuilder(
            own.subject, x509.Name([]), key.public_key(), x509.random_serial_number(),
            now - DAY, now + DAY,
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        cert = builder.sign(signer, hashes.SHA256())
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(*form, serialization.NoEncryption())
        return self._write(name, cert.public_bytes(serialization.Encoding.PEM), secret)

    def _write(self, name: str, chain: bytes, secret: bytes) -> tuple[Path, Path]:
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for at, content in ((key, secret), (cert, chain)):
            draft = at.with_suffix(".draft")
            draft.write_bytes(content)
            draft.rename(at)
        return cert, key
