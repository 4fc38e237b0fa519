"""The words of a NACK: short, and without what is secret."""

import re
from typing import Final

from xds.group import MAX_DETAIL
from xds.resources import ECDS, SDS

_LONGEST: Final = 1 << 20
"""Characters that are looked at."""

_MESSAGE: Final = re.compile(r"goo\.gle/debug\w+\s.*?\n: ", re.DOTALL)
"""Envoy 1.40 shows the message that violates a rule, with the keys of a Secret, and then says which rule."""

_VALUE: Final = re.compile(
    r""""(?:\\.|[^"\\])*(?:"|\\?$)|(?<=inline_string: )\S+|(?<=inline_bytes: )\S+""", re.DOTALL
)
"""Values in protobuf's text format, JSON or YAML, perhaps cut off."""


def nack_text(type_url: str, text: str) -> str:
    """Return Envoy's text (error_detail.message) without the message that it refuses, cut at MAX_DETAIL."""
    text = _MESSAGE.sub("", text[:_LONGEST])
    if type_url in {SDS, ECDS}:  # another version may show it in another form; ECDS has clients' API keys
        text = _VALUE.sub("[redacted]", text)
    return text[:MAX_DETAIL]
