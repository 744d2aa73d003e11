"""The one gate of every text for people: errors, node messages and lines of the host's log.

Names, prompts and files may hold anything: halves of surrogate pairs, which no log can write and which end
the host's prompt worker, line breaks that forge log lines, HTML or `[[text|link]]`, which web interfaces act
on, and megabytes. Messages of libraries hold absolute paths of the computer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

LONGEST = 500
"""Most characters of an error, a line of the log and a line of a node message."""
MOST_LINES = 60
"""Most lines of a node message."""
LONGEST_VALUE = 80
"""Most characters of a value that a message repeats."""
JOINERS = "\u200c\u200d"
"""Invisible characters that words and emojis need."""
LOOK_ALIKES = str.maketrans({"<": "\u2039", ">": "\u203a"})
"""Replacements for the brackets of HTML that read the same, also where a text is not taken as HTML."""
ABSOLUTE_PATH = re.compile(
    r"""(['"])(?:/|[A-Za-z]:[\\/]|\\\\)[^'"]*[\\/]([^'"\\/]*)\1  # in quotation marks, spaces included
    |(?<![\w.:/\\…])(?:/|[A-Za-z]:[\\/]|\\\\)(?:[^\s'"<>|]*[\\/])([^\s'"<>|\\/]*)""",
    re.VERBOSE,
)
SURROGATE = re.compile("[\ud800-\udfff]")
MARKUP = re.compile(r"\[(?=\[)|_{2,}(?=LNK)")
"""Beginnings of what the interface makes a link of: `[[text|link]]`, and its own placeholder."""
UNKNOWN = "\ufffd"


def is_encodable(text: str) -> bool:
    """Return True if a text has no half of a surrogate pair, so that files and logs can hold it."""
    return SURROGATE.search(text) is None


def one_line(text: str, longest: int = LONGEST) -> str:
    """Return a text as one harmless line of at most `longest` characters.

    Long texts keep their beginning and their end, which say what is wrong and what to do; they are cut
    between words. Absolute paths keep their last part.
    """
    # A text of megabytes is cut before it is searched. Its ends cannot be longer than the result.
    head, tail = (text, "") if len(text) <= 8 * longest else (text[: 4 * longest], text[-4 * longest :])
    line = " ".join(f"{head} {tail}".translate(LOOK_ALIKES).split())
    line = "".join(
        character if character.isprintable() or character in JOINERS else UNKNOWN for character in line
    )
    line = ABSOLUTE_PATH.sub(_last_part, line)
    line = MARKUP.sub(lambda found: "[ " if found.group() == "[" else "_", line)
    return _cut(line, longest)


def several_lines(text: str) -> str:
    """Return a text of several lines with each of them harmless; at most MOST_LINES of them."""
    lines = text.split("\n")
    kept = [one_line(line) if line.strip() else "" for line in lines[:MOST_LINES]]
    left = len(lines) - len(kept)
    return "\n".join([*kept, *([f"… and {left} more lines"] if left else [])])


def short(value: object) -> str:
    """Return a value, such as an input, as a message repeats it: in one line, and not longer than needed."""
    return one_line(str(value), LONGEST_VALUE)


def log(level: int, text: str) -> None:
    """Write one line to the host's log, with the pack's name in front."""
    logging.log(level, "Safe Guidance: %s", one_line(text))


def _last_part(found: re.Match[str]) -> str:
    quotation_mark = found.group(1) or ""
    return f"{quotation_mark}{found.group(2) or found.group(3) or '…'}{quotation_mark}"


def _cut(line: str, longest: int) -> str:
    """Cut the middle of a line out, between words where there are any."""
    if len(line) <= longest:
        return line
    half = (longest - 3) // 2
    head, tail = line[:half], line[-half:]
    space = head.rfind(" ", half // 2)
    head = head[:space] if space > 0 else head
    space = tail.find(" ", 0, half // 2)
    tail = tail[space + 1 :] if space >= 0 else tail
    return f"{head} … {tail}"


def clean_error(error: Exception) -> Exception:
    """Return an error whose message, and whose chain of causes, is harmless: itself if possible.

    A changed message stays in the same object, so that its type and the attributes of libraries stay, or
    comes as an error of the same type. A chain with a message that no log can write is cut off.
    """
    text = one_line(str(error))
    cleaned = error if str(error) == text else _with_message(error, text)
    if cleaned is not error:
        cleaned.__traceback__, cleaned.__cause__ = error.__traceback__, error.__cause__
        cleaned.__context__, cleaned.__suppress_context__ = error.__context__, error.__suppress_context__
    if hasattr(cleaned, "__notes__"):
        cleaned.__notes__ = [one_line(str(note)) for note in cleaned.__notes__]
    if any(_is_harmful(cause) for cause in _causes(error)):
        cleaned.__cause__ = cleaned.__context__ = None
    return cleaned


def _with_message(error: Exception, text: str) -> Exception:
    """Return an error with another message: the same object, or another of its type or a general one."""
    try:
        error.args = (text,)
        if str(error) == text:
            return error
    except Exception:
        pass
    general = ValueError if isinstance(error, ValueError) else RuntimeError
    makers: tuple[Callable[[str], Exception], ...] = (type(error), general)
    for make in makers:
        try:
            made = make(text)
            if str(made) == text:
                return made
        except Exception:
            continue
    return RuntimeError(text)


def _causes(error: BaseException) -> list[BaseException]:
    """Return the errors that a traceback of this error shows before it."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(found) < 32:
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        if current is not None:
            found.append(current)
    return found


def _is_harmful(error: BaseException) -> bool:
    text = str(error)
    return not is_encodable(text) or "\n" in text or "\r" in text or len(text) > 4 * LONGEST
