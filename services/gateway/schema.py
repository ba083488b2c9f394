"""Messages as JSON: the schemas of what is accepted and of what is answered, and the way there and back.

The JSON is protobuf's own (https://protobuf.dev/programming-guides/json/), the schemas are JSON Schema, draft 2020-12.
What an accepted schema lets through is a message, unless it is nested too deeply. What it refuses is not of the
mapping, although protobuf's parser for Python takes much of it: bytes that are not base64, say, or a field under both
of its names. Refused as well are a few forms that nobody writes: quoted integers with an exponent, or a fraction of
zeros, and more digits than a double has; quoted numbers of more than a hundred decimals; and moments in the first or
the last year with an offset that could lead out of it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError, SerializeToJsonError
from google.protobuf.message import DecodeError, EncodeError, Message
from jsonschema_rs import Draft202012Validator, ValidationError

M = TypeVar("M", bound=Message)
Schema = dict[str, Any]

DEEPEST = 50
"""How deeply messages may be nested. Protobuf's parsers stop at 100, and count the entries of maps as messages, too."""

COMPONENTS = "#/components/schemas/"
DEFINITIONS = "#/$defs/"


class UnfitError(ValueError):
    """A value that is no message, or a message that is no JSON. The text says why."""


def to_message(value: Any, message: M) -> M:
    """Fill an empty message from a value that its accepted schema has let through, and return it.

    Raises `UnfitError` for one that is nested too deeply.
    """
    pool: Any = message.DESCRIPTOR.file.pool
    try:
        return ParseDict(value, message, descriptor_pool=pool, max_recursion_depth=DEEPEST)
    except (ParseError, EncodeError, ValueError, TypeError, OverflowError) as error:
        raise UnfitError(_bounded(str(error))) from None


def to_value(message: Message) -> Any:
    """Return the JSON value of a message.

    Raises `UnfitError` for a message that has none: an Any of a type that its service has not described, or broken; a
    Timestamp or Duration out of range; a Value that is not finite; a FieldMask out of form.
    """
    pool: Any = message.DESCRIPTOR.file.pool
    try:
        return MessageToDict(message, always_print_fields_with_no_presence=True, descriptor_pool=pool)
    except (SerializeToJsonError, DecodeError, ValueError, TypeError) as error:
        raise UnfitError(_bounded(str(error))) from None


# Patterns. All are plain regular expressions, without looking ahead or back, so that every validator understands them.


def _digit(least: int, most: int) -> str:
    return f"[{least}-{most}]" if least < most else str(most)


def _digits(least: int, most: int) -> str:
    """Return a pattern of so many digits."""
    if most == 0:
        return ""
    return "[0-9]" + ("" if least == most == 1 else f"{{{most}}}" if least == most else f"{{{least},{most}}}")


def _up_to(limit: int) -> str:
    """Return a pattern of the whole numbers from 1 to `limit`, without leading zeros."""
    digits = str(limit)
    found = ["[1-9]" + _digits(0, len(digits) - 2)] if len(digits) > 1 else []
    for place, digit in enumerate(digits):
        least = 0 if place else 1
        if int(digit) > least:
            rest = len(digits) - place - 1
            found.append(digits[:place] + _digit(least, int(digit) - 1) + _digits(rest, rest))
    return "|".join([*found, digits])


def _fraction_up_to(digits: str) -> str:
    """Return a pattern of the decimals that as a fraction are not above these."""
    below = [
        digits[:place] + _digit(0, int(digit) - 1) + _digits(0, 100)
        for place, digit in enumerate(digits)
        if digit > "0"
    ]
    return "|".join([*below, *(digits[:length] for length in range(1, len(digits))), f"{digits}0{{0,100}}"])


def _integer(least: int, most: int) -> str:
    """Return a pattern of the integers from `least` to `most`, all in digits, and some in other forms."""
    sign = "-?" if least < 0 else ""
    exact = 9 if most < 2**32 else 15  # digits, of which every number is in range, and is itself as a double
    forms = [f"{sign}(0|{_up_to(most)})", f"{sign}(0|[1-9][0-9]{{0,{exact - 1}}})\\.0{{1,9}}"]
    if least < 0:
        forms.append(str(least))
    forms += [f"{sign}[0-9](\\.{_digits(1, power)})?[eE]\\+?0?{power}" for power in range(1, exact)]
    forms.append(f"{sign}[0-9](\\.0{{1,9}})?[eE][+-]?0{{1,2}}")
    if most >= 2**32:
        forms.append(f"{sign}[0-9][eE]\\+?1[5-8]")
    return f"^({'|'.join(forms)})$"


