"""Commands of API keys."""

from typing import Annotated, Any

import typer

from quantplane.cli.parameters import (
    JsonOption,
    RowsOption,
    TargetOption,
    moment_of,
)
from quantplane.cli.running import hinting, run, say
from quantplane.cli.showing import show, show_pages

SEE_ALL = "see `quantplane keys list`"


def list_keys(
    user: Annotated[str, typer.Option(metavar="NAME", help="Only of this user.")] = "",
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List API keys, the latest first."""
    from quantplane import v1 as pb
    from quantplane.tables import print_keys

    request = pb.ListApiKeysRequest(username=user)

    async def work(client: Any) -> None:
        method = client.user.ListApiKeys
        await show_pages(
            method, request, "keys", print_keys, limit, as_json, order="latest"
        )

    run(target, work)


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    user: Annotated[
        str, typer.Option(metavar="NAME", help="Whose it is.", show_default="yours")
    ] = "",
    role: Annotated[
        str, typer.Option(help="What it permits.", show_default="its user's")
    ] = "",
    strategy: Annotated[
        str,
        typer.Option(
            metavar="ID", help="All it may act and read for.", show_default="any"
        ),
    ] = "",
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="ISO, or 90d: in so long.", show_default="never"
        ),
    ] = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Make an API key, and print its secret, which can't be had again.

    The secret alone is on standard output. Processes have it in QUANTPLANE_API_KEY.
    """
    from quantplane import v1 as pb
    from quantplane.tables import message_json

    key = pb.ApiKey(
        username=user,
        name=name,
        role=role,
        strategy_id=strategy,
        expires_at=moment_of(expires, "--expires"),
    )
    request = pb.CreateApiKeyRequest(key=key)

    async def work(client: Any) -> None:
        with hinting(UNKNOWN_USER="see `quantplane users list`"):
            response = await client.user.CreateApiKey(request)
        if as_json:
            print(message_json(response))
            return
        made = response.key
        say(f"key {made.key_id} of {made.username}, with the role {made.role}:")
        print(response.secret)

    run(target, work)


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id.")],
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Revoke an API key: within a second nothing is done with it any more."""
    from quantplane import v1 as pb
    from quantplane.tables import print_keys

    request = pb.RevokeApiKeyRequest(key_id=key_id)

    async def work(client: Any) -> None:
        with hinting(UNKNOWN_KEY=SEE_ALL):
            response = await client.user.RevokeApiKey(request)
        show([response.key], print_keys, as_json)

    run(target, work)
