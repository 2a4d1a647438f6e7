"""What is killed, and what must then be true."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from quantplane_server.embedded import services
from tests.embedded import Server, connected, gone, server, valkey


async def written(folder: Path) -> tuple[int, int]:
    """The last number that each service holds."""
    async with services(folder) as s:
        async with connected(s.postgres_dsn) as sql:
            in_postgres = await sql.fetchval("SELECT max(n) FROM written")
        return in_postgres, int(await valkey(s.redis_url, "GET written"))


def clear(killed: Server) -> None:
    """Remove the sockets, where nobody was left to do it."""
    for folder in killed.folders():
        shutil.rmtree(folder, ignore_errors=True)


async def test_a_killed_server_leaves_nothing_running_and_loses_no_write(
    tmp_path: Path,
):
    with server(tmp_path) as killed:
        while killed.acknowledged() < 50:
            pass
        everything = killed.everything()
        killed.process.kill()
        last = killed.last_acknowledged()
        in_postgres, in_valkey = await written(tmp_path)  # does not wait for `gone`
    assert gone(everything)
    assert min(in_postgres, in_valkey) >= last
    assert max(in_postgres, in_valkey) <= last + 1


async def test_services_killed_with_their_server_lose_no_write(tmp_path: Path):
    with server(tmp_path) as killed:
        while killed.acknowledged() < 50:
            pass
        everything = killed.everything()
        for process in (*killed.services, killed.process):
            process.send_signal(signal.SIGKILL)
        last = killed.last_acknowledged()
        in_postgres, in_valkey = await written(tmp_path)
    assert gone(everything)
    clear(killed)
    assert min(in_postgres, in_valkey) >= last


def test_a_killed_server_leaves_no_folder_of_its_own():
    with server(None) as killed:
        folders = killed.folders()
        assert all(f.exists() for f in folders)
        everything = killed.everything()
        killed.process.kill()
        assert gone(everything)
    assert not any(f.exists() for f in folders)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
async def test_guardians_killed_with_their_server_leave_nothing_running(tmp_path: Path):
    with server(tmp_path) as killed:
        everything = killed.everything()
        for process in (*killed.guardians, killed.process):
            process.send_signal(signal.SIGKILL)
        assert gone(everything)
        clear(killed)
        async with services(tmp_path) as s, connected(s.postgres_dsn) as sql:
            assert await sql.fetchval("SELECT 1") == 1


async def test_ctrl_c_lets_the_server_write_before_the_services_stop(tmp_path: Path):
    with server(tmp_path) as interrupted:
        before = interrupted.acknowledged()
        os.killpg(interrupted.process.pid, signal.SIGINT)
        last = interrupted.last_acknowledged()
        assert interrupted.process.wait(20) == 0
    assert last >= before + 200
    assert await written(tmp_path) == (last, last)
