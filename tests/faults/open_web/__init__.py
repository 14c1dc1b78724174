"""The open web at its worst: a server with one address per fault, and the verdict that is due for each.

`python -m tests.faults.open_web` serves all of them, and prints a table of URLs to try by hand.
"""

from . import bodies, codings, connections, framing, headers, redirects, statuses, tls, urls
from .messages import MAX_IMAGE_BYTES, SECRET
from .registry import FAULTS, Fault
from .server import OpenWeb

__all__ = [
    "FAULTS",
    "MAX_IMAGE_BYTES",
    "SECRET",
    "Fault",
    "OpenWeb",
    "bodies",
    "codings",
    "connections",
    "framing",
    "headers",
    "redirects",
    "statuses",
    "tls",
    "urls",
]
