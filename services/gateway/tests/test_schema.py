"""The schemas let through what protobuf's parser takes, and nothing that its JSON mapping does not know."""

import importlib
import json
import math
import time
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator
from pydantic_core import from_json

from services.gateway.schema import DEEPEST, MOST_TEXT, Schemas, UnfitError, to_message, to_value, violations

WELL_KNOWN = ("any", "duration", "empty", "field_mask", "struct", "timestamp", "wrappers")
Field = FieldDescriptorProto
SCALARS = [
    name.removeprefix("TYPE_").lower()
    for name in dict(Field.Type.items())
    if name not in ("TYPE_ENUM", "TYPE_GROUP", "TYPE_MESSAGE")
]
WRAPPERS = ["Double", "Float", "Int32", "Int64", "UInt32", "UInt64", "Bool", "String", "Bytes"]


def add(message: Any, name: str, kind: str, *, repeated: bool = False, **more: Any) -> Field:
    """Add a field; a kind with a dot is a message, one with a slash an enum."""
    label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
    field: Field = message.field.add(name=name, number=len(message.field) + 1, **{"label": label, **more})
    if "." in kind:
        field.type, field.type_name = Field.TYPE_MESSAGE, kind
    elif "/" in kind:
        field.type, field.type_name = Field.TYPE_ENUM, kind.replace("/", ".")
    else:
        field.type = getattr(Field, f"TYPE_{kind.upper()}")
    return field


def add_map(message: Any, name: str, key: str, value: str) -> None:
    entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    add(entry, "key", key)
    add(entry, "value", value)
    add(message, name, f".all.v1.Everything.{entry.name}", repeated=True)


def everything() -> FileDescriptorProto:
    file = FileDescriptorProto(name="all/v1/all.proto", package="all.v1", syntax="proto3")
    file.dependency.extend(f"google/protobuf/{name}.proto" for name in WELL_KNOWN)
    color = file.enum_type.add(name="Color")
    color.options.allow_alias = True
    for name, number in (("COLOR_NONE", 0), ("COLOR_RED", 1), ("COLOR_CRIMSON", 1), ("COLOR_ANTI", -3)):
        color.value.add(name=name, number=number)
    message = file.message_type.add(name="Everything")
    add(message.nested_type.add(name="Nested"), "how_many", "int32")
    for scalar in SCALARS:
        add(message, f"{scalar}_value", scalar)
    for scalar in ("int32", "float", "string", "bytes", "bool"):
        add(message, f"{scalar}s", scalar, repeated=True)
    add(message, "color", "/all/v1/Color")
    add(message, "colors", "/all/v1/Color", repeated=True)
    add(message, "nested", ".all.v1.Everything.Nested")
    add(message, "nesteds", ".all.v1.Everything.Nested", repeated=True)
    add(message, "child", ".all.v1.Everything")
    add(message, "odd", "string", json_name="an odd: [name]")
    add_map(message, "by_text", "string", "string")
    add_map(message, "by_int32", "int32", ".all.v1.Everything.Nested")
    add_map(message, "by_int64", "int64", "bytes")
    add_map(message, "by_uint64", "uint64", "/all/v1/Color")
    add_map(message, "by_bool", "bool", "double")
    add_map(message, "values_by_text", "string", ".google.protobuf.Value")
    for wrapper in WRAPPERS:
        add(message, f"{wrapper.lower()}_wrapped", f".google.protobuf.{wrapper}Value")
    for name in ("Any", "Duration", "Empty", "FieldMask", "Struct", "Value", "ListValue", "Timestamp"):
        add(message, f"the_{name.lower()}", f".google.protobuf.{name}")
    add(message, "nothing", "/google/protobuf/NullValue")
    add(message, "nothings", "/google/protobuf/NullValue", repeated=True)
    add(message, "values", ".google.protobuf.Value", repeated=True)
    add(message, "moments", ".google.protobuf.Timestamp", repeated=True)
    for oneof, fields in {
        "choice": {"as_text": "string", "as_number": "int64", "as_nested": ".all.v1.Everything.Nested"},
        "value_choice": {"as_value": ".google.protobuf.Value", "as_nothing": "/google/protobuf/NullValue"},
    }.items():
        message.oneof_decl.add(name=oneof)
        for name, kind in fields.items():
            add(message, name, kind, oneof_index=len(message.oneof_decl) - 1)
    message.oneof_decl.add(name="_may_be")
    add(message, "may_be", "int32", oneof_index=len(message.oneof_decl) - 1, proto3_optional=True)
    return file


