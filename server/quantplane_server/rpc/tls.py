"""The server's side of TLS: its certificate, which may change while it serves."""

import logging
from time import monotonic

import grpc

from quantplane.tls import TlsProblem, read_certificates, read_pair

logger = logging.getLogger(__name__)

REREAD_S = 1.0


class Certificates:
    """Certificate, key and the CA of clients, as their PEM files are now.

    gRPC asks before every handshake; the files are read at most once a second. New
    ones that are no good are logged, and the old ones stay in force. Connections
    that are open are never touched.
    """

    def __init__(self, cert: str, key: str, client_ca: str | None = None) -> None:
        """Raises TlsProblem, which is a ValueError and names the file."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._content = self._read()
        self._read_at = monotonic()
        self._problem = ""

    def credentials(self) -> grpc.ServerCredentials:
        """With a CA of clients, they must show a certificate that it signed."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(*self._content),
            self._changed,  # type: ignore[arg-type]  # it may return None
            require_client_authentication=self._client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration if there is one. Called by gRPC's threads."""
        if monotonic() < self._read_at + REREAD_S:
            return None
        self._read_at = monotonic()
        try:
            content = self._read()
        except TlsProblem as problem:
            if str(problem) != self._problem:
                logger.error("%s; the old certificate stays in force", problem)
            self._problem = str(problem)
            return None
        self._problem = ""
        if content == self._content:
            return None
        self._content = content
        logger.info("%s has changed and is in force", self._cert)
        return _configuration(*content)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        cert, key = read_pair(self._cert, self._key)
        return (
            cert,
            key,
            read_certificates(self._client_ca) if self._client_ca else None,
        )


def _configuration(
    cert: bytes, key: bytes, client_ca: bytes | None
) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
