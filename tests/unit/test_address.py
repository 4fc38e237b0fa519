"""Addresses and other values as they are written on the command line."""

import click
import pytest

from crds.values import KubernetesName, Namespace
from llmplane.address import Address
from llmplane.options import AddressType, ConnectToType, IPAddressType, NameType, PairType


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:18000", ("127.0.0.1", 18000), True),
        ("127.0.0.9:0", ("127.0.0.9", 0), True),
        ("localhost:80", ("localhost", 80), True),
        ("[::1]:80", ("::1", 80), True),
        ("[::]:80", ("::", 80), False),
        ("0.0.0.0:80", ("0.0.0.0", 80), False),  # noqa: S104 - not bound
        ("llmplane.llmplane-system.svc:18000", ("llmplane.llmplane-system.svc", 18000), False),
    ],
)
def test_an_address_is_host_and_port(text: str, address: tuple[str, int], loopback: bool) -> None:
    parsed = Address.parse(text)
    assert parsed == address
    assert str(parsed) == text
    assert parsed.is_loopback is loopback


@pytest.mark.parametrize(
    "text", ["", ":80", "host", "host:", "host:x", "host:65536", "host:٣", "::1:80", "[host]:80", "[]:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Address.parse(text)


def test_connect_to_is_that_of_curl() -> None:
    convert = ConnectToType().convert
    assert convert("Dashscope.aliyuncs.com:443:127.0.0.1:8443", None, None) == (
        ("dashscope.aliyuncs.com", 443),
        ("127.0.0.1", 8443),
    )
    assert convert("a:443:[::1]:8443", None, None) == (("a", 443), ("::1", 8443))
    for text in ("a:443", "a:443:b", "a:b:c:1", ":443:b:1", "a:443::1"):
        with pytest.raises(click.BadParameter, match="is not HOST:PORT:ADDR:PORT"):
            convert(text, None, None)


def test_a_pair_is_split_at_the_first_equals_sign_and_never_repeated() -> None:
    convert = PairType().convert
    assert convert(" API_KEY of dashscope=sk-a=b", None, None) == (" API_KEY of dashscope", "sk-a=b")
    assert convert("NAME=", None, None) == ("NAME", "")
    for text in ("sk-secret", "=sk-secret", " =sk-secret"):
        with pytest.raises(click.BadParameter) as error:
            convert(text, None, None)
        assert "sk-secret" not in str(error.value)


def test_names_are_those_that_kubernetes_takes() -> None:
    assert NameType(KubernetesName).convert("sleep.v1", None, None) == "sleep.v1"
    for form, name in ((KubernetesName, "Sleep"), (KubernetesName, "a/b"), (Namespace, "a.b")):
        with pytest.raises(click.BadParameter, match="must be"):
            NameType(form).convert(name, None, None)


def test_other_forms() -> None:
    assert AddressType().convert("a:1", None, None) == Address("a", 1)
    assert AddressType().convert(Address("a", 1), None, None) == Address("a", 1)
    assert IPAddressType().convert("127.0.0.2", None, None) == "127.0.0.2"
    with pytest.raises(click.BadParameter, match="is not an IP address"):
        IPAddressType().convert("example.com", None, None)
