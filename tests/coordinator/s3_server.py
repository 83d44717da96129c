"""A server of the S3 protocol in memory: as much of it as blobs need, without checking signatures.

Conditional puts, listing in pages, ranges and uploads in chunks are as Amazon's API reference describes them, so that
the real client library is what the tests exercise.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 5  # keys of one answer to a listing: few, so that tests see several pages
BUCKET = "bucket"


@dataclass
class Object:
    data: bytes
    at: float

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass
class Bucket:
    """What the server holds; a test reads it, ages it, and breaks it."""

    objects: dict[str, Object] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)
    refuse: int = 0  # a status to answer everything with
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true", **keys}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet for head and body: two would wait 40 ms for each other
    bucket: Bucket

    def log_message(self, format: str, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        if name in ("do_GET", "do_HEAD", "do_PUT", "do_POST", "do_DELETE"):
            return self.handle_request
        raise AttributeError(name)

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        key = unquote(split.path).removeprefix(f"/{BUCKET}").lstrip("/")
        body = self.body()
        self.bucket.requests.append(f"{self.command} {key}")
        if self.bucket.refuse:
            return self.answer(self.bucket.refuse, b"<Error><Code>Broken</Code></Error>")
        with self.bucket.guard:
            self.dispatch(key, query, body)

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not self.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            return data
        found = b""  # aws-chunked: size;signature CRLF data CRLF …
        while match := re.match(rb"([0-9a-f]+)[^\r]*\r\n", data):
            size = int(match[1], 16)
            found, data = found + data[match.end() : match.end() + size], data[match.end() + size + 2 :]
        return found

    def dispatch(self, key: str, query: dict[str, str], body: bytes) -> None:
        objects, uploads = self.bucket.objects, self.bucket.uploads
        match self.command:
            case "GET" if not key:
                self.list(query)
            case "GET" | "HEAD":
                self.get(key)
            case "PUT" if "uploadId" in query:
                uploads[query["uploadId"]][int(query["partNumber"])] = body
                self.answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            case "PUT" if self.headers.get("if-none-match") == "*" and key in objects:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            case "PUT":
                objects[key] = Object(body, time.time())
                self.answer(200, headers={"ETag": objects[key].etag})
            case "POST" if "uploads" in query:
                id = f"upload{len(self.bucket.requests)}"
                uploads[id] = {}
                self.xml("InitiateMultipartUploadResult", f"<UploadId>{id}</UploadId>")
            case "POST" if "uploadId" in query:
                chunks = uploads.pop(query["uploadId"])
                objects[key] = Object(b"".join(chunks[n] for n in sorted(chunks)), time.time())
                self.xml("CompleteMultipartUploadResult", f"<ETag>{escape(objects[key].etag)}</ETag>")
            case "POST" if "delete" in query:
                keys = re.findall("<Key>(.*?)</Key>", body.decode())
                for name in keys:
                    objects.pop(name, None)
                self.xml("DeleteResult", "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in keys))
            case "DELETE" if "uploadId" in query:
                uploads.pop(query["uploadId"], None)
                self.answer(204)
            case "DELETE":
                objects.pop(key, None)
                self.answer(204)
            case _:
                self.answer(501)

    def get(self, key: str) -> None:
        found = self.bucket.objects.get(key)
        if found is None:
            return self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {"ETag": found.etag, "Last-Modified": formatdate(found.at, usegmt=True)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(match[1]), min(int(match[2] or len(found.data)), len(found.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(found.data)}"
            return self.answer(206, found.data[first : last + 1], headers)
        self.answer(200, found.data, headers)

    def list(self, query: dict[str, str]) -> None:
        after = query.get("continuation-token", query.get("start-after", ""))
        keys = sorted(k for k in self.bucket.objects if k.startswith(query.get("prefix", "")) and k > after)
        more = f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>" if len(keys) > PAGE else ""
        found = "".join(entry(key, self.bucket.objects[key]) for key in keys[:PAGE])
        self.xml("ListBucketResult", f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{found}")

    def xml(self, tag: str, inside: str) -> None:
        self.answer(200, f'<?xml version="1.0" encoding="UTF-8"?><{tag}>{inside}</{tag}>'.encode())

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(key: str, found: Object) -> str:
    at = datetime.fromtimestamp(found.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    inside = f"<Key>{escape(key)}</Key><Size>{len(found.data)}</Size><ETag>{escape(found.etag)}</ETag>"
    return f"<Contents>{inside}<LastModified>{at}</LastModified></Contents>"


@contextmanager
def serving() -> Iterator[Bucket]:
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BucketHandler", (Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
