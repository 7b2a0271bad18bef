"""What a free-form answer says: its final text, box, option letter, number, place or code. None means: nothing found.

Every expression here is linear in the text and only the last `TAIL` characters of an answer are searched, so that no
answer can make reading it slow. What is said last counts, but what is declared ("the answer is ...", a \\boxed{})
counts more than what is mentioned.
"""

from __future__ import annotations

import math
import re

TAIL = 50_000  # characters
LETTERS = "ABCDEFGHIJ"

_THINK = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_ASCII = {0xFF01 + k: 0x21 + k for k in range(94)} | {0x2212: "-", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
_UNSEEN = [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0xAD]
_PLAIN = {**_ASCII, **dict.fromkeys(_UNSEEN)}  # full width as ASCII; marks of zero width and of text direction go


def final_text(text: str) -> str:
    """Everything after the last closing think tag, trimmed; nothing when a think tag is never closed."""
    start = 0
    for tag in _THINK.finditer(text):
        start = tag.end() if tag[1] else -1
    return text[start:].strip() if start >= 0 else ""


def boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, braces balanced; of nested boxes the outermost."""
    starts: list[int | None] = []
    found, text = None, text[-TAIL:]
    for mark in re.finditer(r"\\{1,4}f?box(?:ed)?\s?\{|\\.|[{}]", text):
        if mark[0] == "}":
            start = starts.pop() if starts else None
            found = text[start : mark.start()] if start is not None else found
        elif mark[0] == "{" or len(mark[0]) > 2:
            starts.append(mark.end() if mark[0] != "{" else None)
    return found


def stated(text: str) -> str:
    """What stands in the last box, or after the last "the answer is" or "answer:", else the last line."""
    inner = boxed(text)
    if inner is not None:
        return inner
    said = final_text(text)
    parts = re.split(r"(?i)\banswer(?:\s+is)?\s*:?\s*", said)
    lines = (parts[-1] if len(parts) > 1 else said).strip().splitlines()
    return (lines[0] if len(parts) > 1 and lines else lines[-1] if lines else "").strip().rstrip(".")


def code_block(text: str, languages: tuple[str, ...] = ("python", "py", "python3"), holding: str = "") -> str | None:
    """The last fenced block in one of `languages`, else the last without a language; one left open runs to the end.

    Blocks in which `holding` stands go before those in which it does not: an example after the program is no program.
    """
    text = final_text(text)[-4 * TAIL :]
    blocks: list[tuple[str, str]] = []
    fence, language, start = "", "", 0
    for mark in re.finditer(r"^ {0,3}(`{3,9}|~{3,9})[ \t]?([\w+#-]{0,20}).*$\n?", text, re.MULTILINE):
        if not fence:
            fence, language, start = mark[1], mark[2].lower(), mark.end()
        elif mark[1].startswith(fence) and not mark[2]:
            blocks.append((language, text[start : mark.start()]))
            fence = ""
    if fence:
        blocks.append((language, text[start:]))
    for accepted in (languages, ("",)):
        if own := [block for language, block in blocks if language in accepted]:
            return ([block for block in own if holding in block] or own)[-1]
    return None


def _plain(text: str) -> str:
    """The end of the final text with full-width forms as ASCII and nothing that cannot be seen."""
    text = final_text(text)[-TAIL:]
    return text if text.isascii() else text.translate(_PLAIN).strip()


# ------------------------------------------------------------------------------------------------ letters

_WRAP = r"(?:\\{1,2}(?:text|math|box|bf|rm)[a-z]{0,4}\s?\{|[\s*_`\"'(\[{$<「『【:=]|\\[(\[]){0,10}"
_AFTER = r"(?![A-Za-z0-9]|'[a-z]|[+#]|\s?[=^]|\s[<>])"
_CHOSEN = re.compile(
    r"(?i:\b(?:answer|option|choice)\b[\"'*_]{0,4}\s{0,3}(?:(?:is|was|be|would be|should be|must be|:|=|-+>)\s?){1,3}"
    r"(?:(?:the\s)?(?:letter|option|choice)\s?)?"
    r"|\b(?:choose|chose|select|pick|go with|opt for|settle on)\s(?:the\s)?(?:letter\s|option\s|choice\s|answer\s)?"
    r"|\b(?:so|thus|therefore|hence),?\s(?:it(?:'s|\sis|\smust\sbe)\s)?(?:(?:the\s)?(?:option|choice|answer)\s)?"
    r"|<answer>|####"
    r"|(?:答案|选项|正确选项|正确答案)(?:应该|应当|应)?[是为选:]{0,3}|故?(?:应|本题|因此)?选(?:择|项)?[是为:]?"
    r"|(?:정답|답)(?:은|:)?|答えは?)"
    rf"{_WRAP}([A-J]{_AFTER}|[a-j](?=[)\]}}*\"'`]|[.]?\s{{0,3}}(?:\n|$)))"
    rf"|(?<![A-Za-z0-9'])([A-J])[)\]}}*\"'.:]{{0,4}}\s(?i:is|would be|must be)\s(?i:(?:the|most|clearly)\s){{0,2}}"
    r"(?i:correct|right|true|best|answer|likely)\b"
)
_PROSE = re.compile(r"\s(?!(?:because|since|as|and|due|which|with|for|is|but|based|in)\b)[a-z']")
_EITHER = re.compile(r"[)\]*]{0,3}\s?(?:or|/|vs\.?)\s?[(\[*]{0,3}[A-J]\b")
_MARKED = re.compile(
    r"\*\*\(?([A-J])[).:]{0,2}(?:\*\*|\s)|\(([A-J])\)|\\(?:text|math|bf|rm)[a-z]{0,4}\s?\{\(?([A-J])\)?\}|\$([A-J])\$"
)
_ITEM = re.compile(r"(?:^|\n)[ \t>*-]{0,4}\(?([A-J])[.):](?=\s|\*|[^\x00-\x7f])")
_ALONE = re.compile(r"(?<![A-Za-z0-9'°\\_^.+*/=-])([B-HJ])(?![A-Za-z0-9'_^+#°]|\s?[=<>*/^]|-[A-Za-z])")
_NAMED = re.compile(
    r"(?i:\b(?:vitamin|point|points|vertex|angle|line|segment|figure|fig\.?|panel|type|class|group|grade|node|plan"
    r"|hepatitis|section|team|image|person|object|not|never|or|unlike|than|eliminate|reject|exclude|\d{1,9})\s|n't\s)$"
)
_SEVERAL = re.compile(r"\b[A-J]\)?\s(?:and|or|&)\s\(?[A-J]\b(?!')")
_ONLY = re.compile(r"(?:\W|_)*([A-Ja-j])(?:\W|_)*")


def option_letter(text: str) -> str | None:
    """The option chosen, A to J: 'B', '(b)', '**B**', '\\boxed{\\text{B}}', 'Answer: B', 'B is correct', '答案是B'.

    In this order: an answer or last line that is a letter; the last box; the last declared choice; the last marked
    letter; a letter that stands alone in prose, if all such letters agree. 'A' and 'I' as words are not letters.
    """
    text = _plain(text)
    if letter := _only_letter(text) or _only_letter(text[text.rfind("\n") + 1 :]):
        return letter
    box = boxed(text)
    if box is not None:
        inner = _unwrap(box)
        if letter := _only_letter(inner):
            return letter
        if start := re.match(r"\(?([A-J])[).:](?=\s|\S\S)", inner):
            return start[1]
        if re.fullmatch(r"[A-J](?:\s?(?:,|and|or|\\&|;)?\s?[A-J]){1,9}", inner):
            return None  # several letters chosen are none
    if chosen := [m for m in _CHOSEN.finditer(text) if not _is_word(m, text)]:
        return (chosen[-1][1] or chosen[-1][2]).upper()
    if letter := _only_letter(text.partition("\n")[0]):
        return letter
    items = {m[1] for m in _ITEM.finditer(text)}
    listed = items if len(items) > 1 else set()  # the options, repeated
    marked = [next(filter(None, m.groups())) for m in _MARKED.finditer(text)]
    if letters := [letter for letter in marked if letter not in listed] or (
        marked or sorted(items) if not listed else []
    ):
        return letters[-1]
    if _SEVERAL.search(text):
        return None
    alone = {m[1] for m in _ALONE.finditer(text) if not _NAMED.search(text[max(0, m.start() - 12) : m.start()])}
    return alone.pop() if len(alone) == 1 else None


def _is_word(match: re.Match[str], text: str) -> bool:
    """'The answer is A man' and 'the answer is I think' choose nothing, nor does 'choose A or B'."""
    place = match.end(1) if match[1] else match.end(2)
    prose = (match[1] or match[2]) in ("A", "I") and match[1] is not None and _PROSE.match(text, place) is not None
    return prose or _EITHER.match(text, place) is not None


def _only_letter(text: str) -> str | None:
    """'**(b)**' and '$\\text{B}$' -> 'B'; None for anything that holds another letter or digit."""
    if len(text) > 200:
        return None
    match = _ONLY.fullmatch(_unwrap(text))
    return match[1].upper() if match else None


def _unwrap(text: str) -> str:
    """Without LaTeX's text commands, dollars and outer braces."""
    for _ in range(5):
        before, text = text, text.strip(" \t\n$*{}")
        text = re.sub(r"^\\{1,2}(?:(?:text|math)[a-z]{0,4}|f?box(?:ed)?|bf|rm|\(|\[)\s?\{?", "", text)
        text = re.sub(r"\\[)\]]$", "", text)
        if text == before:
            break
    return text


# ------------------------------------------------------------------------------------------------ numbers

_SIGN = r"(?:(?<![\w.)\]}])[-+])?"
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"({_SIGN})(?:(?:(?<![A-Za-z_\d])(\d{{1,9}}))?\s?\\[dt]?frac\s?\{{?\s?({_DECIMAL})\s?\}}?"
    rf"\s?\{{?\s?({_DECIMAL})\s?\}}?"
    rf"|(?<![A-Za-z_\d])({_DECIMAL})(?:\s?/\s?({_DECIMAL}))?"
    r"(?:[eE]([-+]?\d{1,3})(?!\w)|\s?(?:\\times|\\cdot|[\u00d7\u00b7*x])\s?10\s?\^\s?\{?\s?([-+]?\d{1,3})\}?"
    r"|(?<=10)\^\{?([-+]?\d{1,3})\}?)?)"
)
_DECLARED = re.compile(
    r"(?i:\banswer\b[\"'*_]{0,4}\s?(?:(?:is|=|:|would be|should be)\s?){1,3}|<answer>|####|答案(?:是|为|:){1,2})"
    r"[^\w.+-]{0,12}(?:\\(?:text|math)[a-z]{0,4}\s?\{\s?)?(?=[-+.\d]|\\[dt]?frac)"
)