def _float(most: str) -> str:
    """Return a pattern of the numbers up to one that is given as `d.dddde+dd`, and of those that are none."""
    mantissa, _, power = most.partition("e+")
    whole, _, fraction = mantissa.partition(".")
    less = _digit(0, int(whole) - 1)
    below = _up_to(int(power) - 1)
    by_twenty = _up_to(int(power) - 20)
    decimals = "(\\.[0-9]{1,100})?"
    return (
        "^(NaN|-?Infinity"
        f"|-?(0|[1-9][0-9]{{0,19}}){decimals}([eE](-[0-9]{{1,9}}|\\+?0{{0,3}}(0|{by_twenty})))?"
        f"|-?[0-9]{decimals}[eE]\\+?0{{0,3}}({below})"
        f"|-?({less}{decimals}|{whole}(\\.({_fraction_up_to(fraction)}))?)[eE]\\+?0{{0,3}}{power}"
        ")$"
    )


def _timestamp() -> str:
    any_year = "000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3}"
    not_first = "000[2-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3}"
    not_last = "000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-8][0-9]{3}|9[0-8][0-9]{2}|99[0-8][0-9]|999[0-8]"
    by_four = "0[48]|[2468][048]|[13579][26]"
    leap = f"[0-9]{{2}}({by_four})|({by_four})00"
    day = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
    time = "T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?"
    offset = "([01][0-9]|2[0-3]):[0-5][0-9]"

    def moment(years: str, zone: str) -> str:
        return f"(({years})-({day})|({leap})-02-29){time}{zone}"

    # An offset must not lead out of the years 1 to 9999. (No year that is cut off here is a leap year.)
    return (
        f"^({moment(any_year, '(Z|[+-]00:00)')}|{moment(not_first, f'[+]{offset}')}|{moment(not_last, f'-{offset}')})$"
    )


def _base64(characters: str, *, padded: bool) -> str:
    two, one = ("==", "=") if padded else ("(==)?", "=?")
    return f"^([{characters}]{{4}})*([{characters}]{{2}}{two}|[{characters}]{{3}}{one})?$"


_SEGMENT = "([*]|[A-Za-z][A-Za-z0-9]*)"
_PATH = f"{_SEGMENT}(\\.{_SEGMENT})*"

_INT32 = (-(2**31), 2**31 - 1)
_INT64 = (-(2**63), 2**63 - 1)
_UINT32 = (0, 2**32 - 1)
_UINT64 = (0, 2**64 - 1)
_DOUBLE = math.ldexp(1 - 2**-53, 1024)
_FLOAT = math.ldexp(1 - 2**-24, 128)
_INFINITE = "^(NaN|-?Infinity)$"

_WORDS: dict[str, str] = {_INFINITE: 'a number, or "NaN", "Infinity" or "-Infinity"'}
"""What patterns stand for, for people."""


def _text(pattern: str, words: str, **more: Any) -> Schema:
    _WORDS[pattern] = words
    return {"type": "string", **more, "pattern": pattern, "description": f"{words[0].upper()}{words[1:]}."}


def _accepted_integer(name: str, least: int, most: int) -> Schema:
    pattern = _integer(least, most)
    words = _WORDS[pattern] = f"a whole number from {least} to {most}"
    return {
        "type": ["integer", "string"],
        "format": name,
        "minimum": least,
        "maximum": most,
        "pattern": pattern,
        "description": f"{words.capitalize()}, as a number or a string.",
    }


def _accepted_float(name: str, most: float, as_text: str) -> Schema:
    pattern = _float(as_text)
    _WORDS[pattern] = f"a number in the range of a {name}"
    return {
        "type": ["number", "string"],
        "format": name,
        "minimum": -most,
        "maximum": most,
        "pattern": pattern,
        "description": 'A number, as a number or a string, or "NaN", "Infinity" or "-Infinity".',
    }


