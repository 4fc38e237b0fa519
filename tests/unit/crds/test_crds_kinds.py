"""Which kinds are read, which are ignored, and which are errors."""

import pytest

from crds.core import Secret, Service
from crds.gateway import Gateway
from crds.kinds import UnknownKindError, UnsupportedKindError, lookup
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.meta import BaseObject


@pytest.mark.parametrize(
    ("api_version", "kind", "model"),
    [
        ("istio.alibabacloud.com/v1beta1", "LLMProvider", LLMProvider),
        ("istio.alibabacloud.com/v1", "LLMProvider", LLMProvider),
        ("istio.alibabacloud.com/v1beta1", "LLMRoute", LLMRoute),
        ("networking.istio.io/v1", "Gateway", Gateway),
        ("networking.istio.io/v1beta1", "Gateway", Gateway),
        ("networking.istio.io/v1alpha3", "Gateway", Gateway),
        ("v1", "Secret", Secret),
        ("v1", "Service", Service),
    ],
)
def test_kinds_that_are_read(api_version: str, kind: str, model: type[BaseObject]) -> None:
    assert lookup(api_version, kind) is model


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("v1", "ServiceAccount"),
        ("v1", "ConfigMap"),
        ("v1", "Namespace"),
        ("apps/v1", "Deployment"),
        ("batch/v1", "Job"),
        ("networking.k8s.io/v1", "Ingress"),
        ("gateway.networking.k8s.io/v1", "Gateway"),
        ("serving.example.k8s.io/v1", "Service"),
    ],
)
def test_kinds_of_kubernetes_that_are_not_needed_are_ignored(api_version: str, kind: str) -> None:
    assert lookup(api_version, kind) is None


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("networking.istio.io/v1", "VirtualService"),
        ("networking.istio.io/v1", "DestinationRule"),
        ("security.istio.io/v1", "PeerAuthentication"),
        ("networking.istio.io/v1", "Sidecar"),
    ],
)
def test_a_kind_of_istio_is_never_passed_over_in_silence(api_version: str, kind: str) -> None:
    group = api_version.partition("/")[0]
    with pytest.raises(UnsupportedKindError) as refused:
        lookup(api_version, kind)
    assert str(refused.value) == (
        f"'{kind}' of {group} is not supported by this version of llmplane; it has no effect"
    )


@pytest.mark.parametrize(
    ("api_version", "kind", "message"),
    [
        (
            "istio.alibabacloud.com/v1beta1",
            "LLMProviders",
            "unknown kind 'LLMProviders' of istio.alibabacloud.com, did you mean 'LLMProvider'?",
        ),
        (
            "istio.alibabacloud.com/v1beta1",
            "llmroute",
            "unknown kind 'llmroute' of istio.alibabacloud.com, did you mean 'LLMRoute'?",
        ),
        (
            "istio.alibabacloud.com/v1beta1",
            "ASMSecurityPolicy",
            "unknown kind 'ASMSecurityPolicy' of istio.alibabacloud.com",
        ),
        (
            "istio.alibabacloud.com/v1alpha1",
            "LLMRoute",
            (
                "unknown version 'istio.alibabacloud.com/v1alpha1', must be"
                " istio.alibabacloud.com/v1beta1 or istio.alibabacloud.com/v1"
            ),
        ),
        (
            "v1",
            "LLMRoute",
            (
                "'v1' has no kind 'LLMRoute': its apiVersion is"
                " istio.alibabacloud.com/v1beta1 or istio.alibabacloud.com/v1"
            ),
        ),
        (
            "istio.alibaba.com/v1beta1",
            "LLMRouter",
            "unknown kind 'LLMRouter' of istio.alibaba.com, did you mean 'istio.alibabacloud.com/LLMRoute'?",
        ),
        ("argoproj.io/v1alpha1", "Rollout", "unknown kind 'Rollout' of argoproj.io"),
    ],
)
def test_kinds_that_do_not_exist(api_version: str, kind: str, message: str) -> None:
    with pytest.raises(UnknownKindError) as refused:
        lookup(api_version, kind)
    assert str(refused.value) == message
