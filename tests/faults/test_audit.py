"""Whatever is killed, each event of the logs is in the audit log once, and in order."""

import asyncio

from quantplane import Client
from tests.admin import connected
from tests.faults import TICK_S, Desk, until
from tests.faults.trading import Trading

# A page takes long enough to be killed in the middle of it.
SLOW = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.1); RETURN new; END $$;
    CREATE TRIGGER wait BEFORE INSERT ON audit_logs FOR EACH ROW
      WHEN ((new.new_value->>'revision')::int % 50 = 0) EXECUTE FUNCTION wait()
"""
IN_THE_MIDDLE = "SELECT true FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
EVENTS = """
    SELECT revision, type, key FROM event_log WHERE log = 'orders' ORDER BY revision
"""
ENTRIES = """
    SELECT (new_value->>'revision')::bigint, action, resource_id FROM audit_logs
     WHERE resource_type = 'order' ORDER BY log_id
"""
CAUGHT_UP = """
    SELECT true FROM log_head JOIN audit_positions USING (log, revision)
     WHERE log = 'orders'
"""


async def test_a_recorder_killed_while_it_enters_events_loses_and_doubles_none(
    desk: Desk,
):
    async with (
        connected(desk.dsn) as connection,
        desk.server() as server,
        Client(server.target) as client,
    ):
        await connection.execute(SLOW)
        async with Trading(client).running():
            for _ in range(3):
                while not await connection.fetchval(IN_THE_MIDDLE):
                    await asyncio.sleep(TICK_S)
                server.kill_recorder()
                await until(lambda: server.recorder, "another recorder")
        while not await connection.fetchval(CAUGHT_UP):
            await asyncio.sleep(TICK_S)
        events = await connection.fetch(EVENTS)
        assert events
        assert await connection.fetch(ENTRIES) == events
