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
from hybrid.text.grammar import JSON_OPTIONS, MAX_SCHEMA, closed
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


def forced_calls(format: ToolFormat, tools: Sequence[Tool], spell: Spell, *, one: bool) -> str:
    """Return the grammar of answers that are calls: one, or one after the other.

    Raises InvalidOption for tools that the format cannot express, or that are too large.
    """
    functions = [(name, closed(schema)) for name, schema in map(function_of, tools)]
    writer = _WRITERS[type(format)]
    rules, call, separator = writer(functions, spell)
    many = "" if one or separator is None else f" ({separator} call)*"
    start = f"call{many}"
    if isinstance(format, PythonCalls):
        begin, end = spell(format.begin), spell(format.end)
        start = f'{begin} "\\n```python\\n" {start} "\\n```\\n" {end}'
    lines = [f"start: {start}", f"call: {call}", *rules]
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
    rules, names, size = [_XML], list[str](), 0
    for i, (name, schema) in enumerate(functions):
        if '"' in name:
            raise InvalidOption(f"tools: {name!r:.60}: the model's format has no such names")
        arguments, required = _properties(schema)
        parts = []
        for j, (key, value) in enumerate(arguments.items()):
            rules.append(f"xml_{i}_{j}: {_xml_value(value, schema)}")
            size += len(rules[-1])
            if size > MAX_SCHEMA:  # each parameter with references brings all definitions along
                raise InvalidOption(
                    f"tools: {name}: its schema is too large for this model's calls"
                )
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
    target = schema
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        target = _resolved(schema["$ref"], root)
    kind = target.get("type") if isinstance(target, Mapping) else None
    if kind is not None and kind != "string":
        if "$ref" not in json.dumps(schema):
            return _json_rule(schema)
        return _json_rule({**_rebased(schema, "#/$defs/all"), **_defined({"all": root})})
    schema = target
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
        values = _PythonValues(schema, f"def_{i}")
        items = {
            key: f"{json.dumps(escaped(key) + '=')} {values.expression(value)}"
            for key, value in arguments.items()
        }
        rules.append(f"args_{i}: {_listed(items, required, f'args_{i}', rules)}")
        rules += values.rules
        names.append(f"call_{i}")
    return rules, " | ".join(names), '"\\n"'


class _PythonValues:
    """Lark expressions of Python values that stand for the JSON values of schemas.

    What a reference leads to is a rule of its own, so that the text is no longer than the schemas.
    """

    def __init__(self, root: Mapping[str, Any], prefix: str) -> None:
        """`root` is the whole schema, into which references lead; `prefix` begins rules' names."""
        self.rules: list[str] = []
        self._root, self._prefix = root, prefix
        self._names: dict[str, str] = {}  # of rules, by reference
        self._n_objects = 0

    def expression(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            return "py_any"
        if isinstance(reference := schema.get("$ref"), str):
            return self._rule(reference)
        if "const" in schema or "enum" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if not isinstance(values, (list, tuple)) or not values:
                return "py_any"
            return "(" + " | ".join(json.dumps(repr_of(value)) for value in values) + ")"
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), (list, tuple)) and schema[key]:
                return "(" + " | ".join(map(self.expression, schema[key])) + ")"
        kind = schema.get("type")
        if isinstance(kind, (list, tuple)) and kind:
            others = {key: value for key, value in schema.items() if key != "type"}
            each = [self._typed(one, others) for one in kind if isinstance(one, str)]
            return "(" + " | ".join(each or ["py_any"]) + ")"
        return self._typed(kind, schema)

    def _typed(self, kind: Any, schema: Mapping[str, Any]) -> str:
        if kind == "array":
            item = self.expression(schema.get("items"))
            return f'("[" ({item} (", " {item})*)? "]")'
        if kind == "object":
            arguments, required = _properties(schema)
            if not arguments:
                return "py_dict"
            items = {
                key: f"{json.dumps(json.dumps(key) + ': ')} {self.expression(value)}"
                for key, value in arguments.items()
            }
            self._n_objects += 1
            name = f"{self._prefix}_object{self._n_objects}"
            return f'("{{" {_listed(items, required, name, self.rules)} "}}")'
        return _PYTHON_TYPES.get(kind, "py_any") if isinstance(kind, str) else "py_any"

    def _rule(self, reference: str) -> str:
        """Return the name of the rule for what a reference leads to."""
        name = self._names.get(reference)
        if name is None:
            name = self._names[reference] = f"{self._prefix}_{len(self._names)}"
            target = _resolved(reference, self._root)
            is_itself = isinstance(target, Mapping) and target.get("$ref") == reference
            rule = "py_any" if is_itself else self.expression(target)
            self.rules.append(f"{name}: {rule}")
        return name


_PYTHON_TYPES = {
    "string": "PY_STRING",
    "integer": "PY_INTEGER",
    "number": "PY_NUMBER",
    "boolean": '("True" | "False")',
    "null": '"None"',
}


def repr_of(value: Any) -> str:
    """Return a JSON value as Python, with the quotes that the grammar's strings have."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _listed(items: Mapping[str, str], required: set[str], name: str, rules: list[str]) -> str:
    """Return the Lark expression of items with ", " between them, the required ones first.

    Of the others each is a rule, and so is what may follow it: `name` begins the rules' names.
    """
    first = [item for key, item in items.items() if key in required]
    others = [item for key, item in items.items() if key not in required]
    for i, item in enumerate(others):
        rules.append(f"{name}_item{i}: {item}")
        following = f" {name}_rest{i + 1}" if i + 1 < len(others) else ""
        rules.append(f'{name}_rest{i}: (", " {name}_item{i})?{following}')
    if first:
        rest = f" {name}_rest0" if others else ""
        return "(" + ' ", " '.join(first) + rest + ")"
    choices = [
        f"{name}_item{i}" + (f" {name}_rest{i + 1}" if i + 1 < len(others) else "")
        for i in range(len(others))
    ]
    return "(" + " | ".join(choices) + ")?" if others else '""'


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


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """Return what a reference within a schema leads to; None if it leads nowhere."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _json_rule(schema: Any) -> str:
    schema = schema if isinstance(schema, Mapping) else {}
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


_WRITERS: dict[type[ToolFormat], Callable[[_Functions, Spell], _Written]] = {
    TaggedJson: _tagged_json,
    BareJson: _bare_json,
    XmlCalls: _xml,
    PythonCalls: _python,
}