def old() -> FileDescriptorProto:
    file = FileDescriptorProto(name="old/v1/old.proto", package="old.v1", syntax="proto2")
    kind = file.enum_type.add(name="Kind")
    for name, number in (("ONE", 1), ("TWO", 2)):
        kind.value.add(name=name, number=number)
    message = file.message_type.add(name="Old")
    message.extension_range.add(start=100, end=200)
    add(message, "id", "int32", label=Field.LABEL_REQUIRED)
    add(message, "old_name", "string", label=Field.LABEL_REQUIRED)
    add(message, "kind", "/old/v1/Kind")
    message.oneof_decl.add(name="someText")
    add(message, "some_text", "string", oneof_index=0)
    file.extension.add(
        name="note", number=100, extendee=".old.v1.Old", type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL
    )
    return file


POOL = DescriptorPool()
for module in WELL_KNOWN:
    POOL.AddSerializedFile(importlib.import_module(f"google.protobuf.{module}_pb2").DESCRIPTOR.serialized_pb)
for each in (everything(), old()):
    POOL.Add(each)
EVERYTHING = POOL.FindMessageTypeByName("all.v1.Everything")
OLD = POOL.FindMessageTypeByName("old.v1.Old")
HELD = tuple(
    POOL.FindMessageTypeByName(name)
    for name in (
        "all.v1.Everything",
        "all.v1.Everything.Nested",
        "google.protobuf.Any",
        "google.protobuf.Duration",
        "google.protobuf.Empty",
        "google.protobuf.Int64Value",
        "google.protobuf.Struct",
        "google.protobuf.Value",
    )
)


class Both:
    """A message's schemas, and its class."""

    def __init__(self, message: Descriptor) -> None:
        self.schemas = Schemas(HELD)
        self.message = GetMessageClass(message)
        self.accepted = self.schemas.self_contained(self.schemas.accepted(message))
        self.answered = self.schemas.self_contained(self.schemas.answered(message))
        self._plain = Draft202012Validator(self.accepted)
        self._answer = Draft202012Validator(self.answered)
        self.validator = self.schemas.validator(message)

    def accepts(self, value: Any) -> bool:
        """Say whether a value is accepted: the schema that is published and the validator agree about it."""
        valid = self._plain.is_valid(value)
        assert self.validator.is_valid(value) == valid
        assert bool(violations(self.validator, value)) != valid
        return valid

    def parse(self, value: Any) -> Message:
        """Return the message, having been there and back again."""
        message = to_message(value, self.message())
        answer = to_value(message)
        assert self._answer.is_valid(answer), violations(self._answer, answer)
        serialised = message.SerializeToString(deterministic=True)
        assert self.message.FromString(serialised).SerializeToString(deterministic=True) == serialised
        return message


BOTH, BOTH_OLD = Both(EVERYTHING), Both(OLD)
INTEGERS = {
    "int32": (-(2**31), 2**31 - 1),
    "sint32": (-(2**31), 2**31 - 1),
    "sfixed32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "fixed32": (0, 2**32 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "sint64": (-(2**63), 2**63 - 1),
    "sfixed64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
    "fixed64": (0, 2**64 - 1),
}

# Values that come near to what some field takes. Those that are accepted must be messages, whatever they are.

