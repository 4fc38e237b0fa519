"""The API's own validation rules, checked before an Envoy checks them.

Envoy's messages carry rules for their fields (protoc-gen-validate, PGV). Envoy checks them when it decodes a
response, and one violation in one resource makes it drop the whole response, with every good resource in it
(envoyproxy/envoy#32880). So a resource with violations must not be sent.

The rules are those of Envoy 1.40, in `protos/validation_rules.json`, the work of
`tools/derive_validation_rules.py`. What they mean is what the C++ code does that PGV makes for Envoy
(bufbuild/protoc-gen-validate, `templates/cc`), and the texts are its texts, but for durations, which are
written as in JSON. At the same place and with the same effect Envoy checks that no duration is negative or
out of range (`MessageUtil::validate`); so does this module.

An `Any` is looked into if `protos.POOL` holds its type. Envoy does that later, when it unpacks it; what is
wrong there costs it only the one resource.

    for violation in validation.violations(protos.Cluster(name="a", connect_timeout={})):
        print(violation)  # connect_timeout: value must be greater than 0s
"""

import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from xds import protos

RULES: Final = Path(protos.__file__).with_name("validation_rules.json")


class Violation(NamedTuple):
    """A field, named by its path from the checked message, and what is wrong with it.

    The path goes through an Any into its content, and ends with the name of a oneof if no member is set.
    The text never holds the value, which may be a key.
    """

    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


def violations(message: Message) -> list[Violation]:
    """Return everything in a message of `protos` that breaks a rule of the API; nothing if it is valid.

    Of an Any its content is checked, and paths begin there. Not to be called in several threads at once.
    """
    return _validator().violations(message)


Check = Callable[[Any], str | None]
"""Takes a value and returns what is wrong with it."""
Step = Callable[[Any], Sequence[Violation]]
"""Takes the value of a field and returns what is wrong in it, with paths that begin behind the field."""


