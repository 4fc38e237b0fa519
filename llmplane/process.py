"""What the long-running commands have in common: their log, and how they are ended."""

import asyncio
import resource
import signal
import sys
from contextlib import suppress

import structlog


def log_to_stderr() -> None:
    """Log for people at a terminal, else as JSON, one line an event."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def stopped_by_signal() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def allow_many_files() -> None:
    """Let this process open as many files as it may at all: each connection is one, and 1,024 are usual."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has no more than OPEN_MAX, whatever it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
