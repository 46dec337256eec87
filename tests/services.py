"""An HTTP service on this machine, for tests of what asks one."""

import http.server
import threading


class LocalService:
    """Listens until `close`.

    Args:
        post: `(handler, body)`, answers a POST with this body.
    """

    def __init__(self, post):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                post(handler, handler.rfile.read(int(handler.headers["Content-Length"])))

            def log_message(handler, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