class Validator:
    """Checks messages by rules: for the full name of a field or oneof, PGV's `FieldRules` as JSON values.

    `{"oneof": {"required": true}}` stands for PGV's option of a oneof. For each message type the rules are
    compiled into a plan at its first use.
    """

    def __init__(self, rules: Mapping[str, Mapping[str, Any]]) -> None:
        self._rules: dict[str, dict[str, Mapping[str, Any]]] = {}
        for full_name, of_field in rules.items():
            message, _, name = full_name.rpartition(".")
            self._rules.setdefault(message, {})[name] = of_field
        self._plans: dict[Descriptor, _Plan] = {}
        self._packed: dict[str, tuple[Any, _Plan]] = {}

    def violations(self, message: Any) -> list[Violation]:
        """Return everything in a message that breaks a rule; of an Any, in its content."""
        if message.DESCRIPTOR.full_name == _ANY:
            return list(self._any(message))
        return self._plan(message.DESCRIPTOR).violations(message)

    def compile_all(self) -> None:
        """Compile all rules. Raises ValueError for a rule and KeyError for a name that is not known here."""
        for message in self._rules:
            self._plan(protos.POOL.FindMessageTypeByName(message))

    def _plan(self, message: Descriptor) -> "_Plan":
        if message not in self._plans:
            plan = self._plans[message] = _Plan()  # known before it is filled, for messages in their own kind
            rules = dict(self._rules.get(message.full_name, {}))
            for oneof in message.oneofs:
                if rules.pop(oneof.name, None):
                    plan.needed.append((frozenset(oneof.fields), Violation(oneof.name, "is required")))
            for field in message.fields:
                self._add(plan, field, copy.deepcopy(dict(rules.pop(field.name, {}))))
            if rules:
                raise KeyError(f"{message.full_name} has no {', '.join(rules)}")
        return self._plans[message]

    def _add(self, plan: "_Plan", field: FieldDescriptor, rules: dict[str, Any]) -> None:
        """Add a field to the plan; this uses up `rules`, so that no unknown rule stays unseen."""
        of_message = rules.pop("message", {})
        skipped, required = of_message.pop("skip", False), of_message.pop("required", False)
        missing = "value is required and must not be nil." if required and rules else "value is required"
        for kind in {"any", "duration"} & rules.keys():
            required |= rules[kind].pop("required", False)
        step = None if skipped else self._step(field, rules)
        _refuse(field, of_message, rules)
        if step:
            plan.steps[field] = field.name, step
        if required and field.containing_oneof is None:  # of a oneof, PGV checks the member that is set
            plan.needed.append((frozenset({field}), Violation(field.name, missing)))
        elif step and not field.has_presence:
            default = () if field.is_repeated else field.default_value
            plan.needed += [(frozenset({field}), Violation(field.name, text)) for _, text in step(default)]

    def _step(self, field: FieldDescriptor, rules: dict[str, Any]) -> Step | None:
        if field.message_type and field.message_type.GetOptions().map_entry:
            return self._map(field, rules)
        if field.is_repeated:
            return self._list(field, rules)
        return self._value(field, rules)

    def _map(self, field: Any, rules: dict[str, Any]) -> Step | None:
        rule = rules.pop("map", {})
        size = _first(_limits(rule, "pairs", _PAIRS))
        key_rules = rule.pop("keys", {})
        entry = field.message_type.fields_by_name
        key = self._value(entry["key"], key_rules)
        value = None if field.full_name == _NEVER_UNPACKED else self._value(entry["value"], {})
        _refuse(field, rule, key_rules)
        if not (size or key or value):
            return None

        def step(values: Mapping[Any, Any]) -> list[Violation]:
            found = [Violation("", text)] if size and (text := size(values)) else []
            for name in values:
                path = f"[{json.dumps(name)}]"
                if key:
                    found += _below(path, key(name))
                if value:
                    found += _below(path, value(values[name]))
            return found

        return step

    def _list(self, field: FieldDescriptor, rules: dict[str, Any]) -> Step | None:
        rule = rules.pop("repeated", {})
        size = _first(_limits(rule, "items", _ITEMS))
        unique = rule.pop("unique", False)
        item_rules = rule.pop("items", {})
        item = self._value(field, item_rules)
        _refuse(field, rule, item_rules)
        if not (size or unique or item):
            return None

        def step(values: Sequence[Any]) -> list[Violation]:
            found = [Violation("", text)] if size and (text := size(values)) else []
            seen = set()
            for index, value in enumerate(values):
                if unique:
                    if value in seen:
                        found.append(Violation(f"[{index}]", "repeated value must contain unique items"))
                    seen.add(value)
                if item and (inside := item(value)):
                    found += _below(f"[{index}]", inside)
            return found

        return step

    def _value(self, field: FieldDescriptor, rules: dict[str, Any]) -> Step | None:
        """Return the step for one value: of a field, an item of a list, or a key or value of a map."""
        message = field.message_type
        if message is not None and message.full_name == _DURATION:
            rules.setdefault("duration", {})  # every one is checked
        # ExtensionConfigSource.config_source has a rule for an Any but is none: PGV does not look into it.
        opaque = "any" in rules and message is not None and message.full_name != _ANY
        checks: list[Check] = []
        for kind in _KINDS.keys() & rules.keys():
            rule = rules.pop(kind)
            checks += _KINDS[kind](rule, field)
            _refuse(field, rule)
        check = _first(checks)
        if check:
            wrapper = message is not None and message.full_name != _DURATION
            return _step_of(check, wrapper=wrapper)
        if message is None or opaque or not self._has_rules(message, set()):
            return None
        return self._any if message.full_name == _ANY else self._plan(message).violations

    def _has_rules(self, message: Descriptor, seen: set[Descriptor]) -> bool:
        """Tell if there are rules for anything in a message; `seen` are those already looked into."""
        if message.full_name in self._rules or message.full_name in {_ANY, _DURATION}:
            return True
        seen.add(message)
        inner = {field.message_type for field in message.fields if field.message_type} - seen
        return any(self._has_rules(one, seen) for one in inner if one not in seen)

    def _any(self, packed: Any) -> Sequence[Violation]:
        found = self._packed.get(packed.type_url)
        if found is None:
            try:
                message = protos.POOL.FindMessageTypeByName(packed.type_url.rpartition("/")[2])
            except KeyError:
                return ()
            found = self._packed[packed.type_url] = GetMessageClass(message), self._plan(message)
        message_class, plan = found
        try:
            return plan.violations(message_class.FromString(packed.value))
        except DecodeError:
            return (Violation("", f"value is not a {message_class.DESCRIPTOR.full_name}"),)


class _Plan:
    """What to check in a message of one type."""

    __slots__ = ("needed", "steps")

    def __init__(self) -> None:
        self.needed: list[tuple[frozenset[FieldDescriptor], Violation]] = []
        """Fields of which one has to be set, and what is wrong if none is."""
        self.steps: dict[FieldDescriptor, tuple[str, Step]] = {}
        """For a field that is set, its name and how to check its value."""

    def violations(self, message: Any) -> list[Violation]:
        fields = message.ListFields()
        found: list[Violation] = []
        if self.needed:
            present = dict(fields)
            found += [violation for needed, violation in self.needed if needed.isdisjoint(present)]
        for field, value in fields:
            if (step := self.steps.get(field)) and (inside := step[1](value)):
                found += _below(step[0], inside)
        return found


