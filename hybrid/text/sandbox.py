"""Compile and render Jinja templates that nobody has read, within bounds of time and memory.

A chat template is a program that comes with a model's files. Jinja's immutable sandbox keeps it
away from Python's internals, but not from loops over loops, or from a string that doubles itself.
Here every operation pays for what it makes, and looks at the clock. A template that uses up its
bytes or its time is stopped.

Jinja calls a method of the environment for calls, and for the operators that it is told to
intercept. Loops, `~`, comparisons and slices have no such method, so the syntax tree is changed:
they become filters of this module. The set-up is that of transformers (`apply_chat_template`):
trimmed blocks, loop controls, the `generation` tag, `raise_exception`, `strftime_now`, and a
`tojson` that escapes no HTML.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from hybrid.text.budget import (
    MAX_LIST,
    MAX_WIDTH,
    WIDE_BRACES,
    WIDE_PERCENT,
    Budget,
    TemplateLimit,
    check_format,
    check_method,
    check_power,
    check_product,
    current,
    pay_for_replacement,
)

__all__ = ["GenerationTag", "TemplateLimit", "TemplateRefusal", "compile_template", "render"]

MAX_SOURCE = 1 << 20  # characters of a template

_FILTER_NAMES = (
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape "
    "format groupby indent int items join last length list lower map max min reject rejectattr "
    "replace reverse round safe select selectattr slice sort string striptags title trim truncate "
    "unique upper urlencode wordcount"
)
_WITH_WIDTH = frozenset(("batch", "center", "indent", "slice", "truncate"))
_GROWTH = {"e": 6, "escape": 6, "forceescape": 6, "urlencode": 12, "wordcount": 32}


class TemplateRefusal(Exception):
    """A template called `raise_exception`: it does not accept its variables."""


class _Metering(NodeTransformer):
    """Makes loops, `~`, comparisons and slices call the filters below."""

    def _filter(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _ticking(self, node: Any) -> Any:
        """Count each run of a body, with the text that it writes whatever the variables are."""
        self.generic_visit(node)
        n = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        n += sum(len(part.data) for part in node.body if isinstance(part, nodes.TemplateData))
        count = self._filter("_count", nodes.Const(n, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._filter("_small", node.expr)
        for operand in node.ops:
            operand.expr = self._filter("_small", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("_paid", node) if isinstance(node.arg, nodes.Slice) else node


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an answer for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as in the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _SafeNamespace(Namespace):
    """A namespace whose attributes cannot hide Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
            optimized=False,
        )
        self.filters = {
            name: _metered(name, function)
            for name, function in self.filters.items()
            if name in _FILTER_NAMES.split()
        }
        self.filters |= {"tojson": _metered("tojson", _to_json), "sum": _metered("sum", _sum)}
        self.filters |= {"_count": _count, "_concat": _concat, "_small": _small, "_paid": _paid}
        for name, test in self.tests.items():
            self.tests[name] = _metered(name, cast(Callable[..., Any], test))
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _dict,
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metering().visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        budget.tick()
        if operator == "*":
            check_product(budget, left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            check_format(budget, WIDE_PERCENT, left, right)
        return budget.pay_for(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(current.get(), WIDE_BRACES, text, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call(*args: Any, **kwargs: Any) -> Any:
        function, given = args[2], list(args[3:])  # after `self` and the context
        budget = current.get()
        budget.tick()
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            check_method(budget, text, function.__name__, given)
        return budget.pay_for(ImmutableSandboxedEnvironment.call(*args, **kwargs))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or a test that pays for its arguments and its result."""

    @functools.wraps(function)  # also keeps Jinja's marks, such as that it takes the context
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.tick()
        given = [*args, *kwargs.values()]
        n_characters = sum(map(budget.check_size, given))
        budget.pay(_GROWTH.get(name, 0) * n_characters)
        texts = [value for value in given if isinstance(value, str)]
        if name == "round" and any(
            isinstance(value, int) and abs(value) > 100 for value in given[1:]
        ):
            raise TemplateLimit("it rounds to more than 100 digits")
        if name in _WITH_WIDTH and any(_is_wide(value) for value in given):
            raise TemplateLimit(f"it gives {name} a size of more than {MAX_WIDTH:,}")
        if name == "indent" and texts:
            budget.pay(texts[0].count("\n") * (MAX_WIDTH + sum(map(len, texts[1:]))))
        if name == "replace" and len(texts) >= 3:
            pay_for_replacement(budget, *texts[:3])
        if name == "join":
            separator = max((len(text) for text in texts), default=0)
            sizes = [len(value) for value in given if isinstance(value, (list, tuple, str))]
            budget.pay(n_characters + separator * max(sizes, default=0))
        if name == "format" and texts:
            check_format(budget, WIDE_PERCENT, texts[0], given[1:])
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _ticking(budget, result)
        return budget.pay_for(result)

    return metered


def _is_wide(value: object) -> bool:
    if isinstance(value, str):
        return False
    return isinstance(value, int) and abs(value) > MAX_WIDTH


def _ticking(budget: Budget, items: Iterator[Any]) -> Iterator[Any]:
    for n, item in enumerate(items):
        budget.tick()
        if n >= MAX_LIST:
            raise TemplateLimit(f"it made a list of more than {MAX_LIST:,} elements")
        yield item


def _finalize(value: Any) -> Any:
    budget = current.get()
    if isinstance(value, (list, tuple, dict)):
        budget.pay(4 * budget.check_size(value))
    elif isinstance(value, str):
        budget.pay(len(value))
    return value


def _count(n_characters: int) -> None:
    budget = current.get()
    budget.tick()
    budget.pay(n_characters)


def _concat(values: list[Any]) -> str:
    budget = current.get()
    budget.tick()
    budget.pay(2 * budget.check_size(values))
    text: str = budget.pay_for("".join(map(str, values)))
    return text


def _small(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        current.get().check_size(value)
    return value


def _paid(value: Any) -> Any:
    return current.get().pay_for(value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _sum(values: Any, attribute: str | int | None = None, start: float = 0) -> Any:
    total = start
    for value in values:
        number = value if attribute is None else value[attribute]
        if not isinstance(number, (int, float)) or not isinstance(total, (int, float)):
            raise TypeError("sum adds numbers only")
        total += number
    return total


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    budget = current.get()
    width = indent if isinstance(indent, int) else 0
    if width > 64 or (separators is not None and sum(map(len, separators)) > 64):
        raise TemplateLimit("tojson: its indent or its separators are too long")
    budget.pay(8 * budget.check_size(value))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"\d{3}", format):
        raise TemplateLimit("strftime_now: its format is too long")
    return datetime.now().strftime(format)


_environment = functools.cache(_Environment)


def compile_template(source: str) -> jinja2.Template:
    """Compile a template. Raises jinja2.TemplateSyntaxError, TemplateLimit."""
    if len(source) > MAX_SOURCE:
        raise TemplateLimit(f"it has more than {MAX_SOURCE:,} characters")
    try:
        return _environment().from_string(source)
    except (RecursionError, MemoryError):
        raise TemplateLimit("it is nested too deeply") from None


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render a template. Variables must be JSON's types only.

    Raises TemplateLimit, TemplateRefusal, and what Jinja or Python raise for a broken template.
    """
    token = current.set(Budget(variables))
    try:
        return "".join(template.generate(variables))
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"it needs too much ({type(error).__name__})") from None
    finally:
        current.reset(token)
