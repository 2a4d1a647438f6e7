"""AuditService: who changed what, and when."""

from collections.abc import AsyncIterator
from struct import Struct

from quantplane import v1 as pb
from quantplane.v1 import audit_pb2_grpc as rpc
from quantplane_server.audit import checks, queries
from quantplane_server.audit.queries import Place, Usernames
from quantplane_server.checks import FIRST, LAST, time_given, time_us, to_datetime
from quantplane_server.db import Connection, Database
from quantplane_server.rpc.interceptor import Context
from quantplane_server.tokens import Tokens, list_purpose

PAGE = 100  # where a request names no page_size
MAX_PAGE_BYTES = 3_500_000  # a message must stay below 4 MiB

_PACKED = Struct("!qq")  # microseconds, and the id


class AuditService(rpc.AuditServiceServicer):
    """Entries are read here; whoever changes something enters it."""

    def __init__(
        self, reference: Database, tokens: Tokens, usernames: Usernames
    ) -> None:
        self._reference = reference
        self._tokens = tokens
        self._usernames = usernames

    async def ListAuditLogs(
        self, request: pb.ListAuditLogsRequest, context: Context
    ) -> pb.ListAuditLogsResponse:
        checks.check_list(request)
        start = time_given(request, "start_time", FIRST)
        place = self._place(request)
        limit = request.page_size or PAGE
        async with self._reference.transaction(readonly=True) as conn:
            wanted = await self._by_ids(conn, request)
            if wanted is None:
                return pb.ListAuditLogsResponse()
            rows = queries.rows_before(conn, wanted, start, place, limit + 1)
            page, more = await _page(rows, limit)
            users = {entry.user_id for entry in page if entry.user_id}
            names = await self._usernames(conn, users, ())
        for entry in page:
            entry.username = names.get(entry.user_id, "")
        response = pb.ListAuditLogsResponse(audit_logs=page)
        if more:
            response.next_page_token = self._token_behind(request, page[-1])
        return response

    async def _by_ids(
        self, conn: Connection, request: pb.ListAuditLogsRequest
    ) -> pb.ListAuditLogsRequest | None:
        """Return the request with ids for names; None: nobody has any of the names."""
        if not request.usernames:
            return request
        wanted = pb.ListAuditLogsRequest()
        wanted.CopyFrom(request)
        wanted.user_ids.extend(await self._usernames(conn, (), request.usernames))
        return wanted if wanted.user_ids else None

    def _place(self, request: pb.ListAuditLogsRequest) -> Place:
        """Return behind which place a page begins. Raises InvalidPageToken."""
        if not request.page_token:
            return time_given(request, "end_time", LAST), 0
        payload = self._tokens.open_page(list_purpose(request), request.page_token)
        stamp_us, log_id = _PACKED.unpack(payload)
        return to_datetime(stamp_us), log_id

    def _token_behind(self, request: pb.ListAuditLogsRequest, last: pb.AuditLog) -> str:
        payload = _PACKED.pack(time_us(last.time), last.log_id)
        return self._tokens.page_token(list_purpose(request), payload)


async def _page(
    rows: AsyncIterator[pb.AuditLog], limit: int
) -> tuple[list[pb.AuditLog], bool]:
    """Return the entries that fit a page, one at least, and whether more follow."""
    page, size = list[pb.AuditLog](), 0
    async for entry in rows:
        size += entry.ByteSize()
        if page and (len(page) == limit or size > MAX_PAGE_BYTES):
            return page, True
        page.append(entry)
    return page, False
