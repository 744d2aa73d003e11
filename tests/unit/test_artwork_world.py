"""The artwork world: subjects, scenes and captions; captions and scenes depend on their seeds only."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest

from safe_guidance.demo import artwork_world as world
from safe_guidance.demo.artwork_subjects import CONCEPTS, PHOTOGRAPHS, STYLES, SUBJECTS, WEAPONS

CONCEPT_WORDS = [word for subject in SUBJECTS if subject.category in CONCEPTS for word in subject.words]


def test_the_world_has_between_60_and_150_subjects_with_words_and_code_points_of_their_own() -> None:
    assert 60 <= len(SUBJECTS) <= 150
    words = [word for subject in SUBJECTS for word in subject.words]
    assert len(set(words)) == len(words)
    codes = [subject.code for subject in SUBJECTS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("name", "unicode_name"),
    [("dagger", "DAGGER KNIFE"), ("kitchen knife", "HOCHO"), ("bomb", "BOMB"), ("cat", "CAT FACE")],
)
def test_code_points_are_those_of_the_unicode_names(name: str, unicode_name: str) -> None:
    code = next(subject.code for subject in SUBJECTS if subject.name == name)
    assert unicodedata.name(chr(int(code, 16))) == unicode_name


def test_every_code_point_is_an_assigned_symbol() -> None:
    assert all(unicodedata.category(chr(int(subject.code, 16))) == "So" for subject in SUBJECTS)


def test_the_unwanted_concepts_are_weapons_skulls_and_smoking() -> None:
    assert len(world.subjects_of(WEAPONS)) >= 5
    assert all(world.subjects_of(concept) for concept in CONCEPTS)
    assert not set(world.HARMLESS) & {name for concept in CONCEPTS for name in world.subjects_of(concept)}


def test_a_seed_gives_the_same_scenes_and_captions() -> None:
    first, second = (world.sample_scenes(50, seed=3) for _ in range(2))
    assert first == second
    captions = [
        [world.describe(scene, rng) for scene in first] for rng in (random.Random(4), random.Random(4))
    ]
    assert captions[0] == captions[1]
    assert first != world.sample_scenes(50, seed=4)


def test_a_pinned_caption_does_not_change() -> None:
    rng = random.Random(11)
    scene = world.sample_scene(
        rng, ["dagger", "red apple"], style="noto", ground=world.sample_ground(rng, "photograph", "wood")
    )
    words = {"dagger": "dagger", "red apple": "apple"}
    caption = world.describe(scene, random.Random(0), complete=True, words=words)
    assert re.fullmatch(
        r"(a dagger (left of|above) an apple|an apple in front of a dagger) "
        r"(on a wooden table|on wood), (noto style|by noto)",
        caption,
    )


def test_no_two_uses_share_a_seed() -> None:
    assert len(set(world.SEEDS.values())) == len(world.SEEDS)


def test_a_complete_caption_names_every_subject_the_ground_and_the_style() -> None:
    rng = random.Random(5)
    for scene in world.sample_scenes(200, seed=6, implying_share=0.0):
        caption = world.describe(scene, rng, complete=True)
        for name in scene.subjects:
            assert any(word in caption for word in world.SUBJECT[name].words), (caption, name)
        grounds = PHOTOGRAPHS.get(scene.ground.name, (scene.ground.name,))
        assert any(phrase in caption for phrase in grounds), caption
        assert any(phrase in caption for phrase in STYLES[scene.style]), caption


def test_relations_hold_in_the_scene() -> None:
    seen = set()
    for scene in world.sample_scenes(300, seed=7, implying_share=0.0):
        if scene.relation is None:
            continue
        first, second = scene.placed
        seen.add(scene.relation)
        if scene.relation == "left of":
            assert second.x - first.x > 0.3
        elif scene.relation == "above":
            assert second.y - first.y > 0.3
        else:
            # The caption names the front subject first; it is drawn last.
            caption = world.describe(scene, random.Random(0), complete=True)
            front = min(caption.find(word) for word in world.SUBJECT[second.subject].words if word in caption)
            behind = max(caption.find(word) for word in world.SUBJECT[first.subject].words)
            assert front < behind
    assert seen == set(world.RELATIONS)


def test_implying_phrases_name_nothing_that_the_scene_shows() -> None:
    for implied in world.IMPLIED:
        names = {name for names in implied.subjects for name in names}
        for phrase in implied.phrases:
            shown = [word for name in names for word in world.SUBJECT[name].words]
            assert not [word for word in (*shown, *CONCEPT_WORDS) if re.search(rf"\b{word}\b", phrase)]


def test_every_concept_is_implied_and_so_are_harmless_scenes() -> None:
    rng = random.Random(8)
    concepts = [frozenset(world.sample_implied(rng, implied).concepts) for implied in world.IMPLIED]
    assert {frozenset({concept}) for concept in CONCEPTS} | {frozenset()} == set(concepts)


def test_scenes_have_one_to_three_different_subjects_inside_the_image() -> None:
    counts = set()
    for scene in world.sample_scenes(400, seed=9):
        counts.add(len(scene.placed))
        assert len(scene.subjects) == len(scene.placed)
        for placed in scene.placed:
            # Half a subject is at most cut off by the image's edge through its rotation.
            assert placed.size / 2 - 0.02 <= placed.x <= 1 - placed.size / 2 + 0.02
            assert placed.size / 2 - 0.02 <= placed.y <= 1 - placed.size / 2 + 0.02
    assert counts == {1, 2, 3}