_TIMESTAMP = _text(
    _timestamp(), "a date and time such as 2006-01-02T15:04:05Z, in the years 1 to 9999", format="date-time"
)
_DURATION = _text(
    f"^-?(0|{_up_to(315_576_000_000)})(\\.[0-9]{{1,9}})?s$",
    "seconds, such as 1.5s, at most 315576000000 and with at most nine decimals",
)

# Each by its name among the components.
_SCALARS: dict[str, Schema] = {
    "protobuf.int32-Input": _accepted_integer("int32", *_INT32),
    "protobuf.int64-Input": _accepted_integer("int64", *_INT64),
    "protobuf.uint32-Input": _accepted_integer("uint32", *_UINT32),
    "protobuf.uint64-Input": _accepted_integer("uint64", *_UINT64),
    "protobuf.double-Input": _accepted_float("double", _DOUBLE, "1.7976931348623157e+308"),
    # Its largest number is a little less than what is written for it in short.
    "protobuf.float-Input": _accepted_float("float", _FLOAT, "3.4028235e+38"),
    "protobuf.bytes-Input": _text(
        _base64("A-Za-z0-9+/_-", padded=False), "base64, of either alphabet", contentEncoding="base64"
    ),
    "protobuf.int32": {"type": "integer", "format": "int32", "minimum": _INT32[0], "maximum": _INT32[1]},
    "protobuf.int64": _text("^(0|-?[1-9][0-9]{0,18})$", "a whole number, in digits", format="int64"),
    "protobuf.uint32": {"type": "integer", "format": "uint32", "minimum": 0, "maximum": _UINT32[1]},
    "protobuf.uint64": _text("^(0|[1-9][0-9]{0,19})$", "a whole number, in digits", format="uint64"),
    "protobuf.double": {"type": ["number", "string"], "format": "double", "pattern": _INFINITE},
    "protobuf.float": {"type": ["number", "string"], "format": "float", "pattern": _INFINITE},
    "protobuf.bytes": _text(_base64("A-Za-z0-9+/", padded=True), "base64", contentEncoding="base64"),
}

_KINDS = {
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FIXED32: "uint32",
    FieldDescriptor.TYPE_FIXED64: "uint64",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_SFIXED32: "int32",
    FieldDescriptor.TYPE_SFIXED64: "int64",
    FieldDescriptor.TYPE_SINT32: "int32",
    FieldDescriptor.TYPE_SINT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}

_NUMBERS = {"int32": _INT32, "int64": _INT64, "uint32": _UINT32, "uint64": _UINT64}


def _number_key(least: int, most: int) -> Schema:
    """Return the schema of a map's keys that are numbers. Each has one form, lest two keys are the same number."""
    forms = f"0|{'-?' if least < 0 else ''}({_up_to(most)})" + (f"|{least}" if least < 0 else "")
    pattern = f"^({forms})$"
    _WORDS[pattern] = f"a whole number from {least} to {most}, in digits"
    return {"pattern": pattern}


_NUMBER_KEYS = {kind: _number_key(*limits) for kind, limits in _NUMBERS.items()}

_INPUT = "-Input"
"""What the names of components end with that are of what is accepted."""

_WRAPPERS = "google/protobuf/wrappers.proto"
_NULL_VALUE = "google.protobuf.NullValue"
_VALUE = "google.protobuf.Value"
_ANY = "google.protobuf.Any"
_HOST = "([a-z]+://)?[A-Za-z0-9.-]+(/[A-Za-z0-9._~-]+)*"
_ANYTHING = {"$ref": f"{COMPONENTS}{_VALUE}{_INPUT}"}

