"""Grammars that force a model to call one of its tools, in the format of its chat template.

They are written in llguidance's dialect of Lark, with JSON schemas inside:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. What they accept, the parsers of
tool_calls.py read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybrid.errors import InvalidOption
from hybrid.text.grammar import JSON_OPTIONS, closed
from hybrid.text.tool_calls import (
    BareJson,
    PythonCalls,
    TaggedJson,
    Tool,
    ToolFormat,
    XmlCalls,
    escaped,
    function_of,
)

Spell = Callable[[str], str]  # a marker → its tokens in Lark: special ones by their ids
_MAX_DEPTH = 16  # of nested schemas that a Python value follows
_PYTHON = r"""
py_any: PY_STRING | PY_NUMBER | "True" | "False" | "None" | py_list | py_dict
py_list: "[" (py_any (", " py_any)*)? "]"
py_dict: "{" (PY_STRING ": " py_any (", " PY_STRING ": " py_any)*)? "}"
PY_STRING: /"([^"\\\x00-\x1f\x7f]|\\["\\nrt])*"/
PY_INTEGER: /-?(0|[1-9][0-9]{0,17})/
PY_NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,2})?/
"""
_XML = r"""
XML_TEXT: /[^<&\n\x00]*/
XML_CDATA: /([^\]\x00]|\][^\]\x00])*/
"""


def forced_calls(
    format: ToolFormat, tools: Sequence[Tool], spell: Spell, *, one: bool, schema: Any = None
) -> str:
    """Return the grammar of answers that are calls: one, or one after the other.

    With a JSON `schema`, an answer may be such a value instead. Raises InvalidOption for tools that
    the format cannot express.
    """
    functions = [(name, closed(schema)) for name, schema in map(function_of, tools)]
    writer = _WRITERS[type(format)]
    rules, call, separator = writer(functions, spell)
    many = "" if one or separator is None else f" ({separator} call)*"
    start = f"call{many}"
    if isinstance(format, PythonCalls):
        begin, end = spell(format.begin), spell(format.end)
        start = f'{begin} "\\n```python\\n" {start} "\\n```\\n" {end}'
    lines = [f"start: {start}" + (" | json_value" if schema is not None else "")]
    lines += [f"call: {call}", *rules]
    if schema is not None:
        lines.append(f"json_value: {_json_rule(schema)}")
    return "%llguidance {}\n" + "\n".join(lines) + "\n"


_Written = tuple[list[str], str, str | None]  # rules, the body of `call`, what is between calls
_Functions = Sequence[tuple[str, Mapping[str, Any]]]


def _tagged_json(functions: _Functions, spell: Spell) -> _Written:
    body = _json_rule(_call_schema(functions, "arguments"))
    begin, end = spell(TaggedJson.begin), spell(TaggedJson.end)
    return [f"body: {body}"], f'{begin} "\\n" body "\\n" {end}', '"\\n"'


def _bare_json(functions: _Functions, spell: Spell) -> _Written:
    return [], _json_rule(_call_schema(functions, "parameters")), None


def _xml(functions: _Functions, spell: Spell) -> _Written:
    rules, names = [_XML], []
    for i, (name, schema) in enumerate(functions):
        if '"' in name:
            raise InvalidOption(f"tools: {name!r:.60}: the model's format has no such names")
        arguments, required = _properties(schema)
        parts = []
        for j, (key, value) in enumerate(arguments.items()):
            rules.append(f"xml_{i}_{j}: {_xml_value(value, schema)}")
            begin, close = spell("<param"), spell("</param>")
            head = json.dumps(f' name="{key}">')
            param = f"{begin} {head} xml_{i}_{j} {close}"
            parts.append(param if key in required else f"({param})?")
        head = json.dumps(f' name="{name}">')
        body = " ".join(parts)
        rules.append(f"call_{i}: {spell('<function')} {head} {body} {spell('</function>')}")
        names.append(f"call_{i}")
    return rules, " | ".join(names), '"\\n"'


def _xml_value(schema: Any, root: Mapping[str, Any]) -> str:
    schema = _resolved(schema, root)
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind is not None and kind != "string":
        return _json_rule({**_rebased(schema, "#/$defs/all"), **_defined({"all": root})})
    if isinstance(schema, Mapping) and isinstance(schema.get("enum"), (list, tuple)):
        return " | ".join(json.dumps(str(value), ensure_ascii=False) for value in schema["enum"])
    return 'XML_TEXT | "<![CDATA[" XML_CDATA "]]>"'


def _python(functions: _Functions, spell: Spell) -> _Written:
    rules, names = [_PYTHON], []
    for i, (name, schema) in enumerate(functions):
        rules.append(f'call_{i}: {json.dumps(name)} "(" args_{i} ")"')
        arguments, required = _properties(schema)
        for key in arguments:
            if not key.isidentifier():
                raise InvalidOption(
                    f"tools: {name}: the parameter {key!r:.60} is no name in Python, which this "
                    "model's calls are written in"
                )
        items = {
            key: f"{json.dumps(escaped(key) + '=')} {_python_value(value, schema, 0)}"
            for key, value in arguments.items()
        }
        rules.append(f"args_{i}: {_listed(items, required)}")
        names.append(f"call_{i}")
    return rules, " | ".join(names), '"\\n"'


def _python_value(schema: Any, root: Mapping[str, Any], depth: int) -> str:
    """Return the Lark expression of Python values that stand for a schema's JSON values.

    `root` is the whole schema, into which references lead.
    """
    schema = _resolved(schema, root)

    def inner(value: Any) -> str:
        return _python_value(value, root, depth + 1)

    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return "py_any"
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, (list, tuple)) or not values:
            return "py_any"
        return "(" + " | ".join(json.dumps(repr_of(value)) for value in values) + ")"
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), (list, tuple)) and schema[key]:
            return "(" + " | ".join(inner(each) for each in schema[key]) + ")"
    kind = schema.get("type")
    if isinstance(kind, (list, tuple)) and kind:
        each = [inner({**schema, "type": one}) for one in kind]
        return "(" + " | ".join(each) + ")"
    match kind:
        case "string":
            return "PY_STRING"
        case "integer":
            return "PY_INTEGER"
        case "number":
            return "PY_NUMBER"
        case "boolean":
            return '("True" | "False")'
        case "null":
            return '"None"'
        case "array":
            item = inner(schema.get("items"))
            return f'("[" ({item} (", " {item})*)? "]")'
        case "object":
            arguments, required = _properties(schema)
            if not arguments:
                return "py_dict"
            items = {
                key: f"{json.dumps(json.dumps(key) + ': ')} {inner(value)}"
                for key, value in arguments.items()
            }
            return f'("{{" {_listed(items, required)} "}}")'
    return "py_any"


def repr_of(value: Any) -> str:
    """Return a JSON value as Python, with the quotes that the grammar's strings have."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _listed(items: Mapping[str, str], required: set[str]) -> str:
    """Return the Lark expression of items with ", " between them, the required ones first."""
    first = [item for key, item in items.items() if key in required]
    others = [item for key, item in items.items() if key not in required]
    rest = [f'(", " {item})?' for item in others]
    if first:
        return "(" + ' ", " '.join(first) + " " + " ".join(rest) + ")"
    if not others:
        return '""'
    choices = [" ".join([others[i], *rest[i + 1 :]]) for i in range(len(others))]
    return "(" + " | ".join(choices) + ")?"


