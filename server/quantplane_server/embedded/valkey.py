import asyncio
import signal
from pathlib import Path
from urllib.parse import quote

from .binaries import valkey_server
from .service import Launch, Service


class Valkey(Service):
    title = "Valkey"
    name = "valkey"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def address(self) -> str:
        return self.url

    @property
    def _socket(self) -> Path:
        return self.scratch / "valkey.sock"

    async def _prepare(self, lock: int) -> Launch:
        data = self.data_dir / self.name
        data.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(data),
            # It answers after the write, or while a slow disk postpones that: see the
            # README for what a kill and a power cut can lose.
            "appendonly": "yes",
            "appendfsync": "no" if self.ephemeral else "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "loglevel": "notice",
            "logfile": "",  # standard output, which the guardian writes to the log
            "daemonize": "no",
        }
        options = [part for k, v in settings.items() for part in (f"--{k}", v)]
        return Launch([str(valkey_server()), *options])

    async def _answers(self) -> bool:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(b"PING\r\n")
            return await asyncio.wait_for(reader.readline(), 5) == b"+PONG\r\n"
        finally:
            writer.close()
