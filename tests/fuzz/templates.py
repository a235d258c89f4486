"""Random chat templates, weighted towards what is expensive: each renders or raises a MinirkscError, in time.

`python tests/fuzz/templates.py --seed 0 --count 5000`; every item is one program from a small grammar of jinja2,
compiled and rendered in a child with limits on CPU time and memory.
"""

import random
import re
import sys
import time
from collections.abc import Callable

import children
from children import Fault, Limits

from minirksc.text.chat_template import ChatTemplate
from minirksc.text.template_sandbox import Sandbox

MAX_CPU_S = 3.0
LIMITS = Limits(cpu_s=8, wall_s=90, memory=1 << 30, batch=25)
MESSAGES = [
    {"role": "system", "content": "You are a fuzzer."},
    {"role": "user", "content": "Wörld " * 200},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
    {"role": "tool", "content": "9" * 3000},
    {"role": "user", "content": "x"},
]
NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "-1",
    "7",
    "10",
    "99",
    "1000",
    "9999",
    "99999",
    "100000",
    "10**5",
    "9999999",
    "10**9",
    "2**62",
)
SMALL = ("1", "2", "3", "10")
RULES = {
    "str": (
        "'x'", "''", "'%'", "'\\n'", "a", "b", "ns.v", "bos_token", "messages[1].content",
        "messages[3]['content']", "(<s> ~ <a>)", "(<s> + <s>)",
        "(<s> * <i>)", "(<s> * <n>)", "(<s>)[<n>:<n>]", "(<s>)[::<n>]", "(<s> if <b> else <s>)",
        *("(<s>)." + m for m in (
            "upper()", "lower()", "title()", "swapcase()", "strip()", "casefold()", "capitalize()",
            "replace(<s>, <s>)", "replace('', <s>)",
            "join(<l>)", "center(<n>)", "ljust(<n>)", "rjust(<n>, 'é')", "zfill(<n>)", "expandtabs(<n>)",
            "format(<a>, <a>)", "format(*<l>)",
            "format_map({'a': <s>})", "translate({97: <s>, 120: <s>, 87: 'x' * <n>})", "translate(<s>)",
            "removeprefix(<s>)",
            "encode().hex()", "encode().decode()", "lstrip(<s>)", "partition(<s>) | join",
        )),
        *("(<s> | " + f + ")" for f in (
            "upper", "escape", "e", "forceescape", "indent(<n>)", "indent(<s>)", "center(<n>)", "replace('', <s>)",
            "replace('x', <s>, <n>)",
            "striptags", "title", "trim(<s>)", "truncate(<n>)", "urlencode", "urlize(<n>)", "wordwrap(<n>)",
            "wordwrap(1, wrapstring=<s>)", "reverse",
            "string", "safe", "default(<s>)", "format(<a>, <a>)", "capitalize",
        )),
        "(<l> | join(<s>))", "(<l> | string)", "(<a> | tojson)", "(<a> | tojson(indent=<n>))", "(<a> | pprint)",
        "(<i> | filesizeformat)", "(<i> | string)",
        "({s: s} | xmlattr)", "({'a': <s>} | xmlattr)", "('%<n>d' % <i>)", "('%*d' % (<i>, 1))",
        "('%s%s' % (<s>, <s>))", "('%.<n>f' % <i>)",
        "('{:<n>}'.format(<a>))", "('{:>{}}'.format(<s>, <i>))", "('{0}{0}{0}'.format(<s>))",
        "('{0.__class__}'.format(<s>))",
        "('%(a)s' % {'a': <s>})", "f(<s>)", "strftime_now(<s>)", "strftime_now('%<n>Y')",
    ),
    "int": (
        "<n>", "<n>", "<n>", "(<i> + <i>)", "(<i> * <i>)", "(<i> - <i>)", "(<i> ** <i>)", "(<n> ** <n>)",
        "(<i> // <i>)", "(<i> % <i>)", "(<i> / <n>)", "0.5",
        "(<s> | length)", "(<l> | length)", "(<l> | sum)", "(<s>).count(<s>)", "(<s>).find(<s>)",
        "(<i> | round(<n>))", "(<i> | round(<n>, 'ceil'))",
        "(<i> | abs)", "(<s> | int)", "(<s> | int(<n>, <n>))", "(<s> | float)", "(<l> | max)", "(<s> | wordcount)",
        "(<i>).bit_length()",
        "(<i> if <b> else <i>)", "('9' * <n>) | int", "-<i>",
    ),
    "list": (
        "range(<n>)", "range(<n>)", "range(<n>, <n>, <n>)", "messages", "[]", "[<a>, <a>]", "(<l> + <l>)",
        "(<l> * <n>)", "(<s>).split(<s>)",
        "(<s>).splitlines()", "(<s>).partition(<s>)", "(<s> | list)", "(<l>)[<n>:<n>]", "(<l>)[::-1]",
        "(({1: <a>}).items() | list)", "dict(a=<a>).values()",
        *("(<l> | " + f + ")" for f in (
            "list", "batch(<n>)", "batch(<n>, <a>) | list", "slice(<n>)", "slice(<n>, <a>) | list", "sort",
            "sort(reverse=true)", "unique", "reverse | list",
            "map('string')", "map('upper') | list", "map('list')", "map('center', <n>) | list", "map('tojson')",
            "select | list", "select('odd') | list",
            "reject('none') | list", "selectattr('role', 'equalto', 'user') | list", "groupby('role')",
            "map(attribute='content') | list",
            "sum(start=[])",
        )),
        "({'b': <a>, 'a': <a>} | dictsort)", "({'a': <a>} | items)", "(<s> | batch(<n>) | list)",
        "(<s> | slice(<n>) | list)", "(<l> if <b> else <l>)",
    ),
    "bool": (
        "true", "false", "(<a> == <a>)", "(<i> < <i>)", "(<s> in <s>)", "(<a> in <l>)", "not <b>", "(<b> and <b>)",
        "(<b> or <b>)", "(<a> is defined)",
        "(<s>).startswith(<s>)", "(<i> is odd)", "(<i> is divisibleby <i>)", "(<s> < <s>)", "(<l> < <l>)",
        "(<s> is string)", "(<l> == <l>)",
    ),
}  # fmt: skip
"""Forms of each type; <s>, <i>, <l>, <b> and <a> stand for one of that type or any, <n> for a number as it is."""
STRANGE = (
    "(<a>).__class__", "(<a>).__class__.__mro__", "f.__globals__", "(<a>).mro()", "raise_exception(<s>)",
    "cycler(<a>, <a>).next()", "joiner(<s>)()",
    "(<a> | attr('__class__'))", "(<s> | map(attribute=<s>) | list)", "(<a>)[<a>]", "(<a> + <a>)", "(<a> * <a>)",
    "(<a> | random)", "namespace(v=<a>)",
    "(<l>).append(<a>)", "(<l>).extend(<l>)", "dict(a=<a>).update({1: 2})", "none", "tools", "loop", "self",
    "undefined_name.x", "messages[2].tool_calls",
    "caller()", "(<a>).<s>", "(<s>).encode(<s>)", "(<i>).to_bytes(<n>, 'big')", "loop.previtem",
    "loop.index ~ <s>", "(<i>).__pow__(<i>)", "lipsum(<n>)", "loop.cycle(<a>, <a>)", "(<a> | <s>)", "_minirksc_guard",
)  # fmt: skip


