"""uvicorn's connections by their two addresses, so that a fault can cut the one it came in by."""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Address = tuple[Any, Any]  # the client's and the server's (host, port)
AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST


class Connections:
    """Open transports; `protocol` is what uvicorn is told to speak, and registers them here."""

    def __init__(self) -> None:
        self._open: dict[Address, asyncio.Transport] = {}
        connections = self._open

        class Registered(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                connections[_address(transport)] = transport

            def connection_lost(self, exc: Exception | None) -> None:
                connections.pop(_address(self.transport), None)
                super().connection_lost(exc)

        self.protocol: type[asyncio.Protocol] = Registered

    def reset(self, scope: Any) -> None:
        """RST: the peer sees its connection reset, and what was not sent yet is lost."""
        if transport := self._find(scope):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            transport.abort()

    def close(self, scope: Any) -> None:
        """FIN, after what was sent."""
        if transport := self._find(scope):
            transport.close()

    def _find(self, scope: Any) -> asyncio.Transport | None:
        return self._open.get((tuple(scope["client"]), tuple(scope["server"])))


def _address(transport: asyncio.BaseTransport) -> Address:
    return tuple(transport.get_extra_info("peername")[:2]), tuple(transport.get_extra_info("sockname")[:2])