EDGES = [edge + by for pair in INTEGERS.values() for edge in pair for by in (-1, 0, 1)]
integers = st.one_of(st.sampled_from(EDGES), st.integers(-300, 300), st.integers(-(10**400), 10**400))
floats = st.one_of(st.floats(), integers.filter(lambda each: abs(each) < 10**300).map(float))
numerals = st.one_of(
    integers.map(str),
    floats.map(repr),
    st.from_regex(r"\A-?[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?\Z"),
    st.sampled_from(
        ["", " 1", "1 ", "1_0", "+1", "0x1", "٣", "1\n", ".5", "5.", "1e", "nan", "inf", "NaN", "-Infinity"]
    ),
)
moments = st.one_of(
    st.datetimes().map(lambda each: each.isoformat() + "Z"),
    st.from_regex(
        r"\A(000[0-2]|1999|2000|1900|2004|999[89])-(0[0-9]|1[0-3])-([0-3][0-9])T([012][0-9]):[0-6][0-9]:[0-6][0-9]"
        r"(\.[0-9]{1,10})?(Z|[+-]([012][0-9]):[0-6][0-9])?\Z"
    ),
)
durations = st.from_regex(r"\A[+-]?[0-9]{0,13}(\.[0-9]{0,10})?s?\Z")
masks = st.from_regex(r"\A[a-zA-Z_.*,]{0,8}\Z")
codes = st.one_of(st.binary().map(lambda each: each.hex()), st.from_regex(r"\A[A-Za-z0-9+/_-]{0,9}={0,3}\Z"))
urls = st.sampled_from(
    [f"{host}{each.full_name}" for host in ("type.googleapis.com/", "a/b/", "/", "") for each in HELD]
)
texts = st.one_of(
    st.text(), numerals, moments, durations, masks, codes, urls, st.sampled_from(["COLOR_RED", "COLOR_X", "NULL_VALUE"])
)
leaves = st.one_of(st.none(), st.booleans(), integers, floats, texts)
NAMES = [name for each in EVERYTHING.fields for name in (each.name, each.json_name)] + ["@type", "value", "howMany"]
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), inner, max_size=3),
    ),
    max_leaves=6,
)
FAST = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=200)


def fields() -> st.SearchStrategy[dict[str, Any]]:
    """Objects of the message's fields, each with a value that is likely for it, or with any other."""
    likely = {"text": texts, "int": st.one_of(integers, numerals), "float": st.one_of(floats, numerals)}

    def of(name: str) -> st.SearchStrategy[Any]:
        field = EVERYTHING.fields_by_name.get(name) or next(f for f in EVERYTHING.fields if f.json_name == name)
        kind = likely[
            "int" if "int" in name or "fixed" in name else "float" if "float" in name or "double" in name else "text"
        ]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return st.one_of(
                st.dictionaries(st.one_of(texts, st.sampled_from(["true", "false"])), values, max_size=3), values
            )
        one = st.one_of(kind, kind, values)
        return st.one_of(st.lists(one, max_size=3), values) if field.is_repeated else one

    names = st.lists(st.sampled_from(NAMES[:-3]), min_size=1, max_size=3, unique=True)
    return names.flatmap(lambda some: st.fixed_dictionaries({name: of(name) for name in some}))


@FAST
@given(st.one_of(fields(), values))
def test_what_is_accepted_is_a_message(value: Any) -> None:
    if BOTH.accepts(value):
        BOTH.parse(value)


@pytest.mark.parametrize("name", [each.json_name for each in EVERYTHING.fields if not each.is_repeated])
def test_what_is_accepted_for_a_field_is_a_message(name: str) -> None:
    @settings(FAST, max_examples=20)
    @given(values)
    def check(value: Any) -> None:
        if BOTH.accepts({name: value}):
            BOTH.parse({name: value})

    check()


def patterns() -> dict[str, str]:
    found = {}
    for each in EVERYTHING.fields:
        schema = BOTH.accepted["$defs"]["all.v1.Everything-Input"]["properties"][each.json_name]
        reference = schema.get("anyOf", [{}])[0].get("$ref", "")
        if "pattern" in (target := BOTH.accepted["$defs"].get(reference.rpartition("/")[2], {})):
            found[each.json_name] = target["pattern"]
    return found


@pytest.mark.parametrize("name", patterns())
def test_every_text_that_a_pattern_lets_through_is_a_value(name: str) -> None:
    @settings(FAST, max_examples=25)
    @given(st.from_regex(patterns()[name], fullmatch=True))
    def check(text: str) -> None:
        assert BOTH.accepts({name: text})
        message: Any = BOTH.parse({name: text})
        if any(name.startswith(f"{kind}V") for kind in INTEGERS):
            assert getattr(message, name.replace("Value", "_value")) == Decimal(text)

    check()


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_have_their_bounds_as_numbers_and_as_text(kind: str) -> None:
    least, most = INTEGERS[kind]
    for number in {*EDGES, 0, 7, -7}:
        for value in (number, str(number)):
            assert BOTH.accepts({f"{kind}Value": value}) == (least <= number <= most), value
            if least <= number <= most:
                assert getattr(BOTH.parse({f"{kind}Value": value}), f"{kind}_value") == number


