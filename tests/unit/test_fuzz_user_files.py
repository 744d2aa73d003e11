"""Hostile files that users keep: each is read, or refused with one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_guidance.evaluation.fuzz import detector_files, user_files

SMALL = 60
"""Files of each kind. `dev.py fuzz` makes any number."""
KINDS = user_files.kinds()


@pytest.mark.parametrize("name", KINDS)
def test_hostile_files_are_read_or_refused_clearly(tmp_path: Path, name: str) -> None:
    answers: list[str] = []
    detector_files.run(
        KINDS[name],
        3,
        SMALL,
        lambda content: answers.append(detector_files.answer(KINDS[name], content, tmp_path)),
    )
    assert len(answers) >= SMALL
