"""What stands in for refused resources is kept on disk, and never a secret."""

import base64
import json
from pathlib import Path

from structlog.testing import capture_logs

from llmplane.acknowledged import AcknowledgedFile
from xds import protos
from xds.resources import CDS, ECDS, SDS, Resource

REFUSED = (CDS, "a", "0123456789abcdef")


def cluster(seconds: int) -> Resource:
    return Resource.of(protos.Cluster(name="a", connect_timeout={"seconds": seconds}, type="EDS"))


def test_another_process_reads_what_one_has_written(tmp_path: Path) -> None:
    file = tmp_path / "state" / "file.json"
    writer, reader = AcknowledgedFile(file), AcknowledgedFile(file)
    assert reader.get(REFUSED) is None
    for version in (1, 2):
        writer.put(REFUSED, cluster(version))
        found = reader.get(REFUSED)
        assert found == cluster(version)
        assert found.delta_frame == cluster(version).delta_frame
    assert file.stat().st_mode & 0o077 == 0
    assert list(file.parent.iterdir()) == [file]


def test_secrets_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    secret = protos.Secret(name="a", generic_secret={"secret": {"inline_string": "sk-secret"}})
    AcknowledgedFile(file).put((SDS, "a", "0123456789abcdef"), Resource.of(secret))
    assert not file.exists()


def test_keys_of_clients_are_not_kept_and_other_policies_are(tmp_path: Path) -> None:
    file = AcknowledgedFile(tmp_path / "file.json")
    credentials = [{"key": "sk-secret", "client": "alice"}]
    for name, config in (
        ("api_keys", protos.ApiKeyAuth(credentials=credentials)),
        ("policies", protos.RBAC()),
    ):
        policy = protos.TypedExtensionConfig(name=name, typed_config=protos.pack(config))
        file.put((ECDS, name, "0123456789abcdef"), Resource.of(policy))
    assert file.get((ECDS, "api_keys", "0123456789abcdef")) is None
    assert file.get((ECDS, "policies", "0123456789abcdef"))
    assert b"sk-secret" not in base64_of(tmp_path / "file.json")


def base64_of(file: Path) -> bytes:
    """Return all that is encoded in a file."""
    return b"".join(base64.b64decode(record["body"]) for record in json.loads(file.read_text()))


def test_the_oldest_are_forgotten(tmp_path: Path) -> None:
    file = AcknowledgedFile(tmp_path / "file.json")
    for number in range(300):
        file.put((CDS, "a", str(number)), cluster(1))
    assert [number for number in range(300) if file.get((CDS, "a", str(number)))] == list(range(44, 300))


def test_a_file_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('[{"refused": 1}]')
    with capture_logs() as logs:
        assert AcknowledgedFile(path).get(REFUSED) is None
        AcknowledgedFile(tmp_path).put(REFUSED, cluster(1))
    assert {entry["log_level"] for entry in logs} == {"warning"}
