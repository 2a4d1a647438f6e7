"""The command of the audit log."""

from typing import TYPE_CHECKING, Annotated

import typer

from quantplane.cli.parameters import JsonOption, RowsOption, TargetOption, moment_of
from quantplane.cli.running import run
from quantplane.cli.showing import show_pages

if TYPE_CHECKING:
    from quantplane.client import Client


def audit(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="strategy|order|user|...",
            help="Only of such resources; may be repeated.",
        ),
    ] = None,
    resource_id: Annotated[
        list[str] | None,
        typer.Option(
            "--id", metavar="ID", help="Only of the resource; may be repeated."
        ),
    ] = None,
    action: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A", help="Only create, update, delete, ...; may be repeated."
        ),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only what they did; may be repeated."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="30s, 5m, 2h, 1d, ... ago; or an ISO time, in UTC."
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Exclusive; as --since.")
    ] = None,
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Show who changed what, and when, the latest first."""
    from quantplane import v1 as pb
    from quantplane.tables import print_audit_logs

    request = pb.ListAuditLogsRequest(
        resource_types=kind,
        resource_ids=resource_id,
        actions=action,
        usernames=user,
        start_time=moment_of(since, "--since", ago=True),
        end_time=moment_of(until, "--until", ago=True),
    )

    async def work(client: "Client") -> None:
        await show_pages(
            client.audit.ListAuditLogs,
            request,
            "audit_logs",
            print_audit_logs,
            limit,
            as_json,
            "latest",
        )

    run(target, work)
