"""Commands of configurations."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import (
    JsonOption,
    RowsOption,
    TargetOption,
    value_of,
)
from quantplane.cli.running import hinting, run, say
from quantplane.cli.showing import show, show_pages

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client

KeyArgument = Annotated[str, typer.Argument(metavar="KEY")]


def list_configurations(
    prefix: Annotated[
        str, typer.Argument(metavar="PREFIX", help="Only keys that begin with it.")
    ] = "",
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List configurations, in order of their keys.

    The keys that servers read are among them, set or not.
    """
    from quantplane import v1 as pb
    from quantplane.tables import print_configurations

    request = pb.ListConfigurationsRequest(prefix=prefix)

    async def work(client: "Client") -> None:
        method = client.configuration.ListConfigurations
        await show_pages(
            method, request, "configurations", print_configurations, limit, as_json
        )

    run(target, work)


def get(
    key: KeyArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Show what is under a key."""
    from quantplane import v1 as pb

    request = pb.GetConfigurationRequest(key=key)

    async def work(client: "Client") -> None:
        with hinting(UNKNOWN_CONFIGURATION="see `quantplane config list`"):
            response = await client.configuration.GetConfiguration(request)
        _show(response.configuration, as_json)

    run(target, work)


def set_value(
    key: KeyArgument,
    value: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VALUE",
            help="JSON, or text where it is none: 60, '[\"SPY\"]', 17:00 "
            "America/New_York. One that begins with - goes behind --.",
        ),
    ] = None,
    from_stdin: Annotated[
        bool,
        typer.Option(
            "--value-stdin",
            help="Read it from standard input, so that nobody else on this machine "
            "sees it.",
        ),
    ] = False,
    description: Annotated[
        str | None, typer.Option(help="What it is for.", show_default="as it is")
    ] = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Set what is under a key, in force at once."""
    from quantplane import v1 as pb

    if bool(value) == from_stdin:
        raise typer.BadParameter("give VALUE or --value-stdin")
    text = sys.stdin.read().rstrip("\r\n") if from_stdin else " ".join(value or ())
    configuration = pb.Configuration(
        key=key,
        value=value_of(text, "VALUE"),
        description=description or "",
    )
    mask = ["value"] if description is None else ["value", "description"]

    async def work(client: "Client") -> None:
        _show(await _set(client, configuration, mask), as_json)

    run(target, work)


def delete(key: KeyArgument, target: TargetOption = None) -> None:
    """Delete what is under a key; of one that servers read the default holds then."""
    from quantplane import v1 as pb

    request = pb.DeleteConfigurationRequest(key=key)

    async def work(client: "Client") -> None:
        await client.configuration.DeleteConfiguration(request)
        say(f"{key} is not set any more")

    run(target, work)


# --- working ------------------------------------------------------------------


async def _set(
    client: "Client", configuration: "pb.Configuration", mask: list[str]
) -> Any:
    """Update the configuration, or create it where it is not set."""
    import grpc

    from quantplane import v1 as pb
    from quantplane.errors import reason_of

    update = pb.UpdateConfigurationRequest(configuration=configuration)
    update.update_mask.paths.extend(mask)
    try:
        return (await client.configuration.UpdateConfiguration(update)).configuration
    except grpc.aio.AioRpcError as error:
        if reason_of(error) != "UNKNOWN_CONFIGURATION":
            raise
    create = pb.CreateConfigurationRequest(configuration=configuration)
    with hinting(IDEMPOTENCY_KEY_REUSED="it was set meanwhile: do the same again"):
        return (await client.configuration.CreateConfiguration(create)).configuration


def _show(configuration: "pb.Configuration", as_json: bool) -> None:
    from quantplane.tables import print_configuration

    show([configuration], print_configuration, as_json)