def test_floats_have_their_bounds_as_numbers_and_as_text() -> None:
    double, single = math.ldexp(1 - 2**-53, 1024), math.ldexp(1 - 2**-24, 128)
    for name, number in (("doubleValue", double), ("floatValue", single)):
        for value in (number, -number, 10**38):
            assert BOTH.accepts({name: value})
            BOTH.parse({name: value})
        assert not BOTH.accepts({name: int(number) * 2})
        assert not BOTH.accepts({name: -int(number) * 2})
    for text in ("1.7976931348623157e308", "-1.7976931348623157E+308", "1e307", "9.9e307", "1e-999"):
        assert BOTH.accepts({"doubleValue": text}), text
        assert math.isfinite(BOTH.parse({"doubleValue": text}).double_value)  # type: ignore[attr-defined]
    for text in ("1.7976931348623158e308", "1.8e308", "2e308", "10e308", "1e309", "99999999999999999999e289"):
        assert not BOTH.accepts({"doubleValue": text}), text
    assert not BOTH.accepts(from_json('{"doubleValue": 1e400}'))
    for text in ("3.4028235e38", "-3.4028235e+38", "1e38", "9.99e37"):
        assert BOTH.accepts({"floatValue": text}), text
        assert math.isfinite(BOTH.parse({"floatValue": text}).float_value)  # type: ignore[attr-defined]
    for text in ("3.4028236e38", "3.5e38", "4e38", "1e39"):
        assert not BOTH.accepts({"floatValue": text}), text


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("int32Value", 1e3, 1000),
    ("int32Value", 2.0, 2),
    ("int32Value", -0.0, 0),
    ("int32Value", "-0", 0),
    ("int32Value", "1e5", 100_000),
    ("int32Value", "1.5e1", 15),
    ("int32Value", "100000.000", 100_000),
    ("int32_value", 7, 7),
    ("int64Value", "9e18", 9 * 10**18),
    ("int64Value", "123456789012345.0", 123456789012345),
    ("doubleValue", 3, 3.0),
    ("doubleValue", "-1.5E-3", -0.0015),
    ("doubleValue", "Infinity", math.inf),
    ("doubleValue", "-Infinity", -math.inf),
    ("floatValue", "0.5", 0.5),
    ("boolValue", True, True),
    ("stringValue", "", ""),
    ("stringValue", "李白\x00\U0001f600", "李白\x00\U0001f600"),
    ("bytesValue", "", b""),
    ("bytesValue", "AQID", b"\1\2\3"),
    ("bytesValue", "AQ==", b"\1"),
    ("bytesValue", "AQ", b"\1"),
    ("bytesValue", "-_8", b"\xfb\xff"),
    ("bytesValue", "+/8=", b"\xfb\xff"),
    ("color", "COLOR_CRIMSON", 1),
    ("color", "COLOR_ANTI", -3),
    ("color", -3, -3),
    ("color", 99, 99),
    ("mayBe", 0, 0),
    ("nothing", None, 0),
    ("nothing", "NULL_VALUE", 0),
    ("asText", "x", "x"),
    ("an odd: [name]", "x", "x"),
]


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED, ids=str)
def test_the_forms_of_the_mapping_are_accepted(name: str, value: Any, expected: Any) -> None:
    assert BOTH.accepts({name: value}), violations(BOTH.validator, {name: value})
    field = next(each for each in EVERYTHING.fields if name in (each.name, each.json_name))
    assert getattr(BOTH.parse({name: value}), field.name) == expected


