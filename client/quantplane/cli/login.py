"""Commands of who somebody is: login, logout, whoami; and the logins they keep.

A login is a file that only this user reads, one for each server.
"""

import json
import os
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from quantplane import state
from quantplane.cli.parameters import JsonOption, TargetOption
from quantplane.cli.passwords import StdinOption, ask, judging
from quantplane.cli.running import fail, run, say
from quantplane.cli.showing import show

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client


def login(
    username: Annotated[str, typer.Argument(metavar="NAME")],
    from_stdin: StdinOption = False,
    target: TargetOption = None,
) -> None:
    """Log in, for all further commands until `quantplane logout`."""
    from quantplane.cli.running import in_words, target_of
    from quantplane.credentials import VARIABLE, check_private
    from quantplane.login import log_in

    with in_words(target):
        check_private(target_of(target), None)
    password = ask(f"Password of {username}", from_stdin)

    async def work(client: "Client") -> None:
        with judging("wrong name or password"):
            tokens = await log_in(client.without_credentials(), username, password)
        keep(client.target, tokens)
        say(f"logged in at {client.target} as {username}")
        if os.environ.get(VARIABLE):
            say(f"{VARIABLE} is set, and goes before it: unset it")

    run(target, work, known=False)


def logout(target: TargetOption = None) -> None:
    """End the login, here and at the server."""

    async def work(client: "Client") -> None:
        import grpc

        from quantplane import v1 as pb

        tokens = kept(client.target)
        if tokens is None:
            fail(f"nobody is logged in at {client.target}")
        request = pb.LogoutRequest(refresh_token=tokens.refresh_token)
        try:
            await client.without_credentials().Logout(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise  # what it says is that the login has ended by itself
        state.remove(_file(client.target))
        say(f"logged out at {client.target}")

    run(target, work, known=False)


def whoami(as_json: JsonOption = False, target: TargetOption = None) -> None:
    """Show as whom the server knows you, and what that permits."""
    from quantplane import v1 as pb
    from quantplane.tables import print_caller

    async def work(client: "Client") -> None:
        caller = await client.auth.WhoAmI(pb.WhoAmIRequest())
        show([caller], print_caller, as_json)

    run(target, work)


# --- the logins ---------------------------------------------------------------


async def resume(client: "Client") -> None:
    """Go on with the login at the client's server, if there is one."""
    import grpc

    from quantplane.credentials import VARIABLE
    from quantplane.login import Session

    class KeptSession(Session):
        """A session that other commands use too: whoever renews it tells them."""

        async def _exchange(self, tokens: "pb.Tokens") -> "pb.Tokens":
            newest = kept(client.target)
            if newest is None:
                return await super()._exchange(tokens)
            if newest.access_token != tokens.access_token and _is_good(newest):
                return newest  # another command has renewed it
            renewed = await super()._exchange(newest)
            keep(client.target, renewed)
            return renewed

    if os.environ.get(VARIABLE) or (tokens := kept(client.target)) is None:
        return
    session = KeptSession(client.without_credentials(), tokens)
    try:
        if not _is_good(tokens):
            await session.renew()
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        fail(f"the login at {client.target} has ended: `quantplane login` again")
    client.use(session)


def _is_good(tokens: "pb.Tokens") -> bool:
    """Say whether the access token lasts for as long as a session waits to renew it."""
    import time

    from quantplane.login import RENEW_S

    return tokens.access_expires_at.seconds - time.time() > RENEW_S


def kept(target: str) -> "pb.Tokens | None":
    """Return the tokens of the login at a server. Raises StateProblem."""
    from google.protobuf.json_format import ParseDict, ParseError

    from quantplane import v1 as pb

    text = state.read(_file(target))
    if text is None:
        return None
    try:
        return ParseDict(json.loads(text), pb.Tokens())
    except (ParseError, ValueError):
        return None  # as if there were none: `quantplane login` makes another


def keep(target: str, tokens: Any) -> None:
    """Keep the tokens of the login at a server."""
    from google.protobuf.json_format import MessageToDict

    state.write(_file(target), json.dumps(MessageToDict(tokens)))


def _file(target: str) -> str:
    return f"login-{quote(target, safe='')}.json"
