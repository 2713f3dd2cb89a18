"""Answers what nginx does not know of S3: lists of a bucket. `python -m benchmarks.origin SOCKET ROOT`.

Each directory under ROOT is a bucket. Bytes never come from here: nginx serves them from the same files, and an etag
in a list is the one that nginx gives in its answers (modification time and size in hexadecimal).
"""

import datetime
import http.server
import os
import socketserver
import sys
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit
from xml.sax.saxutils import escape

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
PAGE_KEYS_MAX = 1000


def etag_of(status: os.stat_result) -> str:
    """nginx's: `"%xT-%xO"` of modification time in seconds and size (ngx_http_set_etag)."""
    return f'"{int(status.st_mtime):x}-{status.st_size:x}"'


def modified(status: os.stat_result) -> str:
    moment = datetime.datetime.fromtimestamp(int(status.st_mtime), datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def keys_under(bucket: Path, prefix: str) -> list[str]:
    """All keys that start with `prefix`, in the order of S3 (by bytes)."""
    keys = (path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file())
    return sorted(key for key in keys if key.startswith(prefix))


def grouped(keys: list[str], prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
    """Keys of this level, and the common prefixes of what lies deeper."""
    if not delimiter:
        return keys, []
    here: list[str] = []
    deeper: dict[str, None] = {}
    for key in keys:
        head, found, _ = key[len(prefix) :].partition(delimiter)
        if found:
            deeper[prefix + head + delimiter] = None
        else:
            here.append(key)
    return here, list(deeper)


def listing(bucket: Path, query: dict[str, str]) -> str:
    """The XML of ListObjects and ListObjectsV2. One page: no bucket of a benchmark has more than 1000 keys a level."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    encode = quote if query.get("encoding-type") == "url" else escape
    keys, prefixes = grouped(keys_under(bucket, prefix), prefix, delimiter)
    after = max(query.get("marker", ""), query.get("start-after", ""))
    keys, prefixes = [key for key in keys if key > after], [one for one in prefixes if one > after]
    limit = int(query.get("max-keys", PAGE_KEYS_MAX))
    cut = len(keys) + len(prefixes) > limit
    if cut:
        merged = sorted(keys + prefixes)[:limit]
        keys, prefixes = [key for key in merged if key in set(keys)], [one for one in merged if one in set(prefixes)]
    parts = [f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{NAMESPACE}">']
    parts.append(f"<Name>{escape(bucket.name)}</Name><Prefix>{encode(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys>")
    parts.append(f"<KeyCount>{len(keys) + len(prefixes)}</KeyCount><IsTruncated>{str(cut).lower()}</IsTruncated>")
    if delimiter:
        parts.append(f"<Delimiter>{encode(delimiter)}</Delimiter>")
    for key in keys:
        status = (bucket / key).stat()
        parts.append(
            f"<Contents><Key>{encode(key)}</Key><LastModified>{modified(status)}</LastModified>"
            f"<ETag>{escape(etag_of(status))}</ETag><Size>{status.st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    parts += [f"<CommonPrefixes><Prefix>{encode(one)}</Prefix></CommonPrefixes>" for one in prefixes]
    return "".join(parts) + "</ListBucketResult>"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of `/` and `/bucket`."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        name = parts.path.strip("/")
        bucket = self.root / name
        if not name:
            buckets = "".join(f"<Bucket><Name>{one.name}</Name></Bucket>" for one in sorted(self.root.iterdir()))
            body = f'<ListAllMyBucketsResult xmlns="{NAMESPACE}"><Buckets>{buckets}</Buckets></ListAllMyBucketsResult>'
            self._send(200, body)
        elif "/" in name or not bucket.is_dir():
            self._send(404, "<Error><Code>NoSuchBucket</Code></Error>")
        elif "location" in query:
            self._send(200, f'<LocationConstraint xmlns="{NAMESPACE}">us-east-1</LocationConstraint>')
        else:
            self._send(200, listing(bucket, query))

    def _send(self, status: int, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def address_string(self) -> str:
        return "nginx"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def main(socket_path: str, root: Path) -> None:
    handler = type("Bound", (Handler,), {"root": root})
    with Server(socket_path, handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
