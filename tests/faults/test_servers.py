"""Several servers on the same database and bus."""

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import (
    PATIENCE_S,
    SYMBOLS,
    Desk,
    Feed,
    Reader,
    Server,
    difference,
    numbers_through,
    stream,
    until,
)


async def test_a_reader_moves_between_servers_with_its_token(desk: Desk):
    async with (
        desk.server() as one,
        desk.server() as other,
        Client(other.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        reader = Reader(stream(client))  # keeps what is read, from either server
        token = await read_until(one, b"", reader, 0)
        async with feed.running():
            for server in (one, other, one):
                token = await read_until(server, token, reader, reader.count + 2_000)
                await desk.pause(0, 0.3)  # nobody reads
            await one.kill()
        await feed.all_accepted()
        await read_until(other, token, reader, feed.sent)
        assert difference(reader.numbers, numbers_through(feed.sent)) == []


async def read_until(server: Server, token: bytes, reader: Reader, count: int) -> bytes:
    """Read on from a token until `reader` has so many quotes; return the next token."""
    request = pb.SubscribeQuotesRequest(
        symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS, resume_token=token
    )
    async with Client(server.target) as client:
        call = client.market_data.SubscribeQuotes(request, timeout=PATIENCE_S)
        async for response in call:
            reader.take(response)
            token = response.resume_token or token
            if token and reader.count >= count:
                return token
    raise AssertionError("the stream ended")


async def test_another_server_records_when_the_recording_one_is_killed(desk: Desk):
    async with (
        desk.server() as recording,
        desk.server() as waiting,
        Client(waiting.target) as client,
        Reader(stream(client)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: publisher.durable_through > 0, "it is recorded")
            recording.kill_recorder()
            await recording.kill()
            recorded = publisher.durable_through
            await until(
                lambda: publisher.durable_through > recorded + 100, "the other records"
            )
        await feed.all_durable()
        await reader.has_all(feed)
        await desk.has_recorded(feed)
