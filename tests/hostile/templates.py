"""Chat templates: code inside of braces, loops without end, memory without end."""

from step3vl.data.template import ChatTemplate

GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def of(text):
    def case(folder):
        (folder / "t.jinja").write_text(text)
        return lambda: ChatTemplate(str(folder / "t.jinja"))

    return case


CASES = {
    "subclasses": of(GOOD + "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "globals of cycler": of(GOOD + "{{ cycler.__init__.__globals__.os.popen('touch ../../owned').read() }}"),
    "globals of lipsum": of(GOOD + "{{ lipsum.__globals__['os'].system('touch ../../owned') }}"),
    "attr filter": of(GOOD + "{{ ''|attr('__class__') }}"),
    "format string": of(GOOD + "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    "format map": of(GOOD + "{{ '{a.__class__}'.format_map({'a': 1}) }}"),
    "raise_exception's globals": of(GOOD + "{{ raise_exception.__globals__ }}"),
    "a message that is changed": of("{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}"),
    "an include": of(GOOD + "{% include '/etc/passwd' %}"),
    "an import": of("{% import 'os' as os %}" + GOOD),
    "a range of 10**9": of(GOOD + "{% for i in range(10**9) %}x{% endfor %}"),
    "loops in loops": of(GOOD + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "text of 10**10": of(GOOD + "{{ 'a' * 10**10 }}"),
    "a power of powers": of(GOOD + "{{ 9**9**9**9 }}"),
    "a macro that calls itself": of("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}" + GOOD),
    "padding of 10**10": of(GOOD + "{{ '%10000000000d' % 1 }}"),
    "centre of 10**10": of(GOOD + "{{ 'a'.center(10**10) }}"),
    "lipsum of 10**6": of(GOOD + "{{ lipsum(n=100000) }}"),
    "syntax": of("{% for %}"),
    "contents in reverse": of("{% for m in messages|reverse %}{{ m.content }}{% endfor %}"),
    "contents twice": of(GOOD + GOOD),
    "contents in upper case": of("{% for m in messages %}{{ m.content|upper }}{% endfor %}"),
    "nothing": of(""),
    "a megabyte": of(GOOD + "x" * 10**6),
    "no text": of("\ufeff" + GOOD),
}
