"""The port from which Prometheus reads."""

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client as prometheus
from prometheus_client.exposition import ThreadingWSGIServer

from mint_core.addresses import host_and_port

logger = logging.getLogger(__name__)

READER_LIMIT_S = 30.0  # without a byte
MOST_READERS = 64  # at a time, each a thread and a descriptor of the service

Context = Callable[[], ssl.SSLContext]


def serve_http(
    registry: prometheus.CollectorRegistry, address: str, tls: Context | None, sign: str
) -> int:
    """Answers HTTP on HOST:PORT from threads of its own, or HTTPS by what `tls` says for each
    connection, and returns the port: with metrics at /metrics, elsewhere with the line `sign`.
    Raises OSError.
    """
    host, port = host_and_port(address, "metrics_address")
    kind = _Server6 if ":" in host else _Server
    server: _Server = make_server(host, port, _application(registry, sign), kind, _Silent)
    server.tls, server.places = tls, threading.Semaphore(MOST_READERS)
    threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()
    return server.server_port


def _application(registry: prometheus.CollectorRegistry, sign: str) -> Callable[..., Any]:
    metrics = prometheus.make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            found: Iterable[bytes] = metrics(environ, start)
            return found
        status = "200 OK" if environ["PATH_INFO"] == "/" else "404 Not Found"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{sign}\n".encode()]

    return answer


class _Server(ThreadingWSGIServer):
    tls: Context | None = None
    places: threading.Semaphore

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        connection.settimeout(READER_LIMIT_S)
        if self.tls is None:
            return connection, peer
        # Whoever does not greet holds up his own thread alone.
        return self.tls().wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ), peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("a reader of metrics at %s got no answer", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
