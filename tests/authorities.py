"""Authorities that issue certificates, in files as an operator has them."""

from datetime import datetime
from pathlib import Path

import trustme

from examples.certificates import pkcs8


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
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for at, blobs in ((key, [pkcs8(issued.private_key_pem)]), (cert, issued.cert_chain_pems)):
            draft = at.with_suffix(".draft")
            draft.write_bytes(b"".join(blob.bytes() for blob in blobs))
            draft.rename(at)
        return cert, key
