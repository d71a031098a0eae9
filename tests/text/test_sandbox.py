"""A hostile template ends in an error, quickly, and without much memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from hybrid.text.sandbox import TemplateLimit, TemplateRefusal, compile_template, render

TESTS = Path(__file__).parent.parent

_DOUBLING = (
    "{% set ns = namespace(a=[1], b=[1], s='abcdefgh') %}{% for i in range(99) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
_LONG = "{% set x = 'a' * 1000000 %}"

LIMITED = {
    "product": "{{ 'a' * 10000000000 }}",
    "product of lists": "{{ [1] * 10000000000 }}",
    "product of numbers": "{{ ('9' * 4000) | int * ('9' * 4000) | int }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "doubling +": "{% set ns = namespace(s='a') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling ~": "{% set ns = namespace(s='a') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "nested, compared": _DOUBLING + "{{ ns.a == ns.b }}",
    "nested, tested": _DOUBLING + "{{ ns.a is eq ns.b }}",
    "nested, sorted": _DOUBLING + "{{ [ns.a, ns.b] | sort }}",
    "nested, written": _DOUBLING + "{{ ns.a }}",
    "nested, joined": _DOUBLING + "{{ ns.a | join }}",
    "nested, as JSON": _DOUBLING + "{{ ns.a | tojson }}",
    "nested, formatted": _DOUBLING + "{{ '%s' % (ns.a,) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' | format(10000000000, 1) }}",
    "braces": "{{ '{:10000000000}'.format(1) }}",
    "braces in braces": "{{ '{:{}}'.format(1, 10000000000) }}",
    "attr format": "{{ ('{:10000000000}' | attr('format'))(1) ~ 'a' * 10000000000 }}",
    "replace": _LONG + "{{ x.replace('a', x) }}",
    "replace filter": _LONG + "{{ x | replace('a', x) }}",
    "join": _LONG + "{{ x.join(range(10000) | list) }}",
    "join of characters": _LONG + "{{ x.join(x) }}",
    "set block": "{% set x %}{% for i in range(100000) %}"
    + "y" * 10000
    + "{% endfor %}{% endset %}",
    "set block of outputs": _LONG + "{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}"
    "{% endset %}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "slices": "{% set x = 'a' * 10000000 %}{% for i in range(1000) %}{% set y = x[1:] %}"
    "{% endfor %}",
    "split": "{{ ('a ' * 5000000).split() | length }}",
    "lists": "{% set x = range(100000) | list %}{{ ([x] * 100000) | map('list') | list }}",
    "sum of lists": "{% set x = range(100000) | list %}{{ ([x] * 100000) | sum(start=[]) }}",
    "batch": "{{ ([1] | batch(1000000000, 'x') | list) | length }}",
    "slice": "{{ ('abc' | slice(1000000000) | list) | length }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000) }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "equal lists": "{% set x = range(50000) | list %}{% set y = range(50000) | list %}"
    "{% for i in range(100000) %}{{ x == y }}{% endfor %}",
    "long": "x" * 2_000_000,
    "round": "{{ 1234 | round(-30000000) }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000,
}

# The escapes of published reports (CVE-2024-34359, CVE-2024-56326, CVE-2025-27516, CVE-2026-5760)
# and their kin.
ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "getitem": "{{ ''['__class__']['__mro__'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "encode": "{{ 'a'.encode().__class__ }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
}
# Without a value: the attribute is refused by being undefined, and so is what follows.
SILENT = {
    "attr": "{{ '' | attr('__class__') }}",
    "attr format": "{{ ('{0.__class__}' | attr('format'))('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "dict": "{{ dict.__globals__ is defined }}",
    "raise": "{{ raise_exception.__globals__ is defined }}",
}
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}

_MEASURED = """
import resource, sys, time
from hybrid.text.sandbox import TemplateLimit, compile_template, render
from text.test_sandbox import LIMITED, MESSAGES
render(compile_template("{{ messages[0].content }}"), MESSAGES)
before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
for name, source in LIMITED.items():
    started = time.process_time()
    try:
        render(compile_template(source), MESSAGES)
    except TemplateLimit:
        slowest = max(slowest, time.process_time() - started)
    else:
        sys.exit(f"{name}: was rendered")
print(slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_endless_and_huge_templates_are_stopped():
    """In a process of its own, so that its processor time and its peak of memory are theirs."""
    command = [sys.executable, "-c", _MEASURED]
    run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    seconds, megabytes = map(float, run.stdout.split())
    assert seconds < 5  # of 0.8 that a rendering may take
    assert megabytes < 100


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name):
    with pytest.raises((jinja2.TemplateError, TypeError, AttributeError)):
        render(compile_template(ESCAPES[name]), MESSAGES)


@pytest.mark.parametrize("name", SILENT)
def test_what_the_sandbox_hides_is_undefined(name):
    assert render(compile_template(SILENT[name]), MESSAGES) in ("", "False")


def test_a_refusal_carries_the_templates_words():
    with pytest.raises(TemplateRefusal, match="no system role"):
        render(compile_template("{{ raise_exception('no system role') }}"), {})


def test_what_a_rendering_may_make_grows_with_the_messages():
    source = (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m %}{% endfor %}"
        "{{ ns.s }}"
    )
    messages = ["x" * 20_000] * 100
    assert render(compile_template(source), {"messages": messages}) == "".join(messages)


def test_json_is_as_python_writes_it():
    source = (
        "{{ value | tojson }} {{ value | tojson(indent=2) }} {{ value | tojson(sort_keys=true) }}"
    )
    value = {"b": "<ü>", "a": [1, None, True]}
    text = render(compile_template(source), {"value": value})
    assert text.startswith('{"b": "<ü>", "a": [1, null, true]} {\n  "b"')
    assert text.endswith('{"a": [1, null, true], "b": "<ü>"}')


def test_a_limit_is_an_exception_of_its_own():
    assert not issubclass(TemplateLimit, jinja2.TemplateError)


@pytest.mark.parametrize("use", ["tojson | length", "string | length", "join", "list"])
def test_variables_count_each_time_that_they_are_used(use):
    template = compile_template("{{ ([messages] * 9000) | " + use + " }}")
    with pytest.raises(TemplateLimit):
        render(template, {"messages": [{"role": "user", "content": "x" * 10_000}]})
