"""Configuration for people has no secret in it, wherever in a resource it is."""

from llmplane.dump import to_yaml
from xds import protos
from xds.resources import Resource

KEY = "sk-of-a-client"


def test_keys_of_clients_are_redacted_within_a_chain_of_filters() -> None:
    keys = protos.ApiKeyAuth(credentials=[{"key": KEY, "client": "alice"}])
    chain = protos.FilterChainConfig(
        default_filter_chain={"filters": [{"name": "keys", "typed_config": protos.pack(keys)}]}
    )
    for config in (keys, chain):
        text = to_yaml([Resource.of(protos.TypedExtensionConfig(name="a", typed_config=protos.pack(config)))])
        assert KEY not in text
        assert "client: alice" in text
        assert "key: '[redacted]'" in text
