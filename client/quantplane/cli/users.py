"""Commands of users."""

from contextlib import nullcontext
from shlex import quote
from typing import Annotated, Any

import typer

from quantplane.cli.parameters import JsonOption, RowsOption, TargetOption
from quantplane.cli.passwords import StdinOption, ask_new
from quantplane.cli.running import hinting, run, say
from quantplane.cli.showing import show, show_pages

SEE_ALL = "see `quantplane users list`"

NameArgument = Annotated[str, typer.Argument(metavar="NAME")]


def list_users(
    limit: RowsOption = 50, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """List users, in order of their names."""
    from quantplane import v1 as pb
    from quantplane.tables import print_users

    async def work(client: Any) -> None:
        request = pb.ListUsersRequest()
        method = client.user.ListUsers
        await show_pages(method, request, "users", print_users, limit, as_json)

    run(target, work)


def show_user(
    name: NameArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Show all there is to know of a user."""
    from quantplane import v1 as pb

    async def work(client: Any) -> None:
        with hinting(UNKNOWN_USER=SEE_ALL):
            response = await client.user.GetUser(pb.GetUserRequest(username=name))
        _show(response.user, as_json)

    run(target, work)


def create(
    name: NameArgument,
    email: Annotated[str, typer.Option(help="Nobody else's.")],
    role: Annotated[
        str, typer.Option(help="What the user may do.", show_default="viewer")
    ] = "",
    password: Annotated[
        bool,
        typer.Option(
            "--password", help="Ask for one. A user without one can't log in."
        ),
    ] = False,
    from_stdin: StdinOption = False,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Create a user.

    The same again changes nothing.
    """
    from quantplane import v1 as pb

    user = pb.User(username=name, email=email, role=role)
    request = pb.CreateUserRequest(user=user)
    if password or from_stdin:
        request.password = ask_new(from_stdin)
    known = f"`quantplane users show {quote(name)}` has what is there"

    async def work(client: Any) -> None:
        with hinting(IDEMPOTENCY_KEY_REUSED=known):
            response = await client.user.CreateUser(request)
        _show(response.user, as_json)

    run(target, work)


def update(
    name: NameArgument,
    email: Annotated[str | None, typer.Option(help="Nobody else's.")] = None,
    role: Annotated[str | None, typer.Option(help="What the user may do.")] = None,
    etag: Annotated[
        str,
        typer.Option(
            help="As `show` tells it: change nothing if it is another by now.",
            show_default="whatever it is",
        ),
    ] = "",
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Change what is given of a user; all else stays as it is."""
    given = {"email": email, "role": role}
    fields = {field: value for field, value in given.items() if value is not None}
    if not fields:
        raise typer.BadParameter("use --email or --role")
    _update(name, target, as_json, etag=etag, **fields)


def enable(
    name: NameArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Let a user in again, and the user's keys."""
    _update(name, target, as_json, is_active=True)


def disable(
    name: NameArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Shut a user out within a second, with sessions, keys and open streams."""
    _update(name, target, as_json, is_active=False)


def set_password(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default="your own")] = "",
    from_stdin: StdinOption = False,
    target: TargetOption = None,
) -> None:
    """Set a password, and end every session of the user.

    From standard input come the old one, of your own, and the new one, a line each.
    """
    from quantplane import v1 as pb
    from quantplane.cli.passwords import ask, judging

    request = pb.SetPasswordRequest(username=name)
    if not name:
        request.old_password = ask("Old password", from_stdin)
    request.new_password = ask_new(from_stdin)
    wrong = "the old password is wrong, or your login has ended"
    judged = nullcontext() if name else judging(wrong)

    async def work(client: Any) -> None:
        with judged, hinting(UNKNOWN_USER=SEE_ALL):
            await client.user.SetPassword(request)
        again = "" if name else ": log in again"
        say(f"the password is set, and every session has ended{again}")

    run(target, work)


# --- working ------------------------------------------------------------------


def _update(name: str, target: str | None, as_json: bool, **fields: Any) -> None:
    from quantplane import v1 as pb

    request = pb.UpdateUserRequest(user=pb.User(username=name, **fields))
    request.update_mask.paths.extend(sorted(fields.keys() - {"etag"}))
    is_other = f"`quantplane users show {quote(name)}` has it as it is"

    async def work(client: Any) -> None:
        with hinting(ETAG_MISMATCH=is_other, UNKNOWN_USER=SEE_ALL):
            response = await client.user.UpdateUser(request)
        _show(response.user, as_json)

    run(target, work)


def _show(user: Any, as_json: bool) -> None:
    from quantplane.tables import print_user

    show([user], print_user, as_json)
