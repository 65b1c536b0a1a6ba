"""What one visitor, and all of them together, may ask of the demo."""

from __future__ import annotations

from dataclasses import dataclass, fields

_ENVELOPE = 256  # bytes of a message beside its prompt
_ESCAPED = 12  # bytes of one character as JSON may write it: two \\uXXXX


@dataclass(frozen=True)
class Limits:
    """All bounds of the server, each at least 1 unless it says otherwise. Raises ValueError.

    users: videos made at the same time, each with a cache of its own on the device.
    waiting: visitors in line for a place; at least 0.
    connections: open pages in all, those that only look on included.
    max_frames: pixel frames of one video, which then ends.
    prompt_chars: characters of a prompt.
    message_bytes: bytes of one message from a visitor.
    messages_per_second: messages from a visitor on average; twice as many may come at once.
    mistakes: wrong messages since the last start that end a connection.
    ahead: pixel frames that may be made and not yet shown; then a video waits for its visitor.
    idle_seconds: how long a visitor with a place may show no sign of watching before losing place and connection.
    rest_seconds: the same for a visitor without a place, who may still fetch a video.
    grace_seconds: how long a video can be fetched after its visitor has gone; at least 0.
    place_seconds: how long a place is kept while others wait in line.
    send_seconds: how long a visitor's machine may take no byte of what it is sent, or send no request on a connection
        that it opened.
    downloads: downloads that are made or sent at the same time.
    download_seconds: how long sending a download may take.
    """

    users: int = 4
    waiting: int = 8
    connections: int = 64
    max_frames: int = 600
    prompt_chars: int = 4000
    message_bytes: int = 49152
    messages_per_second: int = 20
    mistakes: int = 5
    ahead: int = 24
    idle_seconds: int = 120
    rest_seconds: int = 900
    grace_seconds: int = 60
    place_seconds: int = 600
    send_seconds: int = 15
    downloads: int = 4
    download_seconds: int = 300

    @property
    def sockets(self) -> int:
        """TCP connections in all: each page may have one for its websocket and another for what it fetches."""
        return 2 * self.connections + 32

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < (least := 0 if field.name in ("waiting", "grace_seconds") else 1):
                raise ValueError(f"--{field.name} {getattr(self, field.name)}: give a number of at least {least}")
        if self.message_bytes < (least := self.prompt_chars * _ESCAPED + _ENVELOPE):
            raise ValueError(
                f"--message_bytes {self.message_bytes}: --prompt_chars {self.prompt_chars} may take {least}: "
                "give at least as many, or a smaller --prompt_chars"
            )
        if self.connections < (least := self.users + self.waiting):
            raise ValueError(f"--connections {self.connections}: --users and --waiting need {least}: give as many")
