"""What the HTTP servers of the long-running commands have in common: anybody may connect to them."""

import logging

from aiohttp import web
from aiohttp.http import HttpProcessingError

_PATIENCE = 75
"""Seconds that a connection may take for a request, and between two; more than Prometheus leaves between."""


def _is_no_bad_request(record: logging.LogRecord) -> bool:
    """Tell what may be logged: aiohttp shows of a request that is no HTTP what is in it, tokens too."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_LOGGER = logging.getLogger(__name__)
_LOGGER.addFilter(_is_no_bad_request)


def runner_of(app: web.Application) -> web.AppRunner:
    """Return what serves an application."""
    return web.AppRunner(
        app, access_log=None, logger=_LOGGER, keepalive_timeout=_PATIENCE, shutdown_timeout=1
    )
