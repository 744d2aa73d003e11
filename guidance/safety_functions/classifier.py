"""Safety function that scores images with an image classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .classifier_network import ConvClassifier
from .interface import Assessment, SafetyFunction


class ClassifierSafetyFunction(SafetyFunction):
    """Scores an image by a classifier's probabilities of unsafe classes.

    The classes are independent (sigmoid).

    The score is the sum of -log(1 - p) over the unsafe classes, where p is a class's probability. Unlike the
    gradient of p, its gradient does not vanish when the classifier is certain. The gate opens when a
    probability reaches the threshold.

    Args:
        classifier: images (B, 3, H, W) in [0, 1] to logits (B, classes) of each head.
        head: name of the head that has the unsafe classes.
        classes: names of the unsafe classes.
        threshold: probability from which a class opens the gate.

    Raises:
        ValueError: the classifier has no such head or class, or no class is given.
    """

    def __init__(
        self, classifier: ConvClassifier, head: str, classes: Sequence[str], threshold: float = 0.5
    ) -> None:
        known = classifier.heads.get(head)
        if known is None:
            raise ValueError(
                f"The classifier has no output '{head}'. Choose one of {', '.join(classifier.heads)}."
            )
        missing = [name for name in classes if name not in known]
        if missing or not classes:
            raise ValueError(
                f"The classifier's output '{head}' does not know '{', '.join(missing)}'. "
                f"Choose from {', '.join(known)}."
            )
        self.classifier, self.head = classifier, head
        self.classes, self.threshold = tuple(classes), threshold
        self.name = f"classifier: {', '.join(classes)}"
        self.networks = [classifier]
        self._columns = [known.index(name) for name in classes]

    def __call__(self, images: Tensor) -> Assessment:
        logits = self.classifier(images.clamp(0, 1))[self.head][:, self._columns].float()
        probabilities = logits.sigmoid()
        explanation = [dict(zip(self.classes, map(float, row))) for row in probabilities.detach()]
        return Assessment(F.softplus(logits).sum(1), (probabilities >= self.threshold).any(1), explanation)
