"""What a user got wrong or can put right: one line, shown without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that a user got wrong or can put right; ``cli.run_cli`` shows it as one line, without a traceback."""


class ConfigError(UserError):
    """One line: key path, offending value, remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class AgreedError(UserError):
    """Raised on every rank alike: rank 0 says it for all."""
