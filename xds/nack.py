"""The words of a NACK: short, and without what is secret."""

import re
from typing import Final

from xds.group import MAX_DETAIL
from xds.resources import ECDS, SDS

_LONGEST: Final = 1 << 20
"""Characters that are looked at."""

_MESSAGE: Final = re.compile(r"goo\.gle/debug\w+\s(?:.*?\n: |.*)", re.DOTALL)
"""Envoy 1.40 shows the message that violates a rule, with the keys of a Secret, and then says which rule.

Where that does not come, all of the rest is the message: it is cut off.
"""

_QUOTED: Final = r""""(?:\\.|[^"\\])*(?:"|\\?$)"""
_INLINE: Final = r"(?<=inline_string: )\S+|(?<=inline_bytes: )\S+"

_VALUE: Final = re.compile(f"{_QUOTED}|{_INLINE}", re.DOTALL)
"""Values in protobuf's text format, JSON or YAML, perhaps cut off."""

_FIELD: Final = re.compile(f"(?:(?<=: )|(?<=:)){_QUOTED}|{_INLINE}", re.DOTALL)
"""The same after the name of a field, and nothing else that is quoted: Envoy's words quote names."""


def nack_text(type_url: str, text: str) -> str:
    """Return Envoy's text (error_detail.message) without the message that it refuses, cut at MAX_DETAIL."""
    text = _MESSAGE.sub("", text[:_LONGEST])
    # Another version may show it in another form. ECDS has clients' API keys, LDS headers for collectors.
    text = (_VALUE if type_url in {SDS, ECDS} else _FIELD).sub("[redacted]", text)
    return text[:MAX_DETAIL]