_FIXED: dict[str, Schema] = {
    **_SCALARS,
    f"google.protobuf.Timestamp{_INPUT}": _TIMESTAMP,
    f"google.protobuf.Duration{_INPUT}": _DURATION,
    f"google.protobuf.FieldMask{_INPUT}": _text(
        f"^({_PATH}(,{_PATH})*)?$", "names of fields in camelCase, with commas between them"
    ),
    f"google.protobuf.Struct{_INPUT}": {
        "type": "object",
        "additionalProperties": _ANYTHING,
        "description": "Any JSON object.",
    },
    f"google.protobuf.ListValue{_INPUT}": {"type": "array", "items": _ANYTHING, "description": "Any JSON array."},
    f"{_VALUE}{_INPUT}": {
        "type": ["null", "boolean", "number", "string", "array", "object"],
        "minimum": -_DOUBLE,
        "maximum": _DOUBLE,
        "items": _ANYTHING,
        "additionalProperties": _ANYTHING,
        "description": "Any JSON.",
    },
    "google.protobuf.Timestamp": _TIMESTAMP,
    "google.protobuf.Duration": _DURATION,
    "google.protobuf.FieldMask": {"type": "string", "description": "Names of fields, with commas between them."},
    "google.protobuf.Struct": {"type": "object", "description": "Any JSON object."},
    "google.protobuf.ListValue": {"type": "array", "description": "Any JSON array."},
    _VALUE: {"description": "Any JSON."},
    _ANY: {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "description": "A message of any type, with the name of its type; empty when there is none.",
    },
}
"""The components that are the same whatever the service."""

_NULL: Schema = {"type": "null"}
_HELD = f"-Any{_INPUT}"
"""What the names of components end with that are of what is accepted for an Any."""

_SPECIAL = {name.removesuffix(_INPUT) for name in _FIXED if name.startswith("google.")}
"""The messages that have a JSON of their own, beside Any."""