def last_number(text: str) -> float | None:
    """The number answered: in the last box, else declared ('the answer is 12 cm'), else the last in the text.

    '1,200', '3/4', '\\frac{3}{4}', '-0.5', '1.5e3' and '1.5 \\times 10^3' are numbers; units and '%' are left out.
    """
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d)", "", _plain(text))
    box = boxed(text)
    if box is not None and (inside := list(_NUMBER.finditer(box))):
        return _value(inside[-1])
    for declared in reversed(list(_DECLARED.finditer(text))):
        number = _NUMBER.match(text, declared.end())
        if number and not re.match(r"\s?(?:[-+*/=^\u00d7]|\\times|\\cdot)", text[number.end() : number.end() + 8]):
            return _value(number)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(match: re.Match[str]) -> float | None:
    """None for a division by zero and for what no float holds."""
    sign, whole, above, below, top, bottom, *powers = match.groups()
    parts = [float(v.replace(",", "")) if v and len(v) < 310 else None for v in (whole, above or top, below or bottom)]
    if parts[1] is None or parts[2] == 0:
        return None
    power = next((int(p) for p in powers if p), 0)
    value = parts[1] / (parts[2] or 1.0) + (parts[0] or 0.0)
    if powers[2]:  # 10^3
        value, power = value / 10.0, power
    try:
        value *= 10.0**power
    except OverflowError:
        return None
    return (-value if sign.startswith("-") else value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------ places

_COORDINATE = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?=px|(?!\w|\.\d))")
_GROUP = re.compile(r"[(\[<{]([^()\[\]<>{}]*)[)\]>}]")
_ATTRIBUTE = re.compile(r"(?<!\w)[xy]\d?[\"']?\s?[=:]\s?[\"']?([-+]?(?:\d+(?:\.\d*)?|\.\d+))")
_GAP = 40  # characters between the two corners of a box


