"""Which workloads a policy of Istio is for: by their labels, or by the Gateway that they belong to.

`selector` and `targetRefs` of istio.type.v1beta1; the rules are Istio's (pkg/config/validation
validateWorkloadSelector, validatePolicyTargetReference; pilot/pkg/model/policyattachment.go).
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from crds.meta import Model
from crds.problems import Finding, Path
from crds.values import invalid, refuse

GATEWAY_NAME_LABEL = "gateway.networking.k8s.io/gateway-name"
"""Label of the workloads that a Gateway of the Kubernetes Gateway API was made for."""

_TARGETS = frozenset(
    {
        ("", "Service"),
        ("core", "Service"),
        ("networking.istio.io", "ServiceEntry"),
        ("gateway.networking.k8s.io", "Gateway"),
        ("gateway.networking.k8s.io", "GatewayClass"),
    }
)


def _match_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    findings = []
    for name, value in labels.items():
        pair = f'"{name}={value}"'
        if not name:
            findings.append(Finding((), f"empty key is not supported in selector: {pair}"))
        if "*" in name or "*" in value:
            findings.append(Finding((name,), f"wildcard is not supported in selector: {pair}"))
    refuse(findings)
    return labels


class LabelSelector(Model):
    """Which workloads, by their labels (istio.type.v1beta1.WorkloadSelector)."""

    match_labels: Annotated[Mapping[str, str], AfterValidator(_match_labels)] = {}
    """Labels that a workload must have, all of them. None = every workload of the namespace."""


class PolicyTargetReference(Model):
    """A Gateway of the Kubernetes Gateway API, or another object, in the policy's own namespace."""

    group: str = ""
    """API group; empty = core."""
    kind: str
    """Kind of the object."""
    name: Annotated[str, Field(min_length=1)]
    """Name of the object."""
    namespace: str = ""
    """Not supported by Istio: must not be set."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.namespace:
            text = "targetRef namespace must not be set; cross namespace referencing is not supported"
            raise invalid(Finding(("namespace",), text))
        if (self.group, self.kind) not in _TARGETS:
            kinds = ", ".join(f"{group or 'core'}/{kind}" for group, kind in sorted(_TARGETS) if group)
            raise ValueError(f"targetRef must be to one of {kinds} but was {self.group}/{self.kind}")
        return self


def refuse_nulls(data: Any) -> Any:
    """Refuse members that are null, as an API server does.

    Where `audiences:` lost its lines, a policy would be wider than it looks. Raises the error of
    `crds.values.invalid`.
    """
    nulls = [Finding(path, "must not be null: give it a value or remove it") for path in _nulls(data, ())]
    if nulls:
        raise invalid(*nulls)
    return data


def _nulls(value: Any, path: Path) -> Iterator[Path]:
    if value is None:
        yield path
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from _nulls(member, (*path, str(name)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, (*path, index))


class LabelSelectingSpec(Model):
    """The part of a policy's spec that says by labels which workloads it is for."""

    selector: LabelSelector | None = None
    """Workloads of the policy's namespace (root namespace: of all), by their labels (default: all)."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_nulls(cls, data: Any) -> Any:
        return refuse_nulls(data)

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels that a selected workload has; none: every workload."""
        return self.selector.match_labels if self.selector else {}

    def selects(self, labels: Mapping[str, str], *, same_namespace: bool) -> bool:  # noqa: ARG002
        """Whether a workload with these labels is selected, if the policy's namespace lets it be."""
        return labels.items() >= self.labels.items()

    def selection_warnings(self) -> list[Finding]:
        """Tell of a selector that selects all."""
        if self.selector is None or self.labels:
            return []
        return [Finding(("spec", "selector"), "workload selector specified without labels")]


class SelectingSpec(LabelSelectingSpec):
    """The part of a policy of Istio that says which workloads it is for."""

    target_ref: PolicyTargetReference | None = None
    """Older form of a single entry of targetRefs."""
    target_refs: Annotated[tuple[PolicyTargetReference, ...], Field(max_length=16)] = ()
    """Gateways of the Kubernetes Gateway API, instead of a selector."""

    @property
    def targets(self) -> tuple[PolicyTargetReference, ...]:
        """targetRefs, or targetRef."""
        return self.target_refs or ((self.target_ref,) if self.target_ref else ())

    def selects(self, labels: Mapping[str, str], *, same_namespace: bool) -> bool:
        """Whether a workload with these labels is selected, if the policy's namespace lets it be.

        Those with targets are for workloads of the Gateway API in the policy's own namespace alone.
        """
        if not self.targets:
            return super().selects(labels, same_namespace=same_namespace)
        gateway = labels.get(GATEWAY_NAME_LABEL)
        return same_namespace and any(
            (target.group, target.kind, target.name) == ("gateway.networking.k8s.io", "Gateway", gateway)
            for target in self.targets
        )

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if sum(bool(way) for way in (self.selector is not None, self.target_ref, self.target_refs)) > 1:
            raise ValueError("only one of targetRefs or workloadSelector can be set")
        return self

    def selection_warnings(self) -> list[Finding]:
        """Tell of a selector that selects all, and of targets that are no Gateway."""
        return super().selection_warnings() + [
            Finding(("spec", "targetRefs"), f"{target.kind} {target.name} is not the target of any proxy")
            for target in self.targets
            if target.kind != "Gateway"
        ]
