"""What both small servers do with a request: its body, read up to a limit."""

from __future__ import annotations

from starlette.requests import Request


class TooLarge(Exception):
    """A body over the limit."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; TooLarge at the first byte beyond `limit`, whatever the headers promised."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)