@pytest.mark.parametrize(
    "value",
    [
        {},
        {each.name: None for each in EVERYTHING.fields if each.name not in ("nothings", "values", "as_nothing")},
        {"asText": None, "asNumber": 1, "asNested": None},
        {"colors": ["COLOR_RED", 1, -3], "nesteds": [{}, {"how_many": "1"}]},
        {"byInt32": {"-1": {"howMany": 2}, "0": {}}, "byBool": {"true": "NaN", "false": 1}},
        {"valuesByText": {"": None, "x": [None, {"y": 1e300}]}, "values": [None, 1, "x", [], {}]},
        {"int64Wrapped": "0", "boolWrapped": False, "bytesWrapped": "AA==", "stringWrapped": None},
        {"theStruct": {"a": {"b": [1, None]}}, "theListvalue": [None], "theValue": None, "theEmpty": {}},
        {"theTimestamp": "2024-02-29T23:59:59.123456789+23:59", "theDuration": "-315576000000.999999999s"},
        {"moments": ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999999Z", "2000-02-29T00:00:00Z"]},
        {"theFieldmask": "a,bC.d1,*", "theDuration": "0.5s"},
        {"theAny": {}},
        {"theAny": {"@type": "type.googleapis.com/all.v1.Everything", "int32Value": 3, "child": {}}},
        {"theAny": {"@type": "https://example.com/x/google.protobuf.Int64Value", "value": "5"}},
        {"theAny": {"@type": "type.googleapis.com/google.protobuf.Value", "value": None}},
        {"theAny": {"@type": "type.googleapis.com/google.protobuf.Empty"}},
        {
            "theAny": {
                "@type": "type.googleapis.com/google.protobuf.Any",
                "value": {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1s"},
            }
        },
        {"asValue": None},
        {"asNothing": None, "as_text": "x"},
        {"child": {"child": {"child": {"int32s": [1]}}}},
    ],
    ids=json.dumps,
)
def test_whole_messages_of_the_mapping_are_accepted(value: Any) -> None:
    assert BOTH.accepts(value), violations(BOTH.validator, value)
    message = BOTH.parse(value)
    assert to_message(to_value(message), BOTH.message()) == message


NOT_INTEGERS: list[Any] = [
    "",
    " 1",
    "1 ",
    "+1",
    "1_0",
    "01",
    "٣",
    "0x1",
    "1\n",
    "1.5",
    "1e-1",
    "NaN",
    0.5,
    True,
    [],
    {},
]
NOT_MOMENTS: list[Any] = [
    "",
    "2020-01-01",
    "2020-01-01T00:00:00",
    "2020-01-01t00:00:00z",
    "2020-01-01 00:00:00Z",
    "2020-1-1T0:0:0Z",
    "2020-01-01T00:00:00.Z",
    "2020-01-01T00:00:00.1234567890Z",
    "2020-01-01T00:00:00+0100",
    "2020-01-01T00:00:00+24:00",
    "2020-01-01T00:00:60Z",
    "2020-01-01T24:00:00Z",
    "2020-13-01T00:00:00Z",
    "2021-02-29T00:00:00Z",
    "1900-02-29T00:00:00Z",
    "2020-04-31T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
    "10000-01-01T00:00:00Z",
    0,
]
REFUSED: dict[str, list[Any]] = {
    "int32Value": [*NOT_INTEGERS, "1e10", "2147483648.0", "9.999999999e8"],
    "uint64Value": [*NOT_INTEGERS, -1, "-1", "9007199254740993.0"],
    "doubleValue": [
        "",
        " 1",
        "1_0",
        "+1",
        ".5",
        "5.",
        "01",
        "nan",
        "inf",
        "infinity",
        "1e",
        "٣",
        "1e400",
        True,
        [],
        {},
    ],
    "boolValue": [0, 1, "true", "false", "", [], {}],
    "stringValue": [1, True, [], {}, 1.5],
    "bytesValue": [1, "A", "AQI=I", "A===", "====", "AQ=", "AQ===", "A Q=", "AQID\n", "ä", "AQID==", [], {}],
    "color": ["COLOR_GREEN", "color_red", "1", "", 1.5, True, 2**31, -(2**31) - 1, [], {}],
    "nothing": ["null", False, [], {}],
    "nested": [[], "", 0, False, {"howMuch": 1}, {"how_many": 1, "howMany": 1}, {"howMany": []}],
    "int32s": [{}, "1", 1, [None], ["x"], [[1]]],
    "nesteds": [[None], [[]], {}],
    "nothings": [[None], None],
    "values": [None, {}],
    "byText": [[], "", {"a": None}, {"a": 1}],
    "byInt32": [{"x": {}}, {"01": {}}, {"-0": {}}, {"1.0": {}}, {"1": None}, {"2147483648": {}}],
    "byInt64": [{"1": 1}, {"9223372036854775808": ""}],
    "byUint64": [{"-1": 0}, {"1": "COLOR_X"}, {"1": None}],
    "byBool": [{"True": 1}, {"1": 1}, {"": 1}, {"true": None}],
    "boolWrapped": [{"value": True}, 1, "true"],
    "int64Wrapped": [{"value": 1}, "x", 2**63],
    "theTimestamp": NOT_MOMENTS,
    "moments": [[each] for each in NOT_MOMENTS] + [[None]],
    "theDuration": ["", "1", "s", "1 s", "+1s", "1.s", ".5s", "01s", "1.0000000001s", "315576000001s", "1e3s", 1, {}],
    "theFieldmask": ["a_b", "a,", ",a", "a..b", ".a", " a", "ä", [], {"paths": []}],
    "theStruct": [[], "", 1, {"a": 10**400}, {"a": math.inf}],
    "theValue": [10**400, -math.inf, math.nan, [math.inf]],
    "theListvalue": [{}, "", [10**309]],
    "theEmpty": [[], {"a": 1}],
    "theAny": [
        [],
        {"a": 1},
        {"@type": 1},
        {"@type": "google.protobuf.Empty"},
        {"@type": "/google.protobuf.Empty"},
        {"@type": "type.googleapis.com/no.Such"},
        {"@type": "type.googleapis.com/google.protobuf.Duration"},
        {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1s", "more": 1},
        {"@type": "type.googleapis.com/google.protobuf.Int64Value", "value": None},
        {"@type": "type.googleapis.com/all.v1.Everything", "int32Value": "x"},
        {"@type": "type.googleapis.com/google.protobuf.Any", "value": {"@type": "x"}},
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, each) for name, some in REFUSED.items() for each in some], ids=str)
def test_what_is_not_of_the_mapping_is_refused(name: str, value: Any) -> None:
    assert not BOTH.accepts({name: value})


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "",
        0,
        False,
        {"nothingOfThisName": 1},
        {"[all.v1.note]": 1},
        {"asText": "x", "asNumber": 1},
        {"asText": "x", "as_number": "1"},
        {"asText": "x", "as_text": "x"},
        {"as_value": None, "asNothing": None},
        {"asValue": 1, "asNothing": 0},
        {"int32Value": 1, "int32_value": 1},
        {"int32Value": None, "int32_value": None},
        {"mayBe": 1, "may_be": 1},
        {"child": {"child": {"int32Value": "x"}}},
    ],
    ids=json.dumps,
)
def test_what_is_no_message_is_refused(value: Any) -> None:
    assert not BOTH.accepts(value)


