"""What tests of the command share."""

import pytest
from google.protobuf.json_format import Parse

from tests.client.commands import invoke


@pytest.fixture
def call(server):
    """Run a command that must succeed; give its lines on stdout, or as messages."""

    async def call(*arguments, kind=None):
        done = await invoke(server.target, *arguments, *(["--json"] if kind else []))
        assert done.exit_code == 0, done.stderr
        lines = done.stdout.splitlines()
        return [Parse(line, kind()) for line in lines] if kind else lines

    return call
