"""What is kept of the text of a NACK."""

import pytest

from xds.group import MAX_DETAIL
from xds.nack import nack_text
from xds.resources import CDS, SDS

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
    assert nack_text(SDS, text) == kept


def test_the_text_about_another_type_is_kept_and_cut() -> None:
    assert nack_text(CDS, 'cluster "a" is bad') == 'cluster "a" is bad'
    assert nack_text(CDS, "x" * 2 * MAX_DETAIL) == "x" * MAX_DETAIL
