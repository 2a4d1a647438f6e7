from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane_server.bus import Entry, Position
from quantplane_server.fanout import Latest, Lossless, Piece, framed, split, varint
from quantplane_server.stamps import UNTRACED_BYTES
from quantplane_server.tokens import Tokens

KEYS = [b"A", b"B", b"C"]
records = st.lists(st.binary(max_size=300).map(framed), min_size=1, max_size=5)
entries = st.lists(
    st.dictionaries(st.sampled_from(KEYS), records, min_size=1), min_size=1, max_size=20
)


@given(st.lists(st.binary(max_size=20_000), max_size=5))
def test_joined_records_come_apart_as_they_were(messages: list[bytes]):
    framed_messages = [framed(message) for message in messages]
    assert split(b"".join(framed_messages)) == framed_messages


@given(st.lists(st.builds(pb.Quote, symbol=st.text(), bid=st.floats(allow_nan=False))))
def test_records_joined_are_a_message(quotes: list[pb.Quote]):
    joined = b"".join(framed(quote.SerializeToString()) for quote in quotes)
    assert list(pb.StreamQuotesResponse.FromString(joined).quotes) == quotes


@given(st.integers(0, 2**40))
def test_a_varint_is_protobufs(value: int):
    field = pb.PublishQuotesRequest(batch=value).SerializeToString()
    assert field == (b"\x10" + varint(value) if value else b"")


def entry(number: int, parts: dict[bytes, list[bytes]], stamp: bytes = b"") -> Entry:
    joined = {key: b"".join(found) for key, found in parts.items()}
    return Entry(Position(1, number), 0, joined, stamp)


@given(entries, st.booleans(), st.lists(st.booleans(), min_size=20, max_size=20))
def test_latest_delivers_or_counts_every_record_and_always_the_last_of_each_key(
    pushed: list[dict[bytes, list[bytes]]], always: bool, take: list[bool]
):
    queue = Latest(conflate_always=always)
    keys = frozenset(KEYS[:2])
    published, delivered, conflated = [], [], 0
    for number, parts in enumerate(pushed):
        wanted = {key: found for key, found in parts.items() if key in keys}
        if wanted:
            queue.push(0, Piece.cut(entry(number, parts), keys))
            published += [record for found in wanted.values() for record in found]
        if take[number] and queue:
            taken = queue.take()
            assert taken.positions == {0: Position(1, number)} or not wanted
            delivered += split(b"".join(taken.parts))
            conflated += taken.conflated
    taken = queue.take()
    delivered += split(b"".join(taken.parts))
    conflated += taken.conflated
    assert len(delivered) + conflated == len(published)
    for key in keys:
        of_key = [parts[key][-1] for parts in pushed if key in parts]
        assert not of_key or of_key[-1] in delivered


@given(st.lists(st.integers(1, 2_000_000), max_size=20))
def test_lossless_delivers_all_in_order_or_overflows_and_holds_nothing(
    sizes: list[int],
):
    queue = Lossless()
    parts = [framed(bytes(size)) for size in sizes]
    for number, part in enumerate(parts):
        queue.push(0, Piece.cut(entry(number, {b"A": [part]}), frozenset(KEYS)))
    if queue.overflowed:
        assert sum(map(len, parts)) > 4 << 20
        assert not queue
        assert queue.bytes == 0
        return
    received = []
    while queue:
        received += queue.take().parts
    assert received == parts
    assert queue.bytes == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20), st.data())
def test_what_is_taken_has_the_newest_stamp_in_it_and_the_newest_with_a_trace(
    pushed: list[tuple[bool, bool]], data: st.DataObject
):
    queue = data.draw(st.sampled_from([Lossless, lambda: Latest(True)]))()
    newest = traced = b""
    for number, (is_traced, take) in enumerate(pushed):
        newest = bytes((number,)) * (UNTRACED_BYTES + is_traced)
        traced = newest if is_traced else traced
        piece = Piece.cut(entry(number, {b"A": [framed(b"")]}, newest), frozenset(KEYS))
        queue.push(0, piece)
        if take:
            taken = queue.take()
            assert (taken.stamp, taken.traced) == (newest, traced)
            newest = traced = b""
    taken = queue.take()
    assert (taken.stamp, taken.traced) == (newest, traced)


@given(st.binary(), st.binary(), st.binary(max_size=100), st.data())
def test_a_token_opens_only_unaltered_and_for_its_purpose(
    key: bytes, purpose: bytes, payload: bytes, data: st.DataObject
):
    token = Tokens(key).seal(purpose, payload)
    assert Tokens(key).open(purpose, token) == payload
    assert Tokens(key).open(purpose + b"x", token) is None
    at = data.draw(st.integers(0, len(token) - 1))
    altered = token[:at] + bytes((token[at] ^ 1,)) + token[at + 1 :]
    assert Tokens(key).open(purpose, altered) is None
    assert Tokens(key).open(purpose, token[:at]) is None


@given(
    st.sampled_from([Lossless, lambda: Latest(True), lambda: Latest(False)]),
    st.lists(st.booleans(), max_size=30),
)
def test_the_oldest_is_the_stamp_of_the_first_entry_that_is_pending(
    kind: Callable[[], Lossless | Latest], takes: list[bool]
):
    queue, pending = kind(), []
    for number, take in enumerate(takes):
        stamp = b"%d" % number
        one = Entry(Position(1, number), 0, {b"A": framed(b"x")}, stamp)
        queue.push(0, Piece.cut(one, frozenset([b"A"])))
        pending.append(stamp)
        assert queue.oldest == pending[0]
        if take:
            queue.take()
            pending.clear()
            assert queue.oldest == b""