class Schemas:
    """The schemas of the messages of one service, as OpenAPI's components.

    `types` are the messages that a google.protobuf.Any can hold.
    """

    def __init__(self, types: Iterable[Descriptor] = ()) -> None:
        self.components: dict[str, Schema] = {}
        """All schemas that those returned so far refer to, by name; `student.v1.Student-Input` is what is accepted."""
        self._types = tuple(types)
        self._begun: list[tuple[str, Callable[[], Schema]]] = []

    def accepted(self, message: Descriptor) -> Schema:
        """Return the schema of what is accepted for a message; it refers to `components`."""
        return self._whole(self._message(message, _INPUT))

    def answered(self, message: Descriptor) -> Schema:
        """Return the schema of what is answered; it refers to `components`."""
        return self._whole(self._message(message, ""))

    def self_contained(self, schema: Schema) -> Schema:
        """Return a schema that `accepted` or `answered` has returned, with all that it refers to in itself."""
        needed: dict[str, Schema] = {}
        waiting = [schema]
        while waiting:
            for name in _references(waiting.pop()):
                if name not in needed:
                    needed[name] = self.components[name]
                    waiting.append(needed[name])
        found: Schema = _redirected({**schema, "$defs": needed} if needed else schema)
        return found

    def validator(self, message: Descriptor) -> Draft202012Validator:
        """Return a validator of what is accepted for a message.

        It holds the same to be valid as the schema does, but looks at no more than it must: where `anyOf` has to say
        why a value fits none of its schemas, a megabyte in it takes seconds.
        """
        schema = self.self_contained(self.accepted(message))
        held = schema.get("$defs", {}).get(_ANY + _INPUT)
        if held:
            schema["$defs"][_ANY + _INPUT] = _by_type(held, schema["$defs"])
        return Draft202012Validator(_by_null(schema))

    def _component(self, name: str, make: Callable[[], Schema]) -> Schema:
        if name not in self.components:
            self.components[name] = {}  # a message may hold itself
            self._begun.append((name, make))
        return {"$ref": COMPONENTS + name}

    def _whole(self, schema: Schema) -> Schema:
        """Make the components that have been begun, and those that they refer to."""
        while self._begun:
            name, make = self._begun.pop()
            self.components[name] = make()
        return schema

    def _message(self, message: Descriptor, variant: str) -> Schema:
        if message.file.name == _WRAPPERS:
            return self._value(message.fields_by_name["value"], variant)
        name = message.full_name + variant
        if name == _ANY + _INPUT:
            return self._component(name, self._any)
        if name in _FIXED:
            return self._fixed(name)
        return self._component(name, lambda: self._accepted(message) if variant else self._answered(message))

    def _fixed(self, name: str) -> Schema:
        for other in _references(_FIXED[name]):
            if other not in self.components:
                self.components[other] = _FIXED[other]
        return self._component(name, lambda: _FIXED[name])

    def _value(self, field: FieldDescriptor, variant: str) -> Schema:
        """Return the schema of a field's value, or of one of its values."""
        if field.message_type is not None:
            return self._message(field.message_type, variant)
        if field.enum_type is not None:
            enum = field.enum_type
            if enum.full_name == _NULL_VALUE and not variant:
                return _NULL
            return self._component(enum.full_name + variant, lambda: _enum(enum, variant))
        if field.type in _KINDS:
            return self._fixed(f"protobuf.{_KINDS[field.type]}{variant}")
        return {"type": "boolean" if field.type == FieldDescriptor.TYPE_BOOL else "string"}

    def _field(self, field: FieldDescriptor, variant: str) -> Schema:
        """Return the schema of a field, with all of its values."""
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            keys = _key(key)
            found = {"type": "object", "additionalProperties": self._value(value, variant)}
            return {**found, "propertyNames": keys} if keys else found
        one = self._value(field, variant)
        return {"type": "array", "items": one} if field.is_repeated else one

    def _accepted(self, message: Descriptor, **more: Schema) -> Schema:
        """Return the schema of an object with the message's fields, and `more` that are required."""
        names = _names(message)
        keys: dict[int, list[str]] = {}
        properties = dict(more)
        for name, field in names.items():
            schema = self._field(field, _INPUT)
            properties[name] = _or_null(schema) if _takes_null(field) else schema
            if others := keys.setdefault(field.number, []):
                properties[name] = {**properties[name], "deprecated": True, "description": f"Same as {others[0]}."}
            others.append(name)
        found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        # A field is given under one of its names.
        if twice := {each[1]: {"properties": {each[0]: False}} for each in keys.values() if len(each) > 1}:
            found["dependentSchemas"] = twice
        needed = [keys[field.number] for field in message.fields if field.is_required and field.number in keys]
        if more or needed:
            found["required"] = [*more, *(each[0] for each in needed if len(each) == 1)]
        rules: list[Schema] = [{"anyOf": [{"required": [name]} for name in each]} for each in needed if len(each) > 1]
        for oneof in message.oneofs:
            fields = {name: field for name, field in names.items() if field.containing_oneof == oneof}
            if len(oneof.fields) > 1:
                rules.append(_at_most_one(fields))
        if len(rules) == 1:
            found |= rules[0]
        elif rules:
            found["allOf"] = rules
        return found

    def _answered(self, message: Descriptor) -> Schema:
        found: Schema = {
            "type": "object",
            "properties": {field.json_name: self._field(field, "") for field in message.fields},
            "additionalProperties": False,
        }
        if always := [field.json_name for field in message.fields if not field.has_presence]:
            found["required"] = always
        if message.is_extendable:
            found["patternProperties"] = {"^\\[.*\\]$": {}}
        return found

    def _any(self) -> Schema:
        empty = {"type": "object", "maxProperties": 0}
        return {
            "anyOf": [empty, *(self._held(message) for message in self._types)],
            "description": "A message of any type",
        }

    def _held(self, message: Descriptor) -> Schema:
        """Return the schema of an Any that holds a message of this type."""
        of_type = {"type": "string", "pattern": f"^{_HOST}/{re.escape(message.full_name)}$"}

        def make() -> Schema:
            if message.file.name != _WRAPPERS and message.full_name not in (*_SPECIAL, _ANY):
                return self._accepted(message, **{"@type": of_type})
            properties = {"@type": of_type, "value": self._message(message, _INPUT)}
            return {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            }

        return self._component(message.full_name + _HELD, make)


def _names(message: Descriptor) -> dict[str, FieldDescriptor]:
    """Return the fields by each name that they can be given under, the one that is answered first."""
    found = {field.json_name: field for field in message.fields}
    for field in message.fields:
        found.setdefault(field.name, field)
    for oneof in message.oneofs:  # the parser takes a field of the same name for the second of the oneof's
        found.pop(oneof.name, None)
    return found


def _key(field: FieldDescriptor) -> Schema:
    """Return the schema of a map's keys; empty for those that can be any text."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"enum": ["false", "true"]}
    return _NUMBER_KEYS[_KINDS[field.type]] if field.type in _KINDS else {}


def _enum(enum: EnumDescriptor, variant: str) -> Schema:
    names: list[Any] = [value.name for value in enum.values]
    if enum.is_closed:
        return {"enum": [*names, *sorted({value.number for value in enum.values})] if variant else names}
    least, most = _INT32
    number = {"type": "integer", "format": "int32", "minimum": least, "maximum": most}
    return {"anyOf": [{"type": "string", "enum": names}, number]}


def _takes_null(field: FieldDescriptor) -> bool:
    """Say whether null can be given for a field that is not set."""
    # Where null is a value of its own, the parser takes it for one, and fails when the field has several.
    return not field.is_required and not (field.is_repeated and _has_null(field))


def _has_null(field: FieldDescriptor) -> bool:
    """Say whether null is a value of a field's like any other."""
    kind = field.message_type or field.enum_type
    return kind is not None and kind.full_name in (_VALUE, _NULL_VALUE)


