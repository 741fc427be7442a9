"""A Hub on loopback: the endpoints by which huggingface_hub's client logs in, creates, uploads, lists and downloads.

It stores repositories in memory, checks tokens and checksums, and misbehaves on request (`fail`), so that tests drive
the real client.
Xet storage is not spoken: clients need HF_HUB_DISABLE_XET=1.
"""

import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_endpoints import ROUTES, Endpoints, Refused


class HubServer(ThreadingHTTPServer):
    """A server: `with HubServer(tokens={"hf_x": "user"}) as hub:` serves on hub.endpoint.

    hub.requests logs (method, path, token).
    """

    daemon_threads = True

    def __init__(self, tokens, multipart_above=1 << 20):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.multipart_above = dict(tokens), multipart_above
        self.repos, self.blobs, self.parts, self.requests, self.faults = {}, {}, {}, [], []
        self.lock, self.endpoint = threading.RLock(), f"http://127.0.0.1:{self.server_port}"
        self.cdn_endpoint = (
            f"http://localhost:{self.server_port}"  # another host, to which a client must not send its token
        )

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fail(self, method, pattern, kind, times=1):
        """Answer the next `times` matching requests with the status `kind`.

        With "drop" the connection is cut inside the request's body.
        """
        self.faults.append([method, re.compile(pattern), kind, times])

    def fault(self, method, path):
        """What the next request must suffer, if anything; counts it off."""
        with self.lock:
            for fault in self.faults:
                if fault[3] and fault[0] == method and fault[1].search(path):
                    fault[3] -= 1
                    return fault[2]

    def files(self, repo_id, revision="main", kind="models"):
        """path → bytes of a repository."""
        return self.repos[kind, repo_id].tree(revision)[1]

    def handle_error(self, request, client_address):
        """A client that hung up is no news; anything else is a fault of this server and must be seen."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(Endpoints, BaseHTTPRequestHandler):
    """One request: read, logged, made to fail where asked for, else answered by the endpoint that ROUTES names."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Tests print what they need."""

    def handle_any(self):
        """Read the request, suffer its fault or dispatch it."""
        parts = urlsplit(self.path)
        self.query, path = {k: v[0] for k, v in parse_qs(parts.query).items()}, parts.path
        authorization = self.headers.get("authorization", "")
        self.token = authorization.removeprefix("Bearer ") or None
        fault = self.server.fault(self.command, path)
        if fault == "drop":
            self.rfile.read(min(10, int(self.headers.get("content-length", 0))))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.read_body()
        with self.server.lock:
            self.server.requests.append((self.command, path, self.token))
            try:
                if fault:
                    raise Refused(fault, None, f"fault {fault} asked for")
                if self.token and self.token not in self.server.tokens:
                    raise Refused(401, None, "Invalid credentials in Authorization header")
                self.dispatch(path, body)
            except Refused as refused:
                status, code, message = refused.args
                self.answer({"error": message}, status, {"X-Error-Code": code or "", "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self):
        """The body, sent at once or in chunks."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def dispatch(self, path, body):
        """Call the route's method with its groups."""
        command = "GET" if self.command == "HEAD" else self.command
        for method, pattern, name in ROUTES:
            found = method == command and re.fullmatch(pattern, path)
            if found:
                groups = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                getattr(self, name)(body, **groups)
                return
        raise Refused(404, None, f"no such endpoint: {self.command} {path}")

    def answer(self, value, status=200, headers=None):
        """Send JSON, or bytes as they are."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
