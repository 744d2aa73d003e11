"""The page docs/reliability.md: figures of the fuzzers and the soak, in blocks that commands write."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def write_block(name: str, text: str, page: Path = PAGE) -> None:
    """Replace the block of a command in the page.

    Raises:
        ValueError: the page has no such block.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text(encoding="utf-8")
    before, found, rest = content.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page.name} has no block '{name}'. Add {start} and {end}.")
    page.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")