def _or_null(schema: Schema) -> Schema:
    """Return a schema that lets null through as well, which stands for a field that is not set."""
    if schema.get("$ref") == f"{COMPONENTS}{_VALUE}{_INPUT}":
        return schema
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, _NULL]}


def _at_most_one(fields: Mapping[str, FieldDescriptor]) -> Schema:
    """Return a schema that holds while of these fields of a oneof none or one is set."""
    # First of all that none is: what is wrong with it then names those that are, see `violations`.
    none, some = {}, []
    for name, field in fields.items():
        none[name] = False if _has_null(field) else _NULL
        one: Schema = {"required": [name]}
        some.append(one if _has_null(field) else {**one, "properties": {name: {"not": _NULL}}})
    return {"oneOf": [{"properties": none}, *some]}


def _references(schema: Any) -> Iterator[str]:
    """Yield the names of the components that a schema refers to."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix(COMPONENTS)
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def _redirected(schema: Any) -> Any:
    """Return a schema whose references are to its own definitions."""
    if isinstance(schema, dict):
        return {
            key: DEFINITIONS + value.removeprefix(COMPONENTS)
            if key == "$ref" and isinstance(value, str)
            else _redirected(value)
            for key, value in schema.items()
        }
    return [_redirected(each) for each in schema] if isinstance(schema, list) else schema


def _by_null(schema: Any) -> Any:
    """Return a schema that says the same as this one, with no `anyOf` where there is a schema or null."""
    if isinstance(schema, dict):
        if schema.get("anyOf", ())[1:] == [_NULL]:
            rest = {key: value for key, value in schema.items() if key != "anyOf"}
            return {**rest, "if": _NULL, "else": _by_null(schema["anyOf"][0])}
        return {key: _by_null(value) for key, value in schema.items()}
    return [_by_null(each) for each in schema] if isinstance(schema, list) else schema


def _by_type(held: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """Return a schema that says the same as this one of an Any, with no `anyOf`: it looks at the type that is named."""
    rules = []
    for each in held["anyOf"][1:]:
        of_type = definitions[each["$ref"].removeprefix(DEFINITIONS)]["properties"]["@type"]
        rules.append({"if": {"properties": {"@type": of_type}}, "then": each})
    names = "|".join(re.escape(each["$ref"][len(DEFINITIONS) : -len(_HELD)]) for each in held["anyOf"][1:])
    pattern = f"^{_HOST}/({names})$"
    _WORDS[pattern] = "the URL of a type that the service knows, such as type.googleapis.com/google.protobuf.Empty"
    known: Schema = {"properties": {"@type": {"type": "string", "pattern": pattern}}, "required": ["@type"]}
    return {"type": "object", "if": {"maxProperties": 0}, "else": {**known, "allOf": rules} if rules else False}


# What is wrong with a value, for people.

MOST_VIOLATIONS = 10
MOST_PARTS = 200  # of a value, for all that is wrong with it to be told
MOST_TEXT = 200  # characters of a path or an expectation

_TYPES = {
    "array": "an array",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}


def violations(validator: Draft202012Validator, value: Any) -> dict[str, str]:
    """Return what is wrong with a value: by field, such as `p.weight` or `score[3]`, what is expected of it.

    The field is empty for the value as a whole. At most `MOST_VIOLATIONS`, of a large value one only; each of at most
    `MOST_TEXT` characters; none of them repeats what was found. Empty if nothing is wrong.
    """
    found: dict[str, str] = {}
    for error in validator.iter_errors(value) if _is_small(value) else _first(validator, value):
        for path, text in _explained(error):
            found.setdefault(_bounded(_path(path)), _bounded(text))
            if len(found) == MOST_VIOLATIONS:
                return found
    return found


def _is_small(value: Any) -> bool:
    """Say whether all that is wrong with a value can be told in a few milliseconds."""
    parts, waiting = 0, [value]
    while waiting and parts <= MOST_PARTS:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            parts += len(each)
            waiting += islice(each.values() if isinstance(each, dict) else each, MOST_PARTS)
    return parts <= MOST_PARTS


def _first(validator: Draft202012Validator, value: Any) -> Iterator[ValidationError]:
    try:
        validator.validate(value)
    except ValidationError as error:
        yield error


Explained = tuple[list[str | int], str]


def _explained(error: ValidationError) -> Iterator[Explained]:
    path, about = list(error.instance_path), error.kind.as_dict()
    match error.kind.name:
        case "additionalProperties" | "unevaluatedProperties":
            for name in about["unexpected"]:
                yield [*path, name], "must be left out: there is no field of this name"
        case "required":
            yield [*path, about["property"]], "must be given"
        case "falseSchema":
            yield path, "must be left out: it is given under its other name, too"
        case "propertyNames":
            for _, text in _explained(about["error"]):
                yield path, f"must have keys of which each {text}"
        case "anyOf":
            yield from _of_any(path, about["context"])
        case "oneOf" if all(about["context"]):  # none of them fits
            yield from _of_any(path, about["context"])
        case "oneOf":
            names = [str(each.instance_path[-1]) for each in about["context"][0] if len(each.instance_path) > len(path)]
            yield (
                path,
                f"must have at most one of {', '.join(names)}" if names else "must fit one of its forms, not more",
            )
        case name:
            yield path, _expectation(name, about)


def _of_any(path: list[str | int], branches: list[list[ValidationError]]) -> Iterator[Explained]:
    """Explain a value that fits none of several schemas, by the one that it comes closest to."""
    close = [branch for branch in branches if not any(_is_other_kind(each, path) for each in branch)]
    if close:
        for error in min(close, key=len):
            yield from _explained(error)
        return
    texts = (text for branch in branches for each in branch[:1] for _, text in _explained(each))
    yield path, f"must be {' or '.join(dict.fromkeys(text.removeprefix('must be ') for text in texts))}"


def _is_other_kind(error: ValidationError, path: list[str | int]) -> bool:
    """Say whether it is the value itself that does not fit, rather than something in it, or how large it is."""
    return error.kind.name in ("type", "enum", "const") and list(error.instance_path) == path


def _expectation(name: str, about: Mapping[str, Any]) -> str:
    expected: Callable[[Any], str] = _EXPECTATIONS.get(name, lambda _: f"must be as its schema says: {name}")
    return expected(next(iter(about.values()), None))


def _types(types: Iterable[str]) -> str:
    return " or ".join(_TYPES[each] for each in sorted(types, key=lambda each: (each == "null", each)))


_EXPECTATIONS: dict[str, Callable[[Any], str]] = {
    "type": lambda types: f"must be {_types(types)}",
    "pattern": lambda pattern: f"must be {_WORDS.get(pattern) or f'text that matches {pattern}'}",
    "enum": lambda options: f"must be one of {', '.join(map(str, options))}",
    "const": lambda value: f"must be {value}",
    "minimum": lambda limit: f"must be at least {limit}",
    "maximum": lambda limit: f"must be at most {limit}",
    "exclusiveMinimum": lambda limit: f"must be above {limit}",
    "exclusiveMaximum": lambda limit: f"must be below {limit}",
    "minLength": lambda limit: f"must have at least {limit} characters",
    "maxLength": lambda limit: f"must have at most {limit} characters",
    "minItems": lambda limit: f"must have at least {limit} items",
    "maxItems": lambda limit: f"must have at most {limit} items",
    "minProperties": lambda limit: f"must have at least {limit} entries",
    "maxProperties": lambda limit: f"must have at most {limit} entries",
    "format": lambda form: f"must be text of the form {form}",
}
"""What is expected by each keyword whose error says one thing about it."""


def _path(parts: Iterable[str | int]) -> str:
    found = ""
    for part in parts:
        if isinstance(part, int):
            found += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_@][A-Za-z0-9_]*", part):
            found += f".{part}" if found else part
        else:
            found += f"[{_bounded(part)!r}]"
    return found


def _bounded(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 3] + "..."
