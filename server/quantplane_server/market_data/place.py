"""Where a reader of quotes is: what its resume token means."""

import struct
from dataclasses import dataclass, field

from quantplane_server.bus import Position

_HEAD = struct.Struct("!BqB")  # in history?, its time in us, number of shards
_SHARD = struct.Struct("!BQQ")

Key = tuple[int, str]  # time in us, symbol: the order of history


@dataclass
class Place:
    """Served through `delivered` by shard and, until history is complete, to `history`.

    `history` is the last row delivered. Of what is recorded after `delivered`, history
    will have the rows behind it.
    """

    delivered: dict[int, Position] = field(default_factory=dict)
    history: Key | None = None

    def encode(self) -> bytes:
        time_us, symbol = self.history or (0, "")
        shards = [_SHARD.pack(shard, *at) for shard, at in self.delivered.items()]
        head = _HEAD.pack(self.history is not None, time_us, len(shards))
        return b"".join([head, *shards, symbol.encode()])

    @classmethod
    def decode(cls, data: bytes) -> "Place":
        in_history, time_us, count = _HEAD.unpack_from(data)
        end = _HEAD.size + count * _SHARD.size
        shards = _SHARD.iter_unpack(data[_HEAD.size : end])
        return cls(
            {shard: Position(epoch, number) for shard, epoch, number in shards},
            (time_us, data[end:].decode()) if in_history else None,
        )
