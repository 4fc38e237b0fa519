"""What Envoys refuse, and what stands in for it, is kept on disk, and never a secret."""

import base64
import json
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from llmplane.acknowledged import AcknowledgedFile
from translator.proxy import Proxy, ProxyType
from xds import protos
from xds.group import Refusal
from xds.resources import CDS, ECDS, SDS, Resource

REFUSED = (CDS, "a", "0123456789abcdef")
SLEEP = Proxy(ProxyType.SIDECAR, "default", "sleep")


def refusal(group: Proxy = SLEEP, version: str = REFUSED[2]) -> Refusal:
    return Refusal(group, CDS, "a", version, "no such file", time.time(), "sleep-1")


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
    assert file.parent.stat().st_mode & 0o077 == 0
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


def test_what_is_put_again_is_new_again(tmp_path: Path) -> None:
    file = AcknowledgedFile(tmp_path / "file.json")
    for number in (0, 1, 0, *range(2, 257)):
        file.put((CDS, "a", str(number)), cluster(2 if file.get((CDS, "a", str(number))) else 1))
    assert [file.get((CDS, "a", str(number))) for number in range(3)] == [cluster(2), None, cluster(1)]


def test_the_same_is_not_written_again(tmp_path: Path) -> None:
    """A thousand Envoys may refuse it at once."""
    path = tmp_path / "file.json"
    file = AcknowledgedFile(path)
    for _ in range(2):
        file.put(REFUSED, cluster(1))
        file.add(refusal())
        written = [(each.stat().st_ino, each.stat().st_mtime_ns) for each in sorted(tmp_path.iterdir())]
    assert len(written) == 2
    for _ in range(2):
        file.put(REFUSED, cluster(1))
        file.add(refusal())
        file.drop(refusal(version="another"))
    assert [(each.stat().st_ino, each.stat().st_mtime_ns) for each in sorted(tmp_path.iterdir())] == written


def test_another_process_knows_who_refused(tmp_path: Path) -> None:
    one, two = (AcknowledgedFile(tmp_path / "state" / "file.json") for _ in range(2))
    other = Proxy(ProxyType.SIDECAR, "default", "other")
    assert not one.refusals(SLEEP)
    one.add(refusal())
    two.add(refusal(other))
    for file in (one, two):
        for group in (SLEEP, other):
            assert [(each.group, each.refused, each.detail) for each in file.refusals(group)] == [
                (group, REFUSED, "no such file")
            ]
    one.drop(refusal())
    assert not two.refusals(SLEEP)
    assert two.refusals(other)
    assert {each.stat().st_mode & 0o077 for each in (tmp_path / "state").iterdir()} == {0}


def test_what_is_looked_at_often_is_read_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def read_text(path: Path, encoding: str) -> str:
        reads.append(path)
        return path.read_bytes().decode(encoding)

    monkeypatch.setattr(Path, "read_text", read_text)
    file = AcknowledgedFile(tmp_path / "file.json")
    for number in range(1, 4):
        file.add(refusal(version=str(number)))
        reads.clear()
        for _ in range(3):
            assert len(list(file.refusals(SLEEP))) == number
            assert file.get(REFUSED) is None
        assert len(reads) == 1
    reads[0].unlink()
    assert not file.refusals(SLEEP)


def test_a_file_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('[{"refused": 1}]')
    with capture_logs() as logs:
        assert AcknowledgedFile(path).get(REFUSED) is None
        AcknowledgedFile(tmp_path).put(REFUSED, cluster(1))
        for text in ("?", "[1]", '[{"refused": 1}]', '[{"refused": ["a", "b", "c"], "audiences": 1}]'):
            path.with_suffix(".refused.json").write_text(text)
            assert not AcknowledgedFile(path).refusals(SLEEP)
    assert {entry["log_level"] for entry in logs} == {"warning"}