@functools.cache
def _validator() -> Validator:
    return Validator(json.loads(RULES.read_bytes()))


def _below(name: str, found: Sequence[Violation]) -> Iterator[Violation]:
    """Put the name of a field before the paths of what was found in its value."""
    for path, text in found:
        yield Violation(f"{name}{'.' if path and path[0] != '[' else ''}{path}", text)


def _step_of(check: Check, *, wrapper: bool) -> Step:
    """Make a step of a check; in a wrapper such as UInt32Value it checks the value inside."""
    if wrapper:
        return lambda message: [Violation("", text)] if (text := check(message.value)) else ()
    return lambda value: [Violation("", text)] if (text := check(value)) else ()


def _first(checks: Sequence[Check]) -> Check | None:
    """Make one check of several: the first that fails, as in PGV's code."""
    if len(checks) < 2:  # noqa: PLR2004
        return checks[0] if checks else None
    return lambda value: next((text for check in checks if (text := check(value))), None)


def _refuse(field: FieldDescriptor, *rules: dict[str, Any]) -> None:
    """Raise ValueError if anything is left of a field's rules: what this module does not know."""
    for rule in rules:
        if rule:
            raise ValueError(f"unknown rule for {field.full_name}: {rule}")


# What is wrong with a size that is too small, too large, or not between two limits.
_ITEMS = (
    "value must contain at least {} item(s)",
    "value must contain no more than {} item(s)",
    "value must contain between {} and {} items, inclusive",
)
_PAIRS = tuple(text.replace("item", "pair") for text in _ITEMS)
_CHARACTERS = (
    "value length must be at least {} characters",
    "value length must be at most {} characters",
    "value must have between {} and {} characters inclusive",
)
_BYTES = (
    "value length must be at least {} bytes",
    "value length must be at most {} bytes",
    "value length must be between {} and {} bytes, inclusive",
)


def _limits(
    rule: dict[str, Any], unit: str, texts: tuple[str, ...], size_of: Callable[[Any], int] = len
) -> list[Check]:
    """Return the check for `min_UNIT` and `max_UNIT`, if there is one."""
    low, high = rule.pop(f"min_{unit}", None), rule.pop(f"max_{unit}", None)
    too_small, too_large, outside = texts
    if low is None and high is None:
        return []
    if high is None:
        text = too_small.format(low)
        return [lambda value: text if size_of(value) < low else None]
    if low is None:
        text = too_large.format(high)
        return [lambda value: text if size_of(value) > high else None]
    text = outside.format(low, high)
    return [lambda value: None if low <= size_of(value) <= high else text]


_BOUNDS: Final[dict[str, tuple[Callable[[Any, Any], bool], str]]] = {
    "gt": (operator.le, "greater than"),
    "gte": (operator.lt, "greater than or equal to"),
    "lt": (operator.ge, "less than"),
    "lte": (operator.gt, "less than or equal to"),
}
"""How a value breaks a bound (not-a-number breaks none, as in C++), and what it must be instead."""


def _bounds(rule: dict[str, Any], parse: Callable[[Any], Any]) -> list[Check]:
    """Return the check for the bounds, if there are any; an upper one below the lower excludes a range."""
    given = [name for name in _BOUNDS if name in rule]
    limits = [rule.pop(name) for name in given]
    texts = [f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in limits]
    if not given:
        return []
    if len(given) == 1:
        (breaks, words), limit, text = _BOUNDS[given[0]], parse(limits[0]), texts[0]
        text = f"value must be {words} {text}"
        return [lambda value: text if breaks(value, limit) else None]
    (below, _), (above, _) = (_BOUNDS[name] for name in given)
    low, high = (parse(limit) for limit in limits)
    if low < high:
        begin, end = "(" if "gt" in given else "[", ")" if "lt" in given else "]"
        text = f"value must be inside range {begin}{texts[0]}, {texts[1]}{end}"
        return [lambda value: text if below(value, low) or above(value, high) else None]
    begin, end = "[" if "lt" in given else "(", "]" if "gt" in given else ")"
    text = f"value must be outside range {begin}{texts[1]}, {texts[0]}{end}"
    return [lambda value: text if below(value, low) and above(value, high) else None]


def _number(rule: dict[str, Any], _field: FieldDescriptor) -> list[Check]:
    ignore_empty = rule.pop("ignore_empty", False)
    return _unless_empty(ignore_empty, _bounds(rule, lambda number: number))


