"""The rules of the audit log's requests, as their proto comments state them."""

from quantplane import v1 as pb
from quantplane_server.checks import ID, Checks, is_id

MAX_PAGE = 1_000
MAX_NAMES = 100

AT_MOST = f"must be at most {MAX_NAMES}"
FIELDS = ("user_ids", "usernames", "actions", "resource_types", "resource_ids")
NAME = "must be 1 to 200 characters, without NUL"


def check_list(request: pb.ListAuditLogsRequest) -> None:
    with Checks() as check:
        for field in FIELDS:
            values = getattr(request, field)
            check(len(values) <= MAX_NAMES, field, AT_MOST)
            for i, value in enumerate(values[:MAX_NAMES]):
                if field == "user_ids":
                    check(is_id(value), f"{field}[{i}]", ID)
                else:
                    check(_is_name(value), f"{field}[{i}]", NAME)
        check.time_range(request)
        check.page_size(request, MAX_PAGE)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 200 and "\0" not in text