def _is_known(form: str) -> bool:
    """Whether the sandbox has all filters of a form: one that it lacks ends a template before it has begun."""
    return all(name in FILTERS for name in re.findall(r"\| (\w+)", form))


FILTERS = frozenset(Sandbox().filters)
STRANGE += tuple(form for forms in RULES.values() for form in forms if not _is_known(form))
RULES = {kind: tuple(filter(_is_known, forms)) for kind, forms in RULES.items()}
HEAD = "{% set a, b, ns = 'aa', 'b', namespace(v='') %}{% macro f(x) %}{{ x }}!{% endmacro %}"
KINDS = {"s": "str", "i": "int", "l": "list", "b": "bool", "a": "any"}


class Grammar:
    """Programs of one seed.

    Args:
        rng: chooses.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def program(self) -> str:
        """A whole template."""
        body = "".join(self.statement(self.rng.choice((0, 1, 1, 2, 3))) for _ in range(self.rng.choice((1, 2, 3, 5))))
        source = HEAD + "{% set a = " + self.one("str", 1) + " %}" + body
        if self.rng.random() < 0.12:
            source = self.rng.choice(LONG)(self, source)
        return source

    def statement(self, depth: int) -> str:
        """One statement, with others in it while `depth` is left."""
        rng, one = self.rng, self.one
        inner = (
            self.statement(depth - 1) + self.statement(depth - 2)
            if depth > 0
            else rng.choice(("text", "{{ a }}", "é" * 9))
        )
        name = rng.choice(("a", "b", "ns.v"))
        if rng.random() < 0.015:
            return rng.choice((
                "{% generation %}" + inner + "{% endgeneration %}", "{% break %}", "{% continue %}",
                "{%- raw -%}" + inner + "{% endraw %}{# #}", "{% include " + one("str", 1) + " %}",
                "{% extends 'x' %}", "{% import 'x' as y %}",
                "{% block z scoped %}" + inner + "{{ self.z() }}{% endblock %}",
                f"{{% for a in {one('list', 1)} recursive %}}{inner}{{{{ loop({one('list', 1)}) }}}}{{% endfor %}}",
            ))  # fmt: skip
        return rng.choice((
            lambda: "{{ " + one("str", 3) + " }}",
            lambda: "{{ " + one("any", 3) + " }}",
            lambda: "{{ " + one("int", 3) + " }}",
            lambda: "{% set " + name + " = " + one("str", 3) + " %}" + inner,
            lambda: "{% set " + name + " = " + name + rng.choice((" ~ ", " + ")) + one("str", 1) + " %}" + inner,
            lambda: "{% for m in " + one("list", 2) + " %}" + inner + "{% endfor %}",
            lambda: "{% for m in range(" + rng.choice(NUMBERS) + ") %}" + inner + "{% endfor %}",
            lambda: "{% for m in range(9999) %}{% set ns.v = ns.v ~ " + one("str", 1) + " %}{% endfor %}" + inner,
            lambda: f"{{% for m in {one('list', 1)} if {one('bool', 1)} %}}{inner}{{% else %}}{inner}{{% endfor %}}",
            lambda: "{% if " + one("bool", 2) + " %}" + inner + "{% else %}" + inner + "{% endif %}",
            lambda: f"{{% macro f(x, y={one('str', 1)}) %}}{inner}{{{{ x }}}}{{% endmacro %}}{{{{ f(a) }}}}",
            lambda: f"{{% macro g(x, n) %}}{{{{ g(x ~ {one('str', 1)}, n + 1) if n < {rng.choice(NUMBERS)} else x }}}}"
            "{% endmacro %}{{ g(a, 0) }}",
            lambda: "{% macro h(x) %}{{ caller() }}{% endmacro %}"
            f"{{% call h({one('any', 1)}) %}}{inner}{{% endcall %}}",
            lambda: f"{{% filter {rng.choice(('upper', 'escape', 'indent(9999)'))} %}}{inner}{{% endfilter %}}",
            lambda: "{% set " + rng.choice("ab") + " %}" + inner + "{% endset %}",
            lambda: "{% with a = " + one("str", 2) + ", b = a %}" + inner + "{% endwith %}",
        ))()  # fmt: skip

    def one(self, kind: str, depth: int) -> str:
        """An expression of that type, mostly."""
        rng = self.rng
        if kind == "any":
            kind = rng.choice(("str", "str", "int", "list", "bool"))
        forms = STRANGE if rng.random() < 0.006 else RULES[kind]
        if depth <= 0:
            forms = [form for form in forms if "<" not in form.replace("<n>", "")] or RULES["bool"][:2]
        form = rng.choice(forms)
        numbers = SMALL if rng.random() < 0.8 else NUMBERS  # or hardly anything would be seen before a limit is met
        fill = {"<n>": lambda: rng.choice(numbers)}
        fill |= {f"<{mark}>": lambda wanted=wanted: self.one(wanted, depth - 1) for mark, wanted in KINDS.items()}
        return re.sub("<[silban]>", lambda mark: fill[mark[0]](), form)


LONG: tuple[Callable[[Grammar, str], str], ...] = (
    lambda g, s: s * g.rng.choice((10, 300)),
    lambda g, s: "{{ " + "(" * 300 + "1" + ")" * 300 + " }}" + s,
    lambda g, s: "{{ " + "[" * 5000 + "]" * 5000 + " }}" + s,
    lambda g, s: "{{ " + "-" * 20_000 + "1 }}" + s,
    lambda g, s: "{{ " + "not " * 20_000 + "1 }}" + s,
    lambda g, s: "{{ " + "a." * 20_000 + "b }}" + s,
    lambda g, s: "{{ 1" + " + 1" * g.rng.choice((1000, 50_000)) + " }}" + s,
    lambda g, s: "{{ 'x'" + " ~ a" * g.rng.choice((1000, 50_000)) + " }}" + s,
    lambda g, s: "{{ a" + " | upper" * g.rng.choice((500, 20_000)) + " }}" + s,
    lambda g, s: "{% if a %}" * g.rng.choice((90, 2000)) + s,
    lambda g, s: "{% for a in [1] %}" * g.rng.choice((15, 25, 100)) + s + "{% endfor %}" * g.rng.choice((15, 25, 100)),
    lambda g, s: "{% set a = '" + "x" * 900_000 + "' %}" + s,
    lambda g, s: "{{ " + "9" * g.rng.choice((4000, 100_000)) + " }}" + s,
    lambda g, s: "".join(f"{{% set v{i} = a %}}" for i in range(20_000)) + s,
    lambda g, s: "{{ {" + ", ".join(f"{i}: a" for i in range(50_000)) + "} }}" + s,
    lambda g, s: "{{ range(99999) | " + " | ".join(["list"] * 300) + " }}" + s,
    lambda g, s: s[: len(s) // 2],
    lambda g, s: s + "{{" + "\x00\ud800\u2028" + "}}",
    lambda g, s: "{% macro f(x) %}{{ f(x) ~ f(x) }}{% endmacro %}{{ f(1) }}" + s,
    lambda g, s: "{% set a = 'x' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}" + s,
    lambda g, s: "{% set a = [1] %}" + "{% set a = [a, a, a, a] %}" * 30 + "{{ a }}" + s,
)


def render(item: int, note: Callable[[str], None]) -> str:
    """Compiles and renders one."""
    source = Grammar(random.Random(item)).program()
    note(source.encode(errors="replace").decode())
    begin = time.process_time()
    try:
        text = ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES)
    finally:
        if time.process_time() - begin > MAX_CPU_S:
            raise Fault(f"more than {MAX_CPU_S} s of CPU")
    if not isinstance(text, str):
        raise Fault(f"a {type(text).__name__} in place of text")
    return ""


def main() -> int:
    options = children.arguments("Random chat templates.", 5000).parse_args()
    outcomes = children.run(range(options.seed, options.seed + options.count), render, LIMITS)
    return children.report(outcomes, "tests/fuzz/templates.py", options)


if __name__ == "__main__":
    sys.exit(main())
