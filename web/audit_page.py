"""The audit log's page: who did what, a filter, the log as a file, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..protocol.roles import Right
from .audit_words import audited
from .console import Console

PAGE_ROWS = 50
MOST_PAGES = 1 << 40
Part = Annotated[str, Query(max_length=64)]


class AuditPage:
    """live_page: renders a template with a stream to follow."""

    def __init__(self, console: Console, live_page: Callable[..., Response]) -> None:
        self._console, self._live_page = console, live_page

    def routes(self) -> Iterator[tuple[str, Callable[..., Any], Right, str]]:
        yield "/audit", self.page, Right.READ, "GET"
        yield "/audit.jsonl", self.export, Right.READ, "GET"

    def page(
        self,
        request: Request,
        by: Part = "",
        what: Part = "",
        page: Annotated[int, Query(ge=1, le=MOST_PAGES)] = 1,
        check: bool = False,
    ) -> Response:
        """The newest entries that fit; with `check` also what a check of the whole log finds."""
        asked = {"by": by.strip(), "what": what.strip()}
        fits = {"by": asked["by"], "what": audited(asked["what"])}
        rows, total = self._console.audit(**fits, skip=(page - 1) * PAGE_ROWS, limit=PAGE_ROWS)
        return self._live_page(
            request,
            "audit",
            "audit.html",
            rows=rows,
            total=total,
            page=page,
            size=PAGE_ROWS,
            asked=asked,
            query=urlencode({k: v for k, v in asked.items() if v}),
            report=self._console.check_audit() if check else None,
        )

    def export(self, by: Part = "", what: Part = "") -> Response:
        """The entries that fit as JSON Lines; without a filter, what `murmur audit verify-log` takes."""
        entries = self._console.audit_entries(by=by.strip(), what=audited(what.strip()))
        headers = {"content-disposition": "attachment"}
        lines = (entry.model_dump_json() + "\n" for entry in entries)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=headers)
