"""HTTP servers on this machine."""

import threading
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server


class Server:
    """Answers by a WSGI application, or by itself, in threads of this process."""

    def __init__(self, application: Any = None) -> None:
        handler = {"threaded": True, "request_handler": _Silent}
        self._server = make_server("127.0.0.1", 0, application or self, **handler)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Silent(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *arguments: Any) -> None: ...