def coordinates(text: str, count: int) -> tuple[float, ...] | None:
    """The last group of exactly `count` numbers in brackets, else the only `count` numbers there are.

    (x, y), [x, y], {"x": .., "y": ..}, {"point_2d": [..]}, <point x=".." y="..">; for 4 numbers also two points in a
    row, [[x, y], [x, y]] and {"x1": ..}. The numbers come back as written: whether they are pixels, thousandths or
    shares of the image is the caller's to know.
    """
    text = _plain(text)
    box = boxed(text)
    if box is not None and (inside := _last_place(box, count)):
        return inside
    return _last_place(text, count)


def _last_place(text: str, count: int) -> tuple[float, ...] | None:
    last, pair, pair_end = None, None, 0
    for group in _GROUP.finditer(text):
        numbers = _finite(group[1])
        if len(numbers) != count and len(named := _ATTRIBUTE.findall(group[1])) == count:
            numbers = tuple(map(float, named))
        if len(numbers) == count:
            last, pair = numbers, None
        elif count == 4 and len(numbers) == 2:
            gap = text[pair_end : group.start()]
            joined = pair is not None and len(gap) <= _GAP and not re.search(r"\d", gap)
            last, pair = (pair + numbers, None) if joined and pair else (last, numbers)
            pair_end = group.end()
        elif numbers:
            pair = None
    if last is not None:
        return last
    numbers = _finite(text)
    return numbers if len(numbers) == count else None


def _finite(text: str) -> tuple[float, ...]:
    """Numbers as written; one that no float holds makes the place unreadable."""
    values = tuple(float(m[0]) for m in _COORDINATE.finditer(text))
    return values if all(map(math.isfinite, values)) else ()
