"""The client works with the oldest versions that it declares."""

import asyncio
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.postgres import KEY

ROOT = Path(__file__).parents[2]
OLDEST = ["grpcio==1.72.1", "protobuf==6.30.0", "googleapis-common-protos==1.70.0"]
PROGRAM = """
import asyncio, sys, warnings
warnings.simplefilter("error")
from quantplane import Client, v1 as pb

async def main():
    async with Client(sys.argv[1]) as client:
        quote = pb.Quote(symbol="OLD", bid=1.5)
        quote.time.GetCurrentTime()
        async with client.publish_quotes() as publisher:
            await publisher.send([quote])
            await publisher.durable()
        request = pb.StreamQuotesRequest(symbols=["OLD"])
        async for response in client.follow(client.market_data.StreamQuotes, request):
            for quote in response.quotes:
                print(quote.bid)
                return

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def oldest_python() -> Path:
    """An interpreter that has the oldest versions, kept between runs."""
    folder = ROOT / "build" / f"oldest-py{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "-q", "--only-binary", ":all:", *OLDEST]
        subprocess.run(pip, check=True)
        (folder / "ready").touch()
    return python


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="grpcio 1.72 has no wheel for this Python"
)
async def test_the_oldest_versions_declared_can_publish_and_follow(
    oldest_python: Path, server: Server
):
    process = await asyncio.create_subprocess_exec(
        *(oldest_python, "-c", PROGRAM, server.target),
        env={"PYTHONPATH": str(ROOT / "client"), "QUANTPLANE_API_KEY": KEY},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert (process.returncode, out) == (0, b"1.5\n")
