"""What all kinds have in common: metadata, selectors, string matches."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

from crds.problems import Finding, ObjectKey
from crds.values import KubernetesName, Namespace, Regex

GROUP = "istio.alibabacloud.com"
"""The API group of LLMProvider and LLMRoute."""

VERSIONS = ("v1beta1", "v1")
"""The versions of `GROUP`, with one schema; the first one is the storage version."""

DEFAULT_NAMESPACE = "default"
"""The namespace of an object that names none."""


def cel(rules: Mapping[str, str]) -> dict[str, Any]:
    """Return what a CRD's schema says of rules between fields: their messages, and what must hold (CEL)."""
    validations = [{"rule": rule, "message": message} for message, rule in rules.items()]
    return {"x-kubernetes-validations": validations}


class Model(BaseModel):
    """A part of an object: unknown members are errors, members that are null count as absent.

    Members are written in camelCase and read as attributes in snake_case.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a field's neighbour may be a key
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: value for name, value in data.items() if value is not None}
        return data


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


class ObjectMeta(Model):
    """Kubernetes' metadata, as far as we use it; other members are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: KubernetesName
    namespace: Namespace = DEFAULT_NAMESPACE
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}
    creation_timestamp: Annotated[datetime, AfterValidator(_utc)] | None = None
    """When the API server made the object; objects of files have none."""
    generation: int | None = None
    resource_version: str | None = None
    uid: str | None = None


class WorkloadSelector(Model):
    """Which workloads an object is for, by their labels."""

    labels: Mapping[str, str] = {}
    """Labels that a workload must have, all of them. None = every workload."""

    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether a workload with these labels is selected."""
        return labels.items() >= self.labels.items()


class StringMatch(Model):
    """How a string is matched. Nothing set, or the regex `*`, matches any value that is present (Istio)."""

    model_config = ConfigDict(json_schema_extra={"maxProperties": 1})

    exact: str | None = None
    """The whole value."""
    prefix: str | None = None
    """The beginning of the value."""
    regex: Regex | None = None
    """A regular expression (RE2) for the whole value."""

    @property
    def is_present(self) -> bool:
        """Whether any value matches.

        `*` is no regular expression, but Istio reads it so (CanBeConvertedToPresentMatch).
        """
        return self.exact is None and self.prefix is None and self.regex in {None, "*"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(way is not None for way in (self.exact, self.prefix, self.regex)) > 1:
            raise ValueError("must have only one of exact, prefix and regex")
        if self.prefix == "":
            raise ValueError("has an empty prefix, which matches every value: write {} for that")
        return self


class BaseObject(Model):
    """An object: apiVersion, kind, metadata, and what its kind adds. A status is ignored: we write it."""

    api_version: str
    kind: str
    metadata: ObjectMeta

    @model_validator(mode="before")
    @classmethod
    def _drop_status(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: value for name, value in data.items() if name != "status"}
        return data

    @property
    def name(self) -> str:
        """The object's name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """The object's namespace."""
        return self.metadata.namespace

    @cached_property
    def key(self) -> ObjectKey:
        """What names the object."""
        return ObjectKey(self.kind, self.namespace, self.name)

    @cached_property
    def age(self) -> tuple[str, str, str]:
        """A key that sorts the older first, then by name and namespace, as Istio; files have no age."""
        created = self.metadata.creation_timestamp
        return (created.isoformat() if created else "", self.name, self.namespace)

    def warnings(self) -> list[Finding]:
        """Tell of what is valid, but probably not what was meant."""
        return []