def _duration(rule: dict[str, Any], _field: FieldDescriptor) -> list[Check]:
    bounds = _first(_bounds(rule, _seconds_and_nanos))

    def check(duration: Any) -> str | None:
        seconds, nanos = duration.seconds, duration.nanos
        if seconds < 0 or nanos < 0:
            return "Invalid duration: Expected positive duration"
        if seconds > _MAX_SECONDS or nanos > _MAX_NANOS:
            return "Invalid duration: Duration out-of-range"
        return bounds((seconds, nanos)) if bounds else None

    return [check]


# Of a Duration in Envoy: one second less than the nanoseconds of an int64 hold (`MessageUtil::validate`).
_MAX_SECONDS: Final = (2**63 - 1) // 10**9 - 1
_MAX_NANOS: Final = 10**9 - 1


def _seconds_and_nanos(text: str) -> tuple[int, int]:
    duration = protos.Duration()
    duration.FromJsonString(text)
    return duration.seconds, duration.nanos


def _bool(rule: dict[str, Any], _field: FieldDescriptor) -> list[Check]:
    constant = rule.pop("const")
    text = f"value must equal {json.dumps(constant)}"
    return [lambda value: None if value == constant else text]


def _enum(rule: dict[str, Any], field: Any) -> list[Check]:
    names = field.enum_type.values_by_number
    excluded = frozenset(rule.pop("not_in", ()))
    not_in = f"value must not be in list [{' '.join(names[number].name for number in excluded)}]"
    checks: list[Check] = [lambda value: not_in if value in excluded else None] if excluded else []
    if rule.pop("defined_only", False):
        numbers = frozenset(names)
        not_defined = "value must be one of the defined enum values"
        checks.append(lambda value: None if value in numbers else not_defined)
    return checks


def _bytes(rule: dict[str, Any], _field: FieldDescriptor) -> list[Check]:
    return _limits(rule, "len", _BYTES)


# What PGV makes of its well-known regular expressions, without and with `strict`, which is the default.
_HEADER_STRING: Final = r"^[^\x00\n\r]*$"
_WELL_KNOWN: Final = {
    ("HTTP_HEADER_NAME", False): _HEADER_STRING,
    ("HTTP_HEADER_NAME", True): r"^:?[0-9a-zA-Z!#$%&'*+-.^_|~`]+$",
    ("HTTP_HEADER_VALUE", False): _HEADER_STRING,
    ("HTTP_HEADER_VALUE", True): r"^[^\x00-\b\n-\x1f\x7f]*$",
}


def _string(rule: dict[str, Any], _field: FieldDescriptor) -> list[Check]:
    ignore_empty = rule.pop("ignore_empty", False)
    checks: list[Check] = []
    if listed := rule.pop("in", None):
        not_in = f"value must be in list [{' '.join(listed)}]"
        checks.append(lambda value: None if value in listed else not_in)
    checks += _limits(rule, "len", _CHARACTERS)
    checks += _limits(rule, "bytes", _BYTES, lambda value: len(value.encode()))
    if prefix := rule.pop("prefix", None):
        no_prefix = f'value does not have prefix "{prefix}"'
        checks.append(lambda value: None if value.startswith(prefix) else no_prefix)
    if suffix := rule.pop("suffix", None):
        no_suffix = f'value does not have suffix "{suffix}"'
        checks.append(lambda value: None if value.endswith(suffix) else no_suffix)
    strict = rule.pop("strict", True)
    well_known = rule.pop("well_known_regex", None)
    if pattern := _WELL_KNOWN[well_known, strict] if well_known else rule.pop("pattern", None):
        matches, no_match = re.compile(pattern).fullmatch, f'value does not match regex pattern "{pattern}"'
        checks.append(lambda value: None if matches(value) else no_match)
    return _unless_empty(ignore_empty, checks)


def _unless_empty(ignore_empty: bool, checks: list[Check]) -> list[Check]:
    check = _first(checks)
    return [lambda value: check(value) if value else None] if ignore_empty and check else checks


_KINDS: Final[dict[str, Callable[[dict[str, Any], FieldDescriptor], list[Check]]]] = {
    "any": lambda _rule, _field: [],  # besides `required`
    "bool": _bool,
    "bytes": _bytes,
    "double": _number,
    "duration": _duration,
    "enum": _enum,
    "string": _string,
    "uint32": _number,
    "uint64": _number,
}
"""The rules for single values. Each function uses up what it knows of a rule."""

_ANY: Final = "google.protobuf.Any"
_DURATION: Final = "google.protobuf.Duration"
_NEVER_UNPACKED: Final = "envoy.config.core.v3.Metadata.typed_filter_metadata"
"""What Envoy itself never looks into."""
