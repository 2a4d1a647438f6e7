"""Commands of what roles permit."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import JsonOption, TargetOption
from quantplane.cli.running import run, say
from quantplane.cli.showing import show

if TYPE_CHECKING:
    from quantplane import v1 as pb

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE")]
ResourceArgument = Annotated[
    str, typer.Argument(metavar="RESOURCE", help="orders, ...; '*' is any.")
]
ActionArgument = Annotated[
    str,
    typer.Argument(
        metavar="ACTION", help="read, publish, create, update, delete; '*' is any."
    ),
]


def list_permissions(
    role: Annotated[
        list[str] | None,
        typer.Option(metavar="R", help="Only of it; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List what each role permits."""
    from quantplane import v1 as pb
    from quantplane.tables import print_permissions

    async def work(client: Any) -> None:
        response = await client.user.ListPermissions(pb.ListPermissionsRequest())
        found = [p for p in response.permissions if not role or p.role in role]
        if found:
            show(found, print_permissions, as_json)
        else:
            say("no permissions are like that")

    run(target, work)


def grant(
    role: RoleArgument,
    resource: ResourceArgument,
    action: ActionArgument,
    target: TargetOption = None,
) -> None:
    """Have a role permit more, in force at once."""
    from quantplane import v1 as pb

    request = pb.GrantPermissionRequest(permission=_of(role, resource, action))

    async def work(client: Any) -> None:
        await client.user.GrantPermission(request)
        say(f"{role} permits {resource} {action}")

    run(target, work)


def revoke(
    role: RoleArgument,
    resource: ResourceArgument,
    action: ActionArgument,
    target: TargetOption = None,
) -> None:
    """Have a role permit less, in force at once.

    Exactly this is taken away: a '*' that covers it stays.
    """
    from quantplane import v1 as pb

    request = pb.RevokePermissionRequest(permission=_of(role, resource, action))

    async def work(client: Any) -> None:
        await client.user.RevokePermission(request)
        say(f"{role} has no permission {resource} {action} any more")

    run(target, work)


def _of(role: str, resource: str, action: str) -> "pb.RolePermission":
    from quantplane import v1 as pb

    return pb.RolePermission(role=role, resource=resource, action=action)
