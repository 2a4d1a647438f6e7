"""A reader as a process: `python -m tests.faults.reader TARGET COUNT SYMBOL...`.

Follows a lossless stream until it has COUNT quotes; says when it is subscribed, and
at the end what differs from the COUNT quotes that there are.
"""

import asyncio
import sys

from quantplane import Client
from tests.faults import Reader, difference, numbers_through, stream


async def main(target: str, count: str, *symbols: str) -> None:
    async with Client(target) as client:
        reader = Reader(stream(client, symbols=symbols))
        async for response in reader.follower:
            reader.take(response)
            if response.event.HasField("snapshot_complete"):
                print("subscribed", flush=True)
            if reader.count >= int(count):
                break
    problems = difference(reader.numbers, numbers_through(int(count), symbols))
    print(problems or "complete", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