def test_fields_that_are_required_have_to_be_there_under_one_of_their_names() -> None:
    for value in (
        {"id": 1, "oldName": ""},
        {"id": "1", "old_name": "x", "kind": "TWO"},
        {"id": 1, "oldName": "", "kind": 2},
    ):
        assert BOTH_OLD.accepts(value)
        BOTH_OLD.parse(value)
    for bad in (
        {},
        {"id": 1},
        {"oldName": ""},
        {"id": None, "oldName": ""},
        {"id": 1, "oldName": "", "old_name": ""},
        {"id": 1, "oldName": "", "kind": 3},
        {"id": 1, "oldName": "", "kind": "THREE"},
        {"id": 1, "oldName": "", "kind": True},
        {"id": 1, "oldName": "", "someText": "the parser takes it for the second of the oneof of this name"},
        {"id": 1, "oldName": "", "[old.v1.note]": "x"},
    ):
        assert not BOTH_OLD.accepts(bad), bad


def test_answers_name_what_has_no_presence_always_and_extensions_when_they_are_set() -> None:
    answered = Draft202012Validator(BOTH.answered)
    answer = to_value(BOTH.message())
    assert answered.is_valid(answer)
    assert not answered.is_valid({key: value for key, value in answer.items() if key != "int64Value"})
    assert not answered.is_valid({**answer, "int64Value": 1})
    assert not answered.is_valid({**answer, "more": 1})
    message = BOTH_OLD.message()
    message.ParseFromString(b"\x08\x01\x12\x00\xa2\x06\x01x")
    assert Draft202012Validator(BOTH_OLD.answered).is_valid(to_value(message))
    assert to_value(message) == {"id": 1, "oldName": "", "[old.v1.note]": "x"}


@FAST
@given(st.binary(max_size=40))
def test_whatever_a_service_answers_fits_the_schema_or_has_no_json(serialised: bytes) -> None:
    message = BOTH.message()
    try:
        message.ParseFromString(serialised)
        answer = to_value(message)
    except (DecodeError, UnfitError):
        return
    assert Draft202012Validator(BOTH.answered).is_valid(answer)


