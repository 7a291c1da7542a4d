"""The reading half of a WebSocket (RFC 6455) on the standard library: enough to follow a ComfyUI server."""

import base64
import contextlib
import hashlib
import os
import socket
import struct
from urllib.parse import urlsplit

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocket:
    """A connection to `url` (`http://host:port/path`); `receive` gives one message at a time."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), timeout)
        self._buffer = b""
        key = base64.b64encode(os.urandom(16))
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key.decode()}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += self._some()
        head, self._buffer = head.split(b"\r\n\r\n", 1)
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        if b" 101 " not in head.split(b"\r\n")[0] or accept not in head:
            raise ConnectionError(f"no WebSocket at {url}: {head.splitlines()[0].decode(errors='replace')}")

    def _some(self) -> bytes:
        piece = self._socket.recv(65536)
        if not piece:
            raise ConnectionError("the server closed the WebSocket")
        return piece

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += self._some()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _send(self, opcode: int, payload: bytes) -> None:
        # A client masks what it sends; control frames are at most 125 bytes long.
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def _frame(self) -> tuple[bool, int, bytes]:
        first, second = self._exactly(2)
        length = second & 0x7F
        if length == 126:
            length = struct.unpack(">H", self._exactly(2))[0]
        elif length == 127:
            length = struct.unpack(">Q", self._exactly(8))[0]
        return bool(first & 0x80), first & 0x0F, self._exactly(length)

    def receive(self, timeout: float) -> str | bytes:
        """The next whole message, text or binary; `TimeoutError` where none comes within `timeout` seconds."""
        self._socket.settimeout(timeout)
        parts: list[bytes] = []
        kind = TEXT
        while True:
            final, opcode, payload = self._frame()
            if opcode == PING:
                self._send(PONG, payload[:125])
            elif opcode == CLOSE:
                raise ConnectionError("the server closed the WebSocket")
            elif opcode != PONG:
                kind = opcode or kind
                parts.append(payload)
                if final:
                    whole = b"".join(parts)
                    return whole.decode() if kind == TEXT else whole

    def close(self) -> None:
        """Say goodbye and close the socket."""
        with contextlib.suppress(OSError):
            self._send(CLOSE, b"")
        self._socket.close()
