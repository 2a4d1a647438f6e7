"""The schema as it is after all migrations, for Alembic to compare with."""

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)

metadata = MetaData()

Table(
    "market_data",
    metadata,
    Column("time", TIMESTAMP(timezone=True), primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("open", Double),
    Column("high", Double),
    Column("low", Double),
    Column("close", Double, nullable=False),
    Column("volume", BigInteger),
    Column("vwap", Double),
    Column("bid", Double),
    Column("ask", Double),
    Column("bid_size", Integer),
    Column("ask_size", Integer),
    Index("idx_market_data_symbol", "symbol", text("time DESC")),
)

# Up to where each shard of the bus is recorded, written with the rows it covers.
Table(
    "bus_positions",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
)

# Random keys that all servers of this installation share.
Table(
    "server_keys",
    metadata,
    Column("purpose", Text, primary_key=True),
    Column("key", LargeBinary, nullable=False),
)