@pytest.mark.parametrize(
    "broken",
    [
        {"the_timestamp": {"seconds": 10**15}},
        {"the_duration": {"seconds": 10**15}},
        {"the_any": {"type_url": "type.googleapis.com/no.Such", "value": b"x"}},
        {"the_any": {"type_url": "type.googleapis.com/all.v1.Everything", "value": b"\xff"}},
        {"the_value": {"number_value": math.nan}},
        {"the_fieldmask": {"paths": ["A"]}},
    ],
    ids=str,
)
def test_a_message_that_has_no_json_is_said_to_have_none(broken: Any) -> None:
    with pytest.raises(UnfitError):
        to_value(BOTH.message(**broken))


@pytest.mark.parametrize("by", ["child", "theStruct", "theListvalue"])
def test_what_is_nested_too_deeply_is_refused_and_what_is_not_arrives(by: str) -> None:
    value: Any = [] if by == "theListvalue" else {}
    arrived = 0
    for levels in range(DEEPEST + 10):
        message = value if by == "child" else {by: value}
        assert BOTH.accepts(message)
        try:
            found = to_message(message, BOTH.message())
        except UnfitError:
            break
        assert BOTH.message.FromString(found.SerializeToString()) == found
        arrived = levels
        value = [value] if by == "theListvalue" else {"child" if by == "child" else "a": value}
    assert DEEPEST / 2 - 2 <= arrived < DEEPEST


def test_violations_say_where_and_what_is_expected_and_do_not_repeat_what_was_found() -> None:
    found = violations(
        BOTH.validator,
        {
            "int32Value": "secret",
            "int32s": [1, "secret"],
            "child": {"nested": {"howMany": 2**31}, "secret!": 1},
            "byInt32": {"7": {"howMany": True}, "secret": {}},
            "color": "secret",
            "asText": "x",
            "as_number": 1,
            "boolValue": "secret",
            "bool_value": True,
        },
    )
    assert found == {
        "int32Value": "must be a whole number from -2147483648 to 2147483647",
        "int32s[1]": "must be a whole number from -2147483648 to 2147483647",
        "child.nested.howMany": "must be at most 2147483647",
        "child['secret!']": "must be left out: there is no field of this name",
        "byInt32[7].howMany": "must be a whole number or a string",
        "byInt32": "must have keys of which each must be a whole number from -2147483648 to 2147483647, in digits",
        "color": "must be one of COLOR_NONE, COLOR_RED, COLOR_CRIMSON, COLOR_ANTI or a whole number",
        "": "must have at most one of asText, as_number",
        "boolValue": "must be true or false or null",
    }


def test_violations_are_few_and_short_and_found_in_no_time() -> None:
    long = "x" * 1000
    for value in (
        {"int32s": [long] * 100_000},
        {"child": {"nesteds": [{"howMany": long}] * 100_000}},
        {"theAny": {"@type": "type.googleapis.com/all.v1.Everything", "int32s": [long] * 100_000}},
        {str(number): 1 for number in range(100_000)},
        {"byInt32": {f"{number}": long for number in range(100_000)}},
        {long: 1},
        {"int32s": [long] * 150},
    ):
        start = time.process_time()
        assert not BOTH.validator.is_valid(value)
        found = violations(BOTH.validator, value)
        assert time.process_time() - start < 1
        assert 1 <= len(found) <= 10
        assert all(len(field) <= MOST_TEXT and len(text) <= MOST_TEXT for field, text in found.items())


def test_violations_of_any_other_schema_are_told_as_well() -> None:
    schema = {
        "type": "array",
        "prefixItems": [
            {"type": "string", "minLength": 2},
            {"maxItems": 1},
            {"const": 5},
            {"exclusiveMinimum": 3},
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            {"pattern": "^b$"},
            {"format": "uuid"},
            {"not": {}},
            {"required": ["x"]},
        ],
        "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }
    validator = Draft202012Validator(schema, validate_formats=True)
    assert violations(validator, ["a", [1, 2], 6, 3, 1, "a", "a", 1, {}, "x"]) == {
        "[0]": "must have at least 2 characters",
        "[1]": "must have at most 1 items",
        "[2]": "must be 5",
        "[3]": "must be above 3",
        "[4]": "must fit one of its forms, not more",
        "[5]": "must be text that matches ^b$",
        "[6]": "must be text of the form uuid",
        "[7]": "must be as its schema says: not",
        "[8].x": "must be given",
        "[9]": "must be a whole number or null",
    }
    assert violations(validator, ["ab"]) == {}
