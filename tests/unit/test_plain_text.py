"""The gate of texts for people: nothing in a name, a prompt or a library's error does harm in a message."""

from __future__ import annotations

import errno
import json
import logging
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_guidance.reports.plain_text import (
    LONGEST,
    MOST_LINES,
    clean_error,
    log,
    one_line,
    several_lines,
    short,
)

ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@given(ANY_TEXT, st.integers(1, 40))
def test_any_text_becomes_one_harmless_line(text: str, times: int) -> None:
    line = one_line(text * times)
    assert line.encode("utf-8").decode() == line
    assert len(line.splitlines()) <= 1 and len(line) <= LONGEST
    assert not {"<", ">"} & set(line) and "[[" not in line
    assert one_line(line) == line


@given(ANY_TEXT)
def test_texts_of_several_lines_are_harmless_too(text: str) -> None:
    shown = several_lines(text)
    assert shown.encode("utf-8").decode() == shown
    assert all(len(line) <= LONGEST for line in shown.split("\n"))


def test_ordinary_texts_stay_as_they_are() -> None:
    for text in (
        "The strength is 0.5. Use 1/2 or 1/4, and/or more (see README).",
        "Café 日本語 emoji 👩‍👩‍👧 'quoted' name/with/folders.safetensors",
        "Get it from https://example.org/models/x and put it into models/safety.",
    ):
        assert one_line(text) == text


def test_a_long_text_keeps_what_is_wrong_and_what_to_do() -> None:
    line = one_line(f"'{'word ' * 50_000}' is not a list. Write numbers with commas.")
    assert line.startswith("'word word") and line.endswith("is not a list. Write numbers with commas.")
    assert " wor …" not in line and "… ord" not in line
    assert len(one_line("x" * 10_000)) <= LONGEST
    assert len(short("y" * 10_000)) <= 80


def test_many_lines_are_counted() -> None:
    shown = several_lines("\n".join(str(i) for i in range(1000))).split("\n")
    assert len(shown) == MOST_LINES + 1 and shown[-1] == f"… and {1000 - MOST_LINES} more lines"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<img src=x onerror=alert(1)>", "‹img src=x onerror=alert(1)›"),
        ("[[click|https://example.org]]", "[ [click|https://example.org]]"),
        ("__LNK0__ ___LNK1__", "_LNK0__ _LNK1__"),
        ("[[[[a|b]]", "[ [ [ [a|b]]"),
        ("a\n[INFO] forged\r\n\u2028b", "a [INFO] forged b"),
        ("a\x1b[31mred\x00", "a�[31mred�"),
        ("left\u202eright", "left�right"),
        ("\ud800x\udfff", "�x�"),
        ("[Errno 13] Permission denied: '/home/john smith/models/x.onnx'", None),
        ("cannot open /home/john/ComfyUI/models/x.onnx, sorry", "cannot open x.onnx, sorry"),
        (r"cannot open C:\Users\John\models\x.onnx", "cannot open x.onnx"),
        (r"cannot open '\\server\share one\x.onnx'", "cannot open 'x.onnx'"),
    ],
)
def test_what_does_harm_is_replaced(text: str, expected: str | None) -> None:
    assert one_line(text) == (expected or "[Errno 13] Permission denied: 'x.onnx'")


class Special(RuntimeError):
    """An error with an attribute, as torch raises it."""

    code = 0


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a\ud800b"),
        FileNotFoundError(errno.ENOENT, "No such file", "/secret/place/\udcff.png"),
        KeyError("a\ud800\nb"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates\nnot allowed"),
        json.JSONDecodeError("bad\nvalue", "{", 1),
        Special("two\nlines"),
        TypeError("\ud800"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_every_kind_are_cleaned(error: Exception) -> None:
    cleaned = clean_error(raised(error, ValueError("cause\ud800")))
    shown = "".join(traceback.format_exception(cleaned))
    shown.encode("utf-8")
    assert "\n" not in str(cleaned) and "/secret" not in str(cleaned)
    assert isinstance(
        cleaned, OSError if isinstance(error, OSError) else (ValueError, RuntimeError, type(error))
    )
    assert cleaned.__traceback__ is not None and len(str(cleaned)) <= LONGEST


def test_a_harmless_error_stays_itself_with_its_cause() -> None:
    cause = ValueError("why")
    error = raised(Special("one line"), cause)
    assert clean_error(error) is error and error.__cause__ is cause
    changed = raised(Special("one\nline"))
    assert clean_error(changed) is changed and str(changed) == "one line"


def test_a_line_of_the_log_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log(logging.WARNING, "name\n[ERROR] forged \ud800")
    assert caplog.messages == ["Safe Guidance: name [ERROR] forged �"]
