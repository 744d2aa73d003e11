"""What the tests have the demo model paint: one prompt that shows the concept, and one that has nothing to do with it."""

STAR = "a yellow star in the center on a black plain background, flat style"
HEART = "a red heart on the left on a grey striped background, dotted style"
