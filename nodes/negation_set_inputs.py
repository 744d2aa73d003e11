"""Category, search words and inputs that the nodes of negation sets share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "safe guidance/negation sets"

ALIASES = ["negative image", "avoid style", "unwanted images", "nsfw", "reference set", "concept erasing"]


def drop_duplicates_input() -> io.Input:
    """Return the input that keeps every image once."""
    return io.Boolean.Input(
        "drop_duplicates",
        default=True,
        tooltip="Remove exact copies of an image, which would count twice. Start with on.",
    )
