"""Certificates for tests, made when they are needed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import trustme

from quantplane import Tls

HOST = "127.0.0.1"


class Authority:
    """A CA, and the PEM files of what it signs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def sign(
        self, name: str = HOST, age_days: int = 0, common_name: str | None = None
    ) -> tuple[Path, Path]:
        """Return the files of a certificate, chain and key; it is good for two days."""
        made = datetime.now(UTC) - timedelta(days=age_days)
        signed = self._ca.issue_cert(
            name,
            common_name=common_name,
            not_before=made - timedelta(days=1),
            not_after=made + timedelta(days=1),
        )
        cert = self._folder / f"{uuid4().hex}.pem"
        key = cert.with_suffix(".key")
        cert.write_bytes(b"".join(pem.bytes() for pem in signed.cert_chain_pems))
        signed.private_key_pem.write_to_path(key)
        return cert, key

    def client(self, name: str = "strategy") -> Tls:
        """Return what a client trusts and shows that has a certificate."""
        return Tls(self.file, *self.sign(name))


def tls_of(files: tuple[Path, Path], client_ca: Path | None = None) -> dict[str, str]:
    """Return the settings of a server with these files."""
    named = {"tls_cert": files[0], "tls_key": files[1], "tls_client_ca": client_ca}
    return {name: str(path) for name, path in named.items() if path}
