"""A server that scores images by a large judge: HPSv3, VQAScore, UnifiedReward, or a function of your own.

    python integrations/reward_server/serve.py --scorer hpsv3 --port 8000

It needs Python 3.10 or newer, Pillow and what its scorer needs, and neither JAX nor flax_pref. Endpoints:

    POST /score    {"prompts": [text, ...], "images": [PNG in base64, ...]} -> {"scores": [number or null, ...]}
    GET  /health   200 while it scores, else 503
    GET  /version  protocol, scorer, and the versions of its packages

An error is {"error": "one line"}: 400 for what is no request, 413 for too much of it, 429 with Retry-After while the
queue is full, 500 if the scorer is broken, 503 while it loads or stops. It has neither passwords nor encryption: let no
strangers reach its port.
"""

import argparse
import base64
import binascii
import contextlib
import http.server
import importlib.metadata
import io
import json
import math
import platform
import select
import signal
import socket
import sys
import threading
import time

from batching import Batcher, QueueFullError, ScorerError, one_line
from PIL import Image
from scorers import SCORERS, load_scorer

PROTOCOL = 1
GRACE = 30.0  # seconds in which requests that wait are answered after SIGTERM


class RefusedError(Exception):
    """A request that is answered with a status and a line."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None):
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


class Server(http.server.ThreadingHTTPServer):
    """The socket, the limits and, once it is loaded, the scorer."""

    daemon_threads = True
    request_queue_size = 128  # connections that the system keeps until they are taken
    batcher: Batcher | None = None
    stopping = False

    def __init__(self, address: tuple[str, int], limits: argparse.Namespace):
        super().__init__(address, Handler)
        self.limits, self._free = limits, threading.BoundedSemaphore(limits.connections)

    def process_request(self, request, client_address):
        """Answers in a thread, if there are not too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            head = (
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            request.sendall(head)
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        """See `socketserver.ThreadingMixIn`."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address):
        """One line; a client that has gone is none."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, which is closed after its answer."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # of each read and write, in seconds

    def do_GET(self):
        """`/health` and `/version`."""
        server = self.server
        if self.path == "/health":
            batcher = server.batcher
            alive = batcher is not None and batcher.alive and not server.stopping
            state = "stopping" if server.stopping else "loading" if batcher is None else "ok" if alive else "failed"
            counts = {} if batcher is None else {"waiting": batcher.waiting, "scored": batcher.scored}
            self.answer(200 if alive else 503, {"status": state, **counts})
        elif self.path == "/version":
            self.answer(200, {"protocol": PROTOCOL, "scorer": server.limits.scorer, "versions": versions(server)})
        else:
            self.refuse(RefusedError(404, f"no {self.path[:80]!r}; expected /score, /health or /version"))

    def do_POST(self):
        """`/score`."""
        unread = True
        try:
            if self.path != "/score":
                raise RefusedError(404, f"no {self.path[:80]!r}; expected POST /score")
            body = self.body()
            unread = False
            self.answer(200, {"scores": self.score(*self.parse(body))})
        except RefusedError as refused:
            if unread:
                self.drop()
            self.refuse(refused)

    def score(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        """Scores of a request."""
        if not images:
            return []
        batcher = self.server.batcher
        if batcher is None or self.server.stopping:
            raise RefusedError(503, "the scorer stops" if self.server.stopping else "the scorer loads", 5)
        try:
            return batcher.score(images, prompts, gone=self.gone)
        except QueueFullError as error:
            raise RefusedError(429, f"{error}; ask again later", 1) from error
        except ScorerError as error:
            raise RefusedError(503 if self.server.stopping else 500, f"{batcher.scorer.name}: {error}") from error

    def body(self) -> bytes:
        """The body, within its limits of size and time."""
        length, most = self.headers.get("Content-Length", ""), self.server.limits.max_body_mib * 2**20
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(411, "no Content-Length; expected a body of known length")
        if len(length) > 15 or int(length) > most:
            self.drop()
            raise RefusedError(
                413, f"a body of {length[:20]} bytes; expected at most {most}: send fewer images at a time"
            )
        parts, left, end = [], int(length), time.monotonic() + self.server.limits.body_seconds
        while left:
            if time.monotonic() > end:
                raise RefusedError(408, f"no whole body in {self.server.limits.body_seconds:g} s")
            part = self.rfile.read1(min(left, 2**20))
            if not part:
                raise RefusedError(400, f"a body of {length} bytes was announced, {left} are missing")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def drop(self) -> None:
        """Reads what comes of a body for a second, so that the client sees an answer and no broken connection."""
        end = time.monotonic() + 1
        with contextlib.suppress(OSError):
            while time.monotonic() < end and select.select([self.connection], [], [], 0.2)[0]:
                if not self.rfile.read1(2**20):
                    return

    def parse(self, body: bytes) -> tuple[list[Image.Image], list[str]]:
        """Images and prompts of a request."""
        limits = self.server.limits
        try:
            request = json.loads(body)
            prompts, images = request["prompts"], request["images"]
            if not all(isinstance(given, list) and all(type(x) is str for x in given) for given in (prompts, images)):
                raise TypeError("not two lists of texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RefusedError(
                400, 'not a request; expected {"prompts": [text, ...], "images": [PNG in base64, ...]}'
            ) from error
        if len(prompts) != len(images):
            raise RefusedError(400, f"{len(prompts)} prompts for {len(images)} images; expected one for each")
        if len(images) > limits.queue:
            raise RefusedError(413, f"{len(images)} images; expected at most {limits.queue} in a request")
        return [self.decode(image, place) for place, image in enumerate(images)], prompts

    def decode(self, text: str, place: int) -> Image.Image:
        """An image as RGB; its size is checked before it is decoded."""
        most = self.server.limits.max_pixels
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",))
            if math.prod(image.size) > most:
                width, height = image.size
                raise RefusedError(413, f"image {place} has {width} x {height} pixels; expected at most {most} in all")
            return image.convert("RGB")
        except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RefusedError(400, f"image {place} is no PNG in base64") from error

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def refuse(self, refused: RefusedError) -> None:
        """Answers with an error."""
        self.answer(refused.status, {"error": str(refused)}, refused.retry_after)

    def answer(self, status: int, content: dict, retry_after: int | None = None) -> None:
        """Answers and closes."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *arguments):
        """Nothing: only errors are told."""


def versions(server: Server) -> dict[str, str | None]:
    """Versions of Python and of the scorer's packages; null for one that is not installed."""
    packages = ("pillow",) if server.batcher is None else ("pillow", *server.batcher.scorer.packages)
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def positive(kind):
    """A parser of numbers above 0."""

    def parse(text: str):
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError(text)
        return number

    parse.__name__ = f"{kind.__name__} above 0"
    return parse


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="serve.py", description="Serves a judge of images over HTTP.")
    parser.add_argument("--scorer", required=True, help=f"{', '.join(SCORERS)}, or python:MODULE:FUNCTION")
    parser.add_argument("--model", help="weights of the scorer: a file, folder, name or Hub id (default: its authors')")
    parser.add_argument("--repository", help="clone of the authors' repository, for unifiedreward")
    parser.add_argument("--device", default="cuda", help="torch device of the scorer (default: cuda)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    limits = {
        "batch-size": (int, 8, "most images that are scored together"),
        "wait": (float, 0.01, "seconds that the first image of a batch waits for others"),
        "queue": (int, 256, "most images that wait; more are answered with 429"),
        "connections": (int, 32, "most connections at a time; more are answered with 503"),
        "max-body-mib": (int, 64, "largest request in MiB"),
        "body-seconds": (float, 60.0, "seconds in which a request must have come"),
        "max-pixels": (int, 4096 * 4096, "most pixels of an image"),
        "mock-seconds": (float, None, "seconds that the scorer mock takes for a batch (default: none)"),
    }
    for name, (kind, default, text) in limits.items():
        told = text if default is None else f"{text} (default: {default:g})"
        parser.add_argument(f"--{name}", type=positive(kind), default=default, help=told)
    return parser


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    chosen = flags().parse_args(arguments)
    try:
        server = Server((chosen.host, chosen.port), chosen)
    except (OSError, OverflowError) as error:
        print(f"error: {chosen.host}:{chosen.port}: {error}; choose another --host or --port", file=sys.stderr)
        return 1
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        scorer = load_scorer(chosen.scorer, chosen)
        batcher = Batcher(scorer, batch_size=chosen.batch_size, wait=chosen.wait, queue_size=chosen.queue)
        batcher.start()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        told = f"{kind}{error}" if not isinstance(error, ScorerError) else f"does not score a grey square: {error}"
        print(f"error: {chosen.scorer}: {' '.join(told.split())}", file=sys.stderr)
        return 1
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.batcher = batcher
    print(f"{scorer.name} scores at http://{chosen.host}:{server.server_port}/score", flush=True)
    stop.wait()
    server.stopping = True
    batcher.close(GRACE)
    time.sleep(0.2)  # answers are on their way
    server.shutdown()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