def _properties(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], set[str]]:
    properties, required = schema.get("properties"), schema.get("required")
    found = properties if isinstance(properties, Mapping) else {}
    names = required if isinstance(required, (list, tuple)) else ()
    return found, {name for name in names if isinstance(name, str)}


def _call_schema(functions: _Functions, key: str) -> dict[str, Any]:
    """Return the JSON schema of a call of one of the functions."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, key: {"$ref": f"#/$defs/{i}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for i, (name, _) in enumerate(functions)
    ]
    schemas = {str(i): schema or {"type": "object"} for i, (_, schema) in enumerate(functions)}
    return {"anyOf": calls, **_defined(schemas)}


def _defined(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return schemas as definitions of another one, with their references led into them."""
    return {"$defs": {key: _rebased(value, f"#/$defs/{key}") for key, value in schemas.items()}}


def _rebased(schema: Any, place: str) -> Any:
    """Return a schema that is no longer the root, but at `place`: its references lead there."""
    if isinstance(schema, Mapping):
        reference = schema.get("$ref")
        moved = {key: _rebased(value, place) for key, value in schema.items()}
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = place + reference[1:]
        return moved
    return [_rebased(value, place) for value in schema] if isinstance(schema, list) else schema


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Return what a schema's reference leads to; {} if it leads nowhere."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        schema = root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return {}


def _json_rule(schema: Any) -> str:
    schema = schema if isinstance(schema, Mapping) else {}
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


_WRITERS: dict[type[ToolFormat], Callable[[_Functions, Spell], _Written]] = {
    TaggedJson: _tagged_json,
    BareJson: _bare_json,
    XmlCalls: _xml,
    PythonCalls: _python,
}
