"""Commands that show option chains."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quantplane.cli.parameters import (
    AsOfOption,
    JsonOption,
    TargetOption,
    UnderlyingArgument,
    bounds_of,
    date_of,
    time_of,
)
from quantplane.cli.running import run, say

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client
    from quantplane.tables import ContractRow


def chain(
    underlying: UnderlyingArgument,
    as_of: AsOfOption = None,
    expiration: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only this one.")
    ] = None,
    min_expiration: Annotated[
        str | None, typer.Option(metavar="DATE", help="Inclusive.")
    ] = None,
    max_expiration: Annotated[
        str | None, typer.Option(metavar="DATE", help="Inclusive.")
    ] = None,
    strike: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Inclusive.")
    ] = None,
    option_type: Annotated[
        str | None, typer.Option("--type", metavar="call|put", help="Only these.")
    ] = None,
    delta: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Inclusive; a put's is negative."),
    ] = None,
    moneyness: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Of strike / price; needs --price."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of the underlying, for --moneyness.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on with what changes, one a line.")
    ] = False,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Show the option chain of an underlying.

    Calls are on the left, puts on the right; what is blank is unknown. A range may
    lack an end, as in 200: or :300. Ctrl-C ends --watch.
    """
    from quantplane import v1 as pb

    if watch and as_of is not None:
        raise typer.BadParameter("use one of --watch and --as-of")
    if expiration is not None:
        if min_expiration is not None or max_expiration is not None:
            raise typer.BadParameter(
                "use --expiration, or --min-expiration and --max-expiration"
            )
        min_expiration = max_expiration = date_of(expiration, "--expiration")
    if (moneyness is None) != (price is None):
        raise typer.BadParameter("use --moneyness and --price together")
    min_strike, max_strike = bounds_of(strike, "--strike")
    min_delta, max_delta = bounds_of(delta, "--delta")
    wanted = pb.OptionFilter(
        min_expiration=date_of(min_expiration, "--min-expiration"),
        max_expiration=date_of(max_expiration, "--max-expiration"),
        min_strike=min_strike,
        max_strike=max_strike,
        option_type=_type(option_type),
        min_delta=min_delta,
        max_delta=max_delta,
    )
    if price is not None:
        low, high = bounds_of(moneyness, "--moneyness")
        bounds = pb.Moneyness(underlying_price=price, min=low, max=high)
        wanted.moneyness.CopyFrom(bounds)
    if watch:
        followed = pb.SubscribeOptionChainRequest(
            underlyings=[underlying], filter=wanted
        )
        run(target, lambda client: _watch(client, followed, as_json))
    else:
        request = pb.GetOptionChainRequest(
            underlying=underlying, as_of=time_of(as_of, "--as-of"), filter=wanted
        )
        run(target, lambda client: _show(client, request, as_json))


def expirations(
    underlying: UnderlyingArgument,
    as_of: AsOfOption = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List the expirations of an option chain."""
    from quantplane import v1 as pb

    request = pb.ListExpirationsRequest(
        underlying=underlying, as_of=time_of(as_of, "--as-of")
    )
    run(target, lambda client: _list_expirations(client, request, as_json))


# --- working ------------------------------------------------------------------


def _type(text: str | None) -> "pb.OptionType.ValueType":
    from quantplane import v1 as pb

    types = {
        None: pb.OPTION_TYPE_UNSPECIFIED,
        "call": pb.OPTION_TYPE_CALL,
        "put": pb.OPTION_TYPE_PUT,
    }
    if text not in types:
        raise typer.BadParameter(
            f"{text!r} is neither call nor put", param_hint="--type"
        )
    return types[text]


async def _show(
    client: "Client", request: "pb.GetOptionChainRequest", as_json: bool
) -> None:
    response = await client.options.GetOptionChain(request)
    _print_chain(response.chain, as_json)


def _print_chain(chain: "pb.OptionChain", as_json: bool) -> None:
    from quantplane.tables import contract_json, contract_rows, print_chain

    if as_json:
        for row in contract_rows(chain):
            print(contract_json(row))
    else:
        print_chain(sys.stdout, chain)
    sys.stdout.flush()
    if not chain.contracts:
        say(
            f"no contract of {chain.underlying} is like that; "
            f"`quantplane expirations {chain.underlying}` tells what there is"
        )


async def _watch(
    client: "Client", request: "pb.SubscribeOptionChainRequest", as_json: bool
) -> None:
    from quantplane.tables import contract_json, contract_line, event_lines

    show = contract_json if as_json else contract_line
    watched: Watched | None = None
    async with client.follow(client.options.SubscribeOptionChain, request) as stream:
        async for response in stream:
            for line in event_lines(response.event):
                say(line)
            for chain in response.chains:
                if watched is None:
                    watched = Watched()
                    watched.take(chain)
                    _print_chain(chain, as_json)
                    continue
                changed, gone = watched.take(chain)
                for row in changed:
                    print(show(row))
                for row in gone:
                    print(show(row, gone=True))
                sys.stdout.flush()


class Watched:
    """The contracts of a chain as last delivered; tells what a response changes."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, float, str], ContractRow] = {}

    def take(
        self, chain: "pb.OptionChain"
    ) -> tuple[list["ContractRow"], list["ContractRow"]]:
        """Return the rows that are new or other than before, and those that are gone.

        A whole chain may come again, after a reconnect: then only what it changes.
        """
        from quantplane.tables import contract_rows

        before = self._rows
        rows = {
            (row["expiration"], row["strike"], row["option_type"]): row
            for row in contract_rows(chain)
        }
        self._rows = {**before, **rows} if chain.partial else rows
        changed = [row for key, row in rows.items() if before.get(key) != row]
        return changed, [row for key, row in before.items() if key not in self._rows]


async def _list_expirations(
    client: "Client", request: "pb.ListExpirationsRequest", as_json: bool
) -> None:
    from quantplane.tables import expiration_json, print_expirations

    response = await client.options.ListExpirations(request)
    if as_json:
        for expiration in response.expirations:
            print(expiration_json(expiration))
    else:
        print_expirations(sys.stdout, response)
