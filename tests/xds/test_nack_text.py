"""What is kept of the text of a NACK."""

import pytest

from xds.group import MAX_DETAIL
from xds.nack import nack_text
from xds.resources import CDS, ECDS, LDS, SDS

# Word by word what Envoy 1.40 answers to a Secret that violates a rule.
VIOLATION = r"""goo.gle/debugproto
name: "x"
tls_certificate {
  certificate_chain {
    inline_string: "-----BEGIN CERTIFICATE-----\n\"quoted\"\n"
  }
  private_key {
    inline_string: "sk-0123456789"
  }
  password {
    environment_variable: ""
  }
}
: Proto constraint validation failed (SecretValidationError.TlsCertificate: embedded message failed)"""


@pytest.mark.parametrize("type_url", [CDS, SDS])
def test_the_refused_message_is_left_out_and_the_reason_is_kept(type_url: str) -> None:
    reason = (
        "Proto constraint validation failed (SecretValidationError.TlsCertificate: embedded message failed)"
    )
    assert nack_text(type_url, VIOLATION) == reason


def test_no_key_is_in_a_text_that_is_cut_off() -> None:
    assert not [end for end in range(len(VIOLATION)) if "sk-" in nack_text(SDS, VIOLATION[:end])]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('bad: {"inline_string": "sk-1"}', "bad: {[redacted]: [redacted]}"),
        ("inline_string: sk-1\nname: a", "inline_string: [redacted]\nname: a"),
        ("inline_bytes: c2stMQ==", "inline_bytes: [redacted]"),
        ("Failed to load certificate chain from <inline>", "Failed to load certificate chain from <inline>"),
    ],
)
def test_other_forms_in_which_a_secret_could_be_shown(text: str, kept: str) -> None:
    assert nack_text(SDS, text) == nack_text(ECDS, text) == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            'bad: request_headers_to_add { value: "sk-1" }',
            "bad: request_headers_to_add { value: [redacted] }",
        ),
        ('{"key":"authorization","value":"sk-1', '{"key":[redacted],"value":[redacted]'),
        ('private_key { inline_string: sk-1 } of "a"', 'private_key { inline_string: [redacted] } of "a"'),
        ("unknown cluster \"a\", listener 'b: c'", "unknown cluster \"a\", listener 'b: c'"),
    ],
)
def test_of_another_type_the_values_of_fields_are_hidden_and_names_are_kept(text: str, kept: str) -> None:
    """The headers of a collector are in a Listener."""
    assert nack_text(LDS, text) == kept


def test_a_text_full_of_beginnings_of_messages_is_read_once() -> None:
    """Else one such text of a megabyte would keep all proxies waiting for minutes."""
    assert nack_text(CDS, "bad: " + "goo.gle/debugproto " * 50_000) == "bad: "


def test_the_text_about_another_type_is_kept_and_cut() -> None:
    assert nack_text(CDS, 'cluster "a" is bad') == 'cluster "a" is bad'
    assert nack_text(CDS, "x" * 2 * MAX_DETAIL) == "x" * MAX_DETAIL
