"""Bombs: chat templates that eat time or memory, reach out of their sandbox, or are simply broken."""
import json
import random
from pathlib import Path

from mutations import Case

BOMBS = [
    "{% for a in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}1+2?",
    "{{ 'x' * 10**9 }}", "{{ 'x' * 10**12 }}", "{{ [0] * 10**10 }}", "{{ ('x' * 10**8) | length }}",
    "{{ lipsum(n=10**6) }}", "{{ ('www.a.com ' * 10**6) | urlize }}", "{{ [1] | tojson(indent=10**8) }}",
    "{{ [1] | tojson(indent=10**12) }}", "{{ 9**9**9 }}", "{{ 2**(10**9) }}", "{{ (2**(10**7)) | string | length }}",
    "{{ 10**5000 }}", "{{ 1e308 * 10 }}", "{{ 'x' | center(10**9) }}", "{{ 'x' | indent(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}", "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.zfill(10**9) }}", "{{ 'a\\t'.expandtabs(10**9) }}", "{{ range(10**5) | list }}",
    "{{ range(10**9) | list | length }}", "{{ 'a' | replace('a', 'a' * 10**8) }}", "{{ 1 | round(10**9) }}",
    "{{ [1, 2] | batch(10**9, 'x') | list }}", "{{ [0] | slice(10**9) | list }}",
    "{{ ('a b ' * 10**6) | wordwrap(1) }}", "{{ 'x' | wordwrap(0) }}",
    "{{ joiner('x' * 10**9)() }}{{ joiner('x')() }}", "{{ 'a'.encode('idna') }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% macro m(a) %}{{ m(a + a) }}{% endmacro %}{{ m('aa') }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ strftime_now('%Y' * 10**6) }}",
    "{{ strftime_now('%' * 10**7) }}", "{{ strftime_now('%\ud800') }}", "{{ strftime_now(7) }}",
    "{{ strftime_now('%-j%Q%9999999999d') }}", "{{ raise_exception('x' * 10**8) }}",
    "{{ raise_exception(messages) }}", "{{ raise_exception('a\\nb\\n\\x1b[31mc') }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}", "{% extends 'x' %}", "{{ ''.__class__ }}", "{{ messages[0].__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}", "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__.__globals__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}",
    "{% set messages = 7 %}{{ messages }}", "{% set messages[0].content = 'x' %}", "{% do messages.clear() %}",
    "{{ ''.join }}", "{{ '{0.__class__}'.format(1) }}", "{{ '%s' | format(messages) }}",
    "{{ messages | attr('__class__') }}", "{{ x.y.z }}", "{{ messages[99].content }}",
    "{{ messages[0]['content'] + 7 }}", "{{ 1 / 0 }}", "{{ messages | sort }}", "{{ messages | sum }}",
    "{{ messages | min }}", "{{ '\\ud800' }}", "{{ '\\udcff1+2?' }}", "\ud8001+2?", "{{ '\\x00' }}", "\x00", "", " ",
    "\n", "{{ '' }}", "{{ none }}", "{{ 'a' * -1 }}", "{{", "{%", "{#", "}}", "{% if %}", "{% endif %}", "{% for %}",
    "{% break %}", "{% continue %}", "{% generation %}", "{% generation %}1+2?{% endgeneration %}", "{% raw %}",
    "{{ 1 2 }}", "{% while 1 %}{% endwhile %}", "{{ ''.join(messages) }}", "{{ '<|end|>' * 30 }}",
    "{{ '<|user|>' * 10**6 }}", "{{ '1' * 63 }}", "{{ '1' * 10**6 }}", "{{ '\\u0301' * 10**6 }}", "{{ '1+2?' }}",
    "{{ messages[0].content }}", "(" * 10**5, "{{ " + "(" * 10**4 + "1" + ")" * 10**4 + " }}",
    "{{ " + "[" * 150 + "]" * 150 + " }}", "{% if 1 %}" * 5000, "{% if 1 %}" * 90 + "1" + "{% endif %}" * 90,
    "{% for i in range(2) %}" * 40 + "x" + "{% endfor %}" * 40, "{{ 1 }}" * 10**5, "1" * 10**7,
    "{{ '" + "a" * 10**7 + "' }}", "{{ 1" + " + 1" * 10**5 + " }}", "{{ not " * 10**4, "{{ a" + ".b" * 10**4 + " }}",
    "{{ a" + "|upper" * 10**4 + " }}", "{% set x %}" * 2000 + "1" + "{% endset %}" * 2000, "{{ (1).__pow__(2) }}",
    "{{ [1,2,3] | random }}", "{{ now() }}", "{{ range(0, 10**18, 10**12) | list | length }}",
    "{{ dict(a=1) | xmlattr }}", "{{ {1: 2, 'a': 3} | dictsort }}", "{{ messages | tojson | length }}",
    "{{ [1] | tojson(separators=7) }}", "{{ messages | tojson(sort_keys=1, indent='x') }}",
    "{{ ('a' * 25000 + '!') | striptags }}", "{{ ('<' * 10**6) | striptags }}", "{{ ('a@' * 10**5) | urlize }}",
    "{{ ('(' * 10**5) | urlize }}", "{{ 'x' | truncate(-1) }}", "{{ 'x' | filesizeformat }}",
    "{{ 'inf' | float | int }}", "{{ ('9' * 10**6) | int }}", "{{ ('9' * 4000) | int * ('9' * 4000) | int }}",
    "{{ 'nan' | float }}", "{{ loop }}"]
