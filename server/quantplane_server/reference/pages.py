"""Pages of lists that are in order of a name.

A page token holds the name behind which the next page begins.
"""

from collections.abc import AsyncIterator
from typing import Any

from quantplane_server.tokens import Tokens, list_purpose

PAGE = 100  # where a request names no page_size
PAGE_BYTES = 2 << 20  # where a page ends at the latest, with its last row


def begin(tokens: Tokens, request: Any) -> tuple[str, int]:
    """Return behind which name a page begins, and how many rows it has at most.

    Raises InvalidPageToken.
    """
    limit = request.page_size or PAGE
    if not request.page_token:
        return "", limit
    return tokens.open_page(list_purpose(request), request.page_token).decode(), limit


async def cut(rows: AsyncIterator[Any], limit: int) -> tuple[list[Any], bool]:
    """Return the rows of a page, and whether more follow."""
    page, size = list[Any](), 0
    async for row in rows:
        if len(page) == limit or size >= PAGE_BYTES:
            return page, True
        page.append(row)
        size += row.ByteSize()
    return page, False


def token_behind(tokens: Tokens, request: Any, name: str) -> str:
    """Return the token of the page behind the one that ends with this name."""
    return tokens.page_token(list_purpose(request), name.encode())
