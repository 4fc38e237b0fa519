"""Pods in, pods with their proxy out: `injection/NAME.yaml` and, beside it, what `llmplane inject` prints."""

from pathlib import Path

import pytest
import yaml

from llmplane.address import Address
from llmplane.injection import InjectionSettings, inject_documents

CASES = sorted(
    path for path in (Path(__file__).parent / "injection").glob("*.yaml") if ".injected" not in path.name
)
SETTINGS = InjectionSettings(
    "llmplane-proxy:0.1.0",
    Address("llmplane.llmplane-system.svc", 18000),
    "-----BEGIN CERTIFICATE-----\n...\n-----END CERTIFICATE-----\n",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.stem))
def test_injection(case: Path, update_golden: bool) -> None:
    text = inject_documents(case.read_text(encoding="utf-8"), SETTINGS)
    expected = case.with_suffix(".injected.yaml")
    if update_golden:
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8"), "rerun with --update-golden if this is meant"


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.stem))
def test_what_is_injected_is_left_alone(case: Path) -> None:
    once = inject_documents(case.read_text(encoding="utf-8"), SETTINGS)
    assert inject_documents(once, SETTINGS) == once


def test_what_no_proxy_is_for_means_the_same_as_before() -> None:
    (case,) = (case for case in CASES if case.stem == "left-alone")
    text = case.read_text(encoding="utf-8")
    assert yaml.safe_load(inject_documents(text, SETTINGS)) == yaml.safe_load(text)
