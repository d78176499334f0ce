"""Chat templates made of what costs time, memory or output, nested and grown: rendered, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import TEXTS, mutate_bytes, mutate_value
from qwenq.text.rendering import Rendering, TemplateFault, render

NUMBERS = (0, 1, -1, 7, 1000, 99_999, 10**6, 10**8, 10**10, 10**18, -(10**9))
FILTERS = ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round")  # of one number
PLAIN = ("upper", "list", "sort", "string", "length", "tojson", "urlize", "striptags", "escape", "reverse", "unique",
         "pprint", "items", "dictsort", "first", "last", "sum", "random", "join", "wordcount", "filesizeformat", "map",
         "groupby", "select", "safe", "xmlattr", "int", "float", "trim", "title", "no_such_filter")  # fmt: skip
OUTSIDE = ("''.__class__.__mro__[1].__subclasses__()", "self.__init__.__globals__", "cycler.__init__.__globals__.os",
           "lipsum.__globals__['os'].popen('id').read()", "range.__class__", "namespace.__init__.__globals__",
           "messages.__class__.__base__", "raise_exception.__globals__", "joiner.__init__.__code__", "config", "g",
           "().__reduce_ex__(2)", "'%s'.format_map(messages[0])",
           "'{0.__class__.__mro__}'.format(messages)")  # fmt: skip
_LONGEST = 1_000_000  # characters, several times what is read
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sea"}]


def expression(draw: Random, depth: int = 0) -> str:
    """Some expression of Jinja's, mostly one that grows."""
    kind, number = draw.randrange(12), draw.choice(NUMBERS)
    if depth > 2 or kind == 0:
        return draw.choice(("'x'", "[0]", "messages", "1", str(number), "none", "{}", "x", "loop", "tools", "''"))
    inner = expression(draw, depth + 1)
    if kind == 1:
        return f"({inner} * {number})"
    if kind == 2:
        operator = draw.choice(("+", "~", "-", "/", "//", "%", "in", "and", "=="))
        return f"({inner} {operator} {expression(draw, depth + 1)})"
    if kind == 3:
        return f"({inner} | {draw.choice(FILTERS)}({number}))"
    if kind == 4:
        return f"({inner} | {draw.choice(PLAIN)})"
    if kind == 5:
        return f"range({draw.choice((inner, str(number)))})"
    if kind == 6:
        return f"({inner} ** {draw.choice((inner, str(number)))})"
    if kind == 7:
        return draw.choice((f"lipsum(n={number})", f"'%0{abs(number)}d' % 1", f"'{{:>{abs(number)}}}'.format(1)",
                            f"'x'.ljust({number})", f"('x' | replace('x', 'x' * {number}))",
                            f"strftime_now('{'%c' * 99}')", f"raise_exception('y' * {number})",
                            f"dict(a=[1] * {number})"))  # fmt: skip
    if kind == 8:
        return draw.choice(OUTSIDE)
    if kind == 9:
        return "(" * min(abs(number), 20_000) + inner + ")" * min(abs(number), 20_000)
    if kind == 10:
        return f"{inner}[{draw.choice((inner, str(number), '::-1'))}]"
    return json.dumps(draw.choice(TEXTS))


def statement(draw: Random, depth: int = 0) -> str:
    """Some text of a template."""
    kind = draw.randrange(9)
    if depth > 3 or kind < 3:
        return "{{ " + expression(draw) + " }}"
    inner = statement(draw, depth + 1)
    if kind == 3:
        return "{% for x in " + expression(draw) + " %}" + inner + "{% endfor %}"
    if kind == 4:
        return "{% set x = " + expression(draw) + " %}" + inner
    if kind == 5:
        grown = draw.choice(("n.x + n.x", "[n.x, n.x]", "n.x * 2", "n.x ~ n.x"))
        times = draw.choice((10, 60, 99_999))
        loop = f"{{% for a in range({times}) %}}{{% set n.x = {grown} %}}{{% endfor %}}"
        return "{% set n = namespace(x='x') %}" + loop + inner
    if kind == 6:
        return "{% macro m(x) %}" + inner + draw.choice(("", "{{ m(x) }}{{ m(x) }}")) + "{% endmacro %}{{ m('x') }}"
    if kind == 7:
        return draw.choice((
            "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends x %}", "{% generation %}" + inner,
            "{% block b %}" + inner + "{% endblock %}", "{% raw %}{{", "{#" * 9999, "{% filter upper %}" + inner,
            "{% if " * 500, "{% break %}", "{% for a in b recursive %}{{ loop(a) }}{% endfor %}" + inner,
            "{% call(x) m() %}{% endcall %}", "{% do x.append(x) %}", "{% autoescape true %}" + inner,
        ))  # fmt: skip
    times = draw.choice((2, 50, 2000))
    return (inner * min(times, _LONGEST // len(inner) + 1))[:_LONGEST]


def template(draw: Random, published: str) -> str:
    """A template made up, or one that exists, damaged."""
    kind = draw.randrange(10)
    if kind < 7:
        return "".join(statement(draw) for _ in range(draw.choice((1, 1, 2, 5))))
    source = draw.choice((CHATML, published or CHATML))
    if kind < 9:
        return mutate_bytes(draw, source.encode()).decode("utf-8", "replace")
    at = draw.randrange(len(source) + 1)
    return source[:at] + statement(draw) + source[at:]


def conversation(draw: Random) -> Any:
    """Messages, now and then of what a template does not expect; a list of objects, as the reader sees to."""
    found = mutate_value(draw, MESSAGES, 2) if draw.random() < 0.3 else MESSAGES
    if draw.random() < 0.02:
        found = [{"role": "user", "content": "x" * 20_000_000}]
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else MESSAGES


class Templates:
    """Templates for one renderer, which a case that goes over a limit ends."""

    def __init__(self, tiny: Path) -> None:
        settings = json.loads((tiny / "tokenizer_config.json").read_bytes())
        self.published = str(settings.get("chat_template") or "")

    def case(self, draw: Random) -> Any:
        """Text, or TemplateFault: what either holds is bounded."""
        asked = Rendering(template(draw, self.published), conversation(draw), None, draw.random() < 0.5, {})
        try:
            text, _ = render(asked)
        except TemplateFault as fault:
            assert len(str(fault)) < 2000, len(str(fault))
            raise
        assert len(text) <= (1 << 18) + 8 * len(asked.encode()), len(text)
        return text