PIECES = [
    "{{", "}}", "{%", "%}", "{% if messages %}", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "-", "|",
    "(", ")", "[", "]", "'", '"', "messages", "loop", "namespace", "none", "is defined", "not", "0", "10**9", "*",
    "**", "~", "{% set x = 1 %}", "{% macro f() %}", "{% endmacro %}", "f()", "raise_exception('x')", "tojson", "\\",
    "\n", "{#", "#}"]


def mutant(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 5))):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 3, 30)))
        piece = rng.choice(PIECES)
        text = rng.choice((text[:a] + text[b:], text[:a] + piece + text[a:], text[:b] + text[a:b] + text[b:],
                           text[:a] + piece + text[b:])) or "x"
    return text


def template(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    if index < len(BOMBS):
        text = random.Random(seed).sample(BOMBS, len(BOMBS))[index]
        if rng.random() < 0.3:      # harmless for one prompt, and not for another
            text = "{% if '??' in messages[0].content %}" + text + "{% else %}1{% endif %}"
    else:
        real = sorted((Path(__file__).parents[1] / "data/chat_templates").glob("*.jinja"))
        text = rng.choice(BOMBS) if rng.random() < 0.2 else rng.choice(real).read_text()
        text = mutant(text, rng) if len(text) < 10**5 else text
    side, how, flags = rng.choice(("student", "student", "teacher")), rng.choice(("file", "config", "flag")), {}
    if how == "config":
        path = place / side / "tokenizer_config.json"
        found = text if rng.random() < 0.8 else [{"name": "default", "template": text}]
        path.write_text(json.dumps({"chat_template": found}))
    else:
        path = place / side / "chat_template.jinja" if how == "file" else place / "mine.jinja"
        path.write_bytes(text.encode(errors="surrogatepass"))
        flags = {"chat_template": path} if how == "flag" else {}
    if rng.random() < 0.2:
        flags["template_vars"] = rng.choice((
            "enable_thinking=false", "tools=[1]", "tools=" + "[" * 5000, "x=NaN", "x=1e400", "x=\udc80",
            f"x={'y' * 5000}", "bos_token=7", "range=1", "loop=2", "self=3"))
    return Case(f"{how}, {side}: {ascii(text)[:150]} {flags.get('template_vars', '')[:30]}", flags)
