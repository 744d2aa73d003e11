"""An image classifier as a safety function."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .classifier_network import ConvClassifier
from .interface import Assessment, SafetyFunction


class ClassifierSafetyFunction(SafetyFunction):
    """Unsafe are some classes of one output of a classifier with independent (sigmoid) classes.

    The score is -log(1 - p) summed over the classes, p the class's probability: unlike p itself its gradient does not vanish
    when the classifier is sure. The gate opens when a probability reaches the threshold.
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
                f"The classifier's output '{head}' does not know '{', '.join(missing)}'. Choose from {', '.join(known)}."
            )
        self.classifier, self.head, self.classes, self.threshold = classifier, head, tuple(classes), threshold
        self.name = f"classifier: {', '.join(classes)}"
        self.networks = [classifier]
        self._columns = [known.index(name) for name in classes]

    def __call__(self, images: Tensor) -> Assessment:
        logits = self.classifier(images.clamp(0, 1))[self.head][:, self._columns].float()
        probabilities = logits.sigmoid()
        explanation = [dict(zip(self.classes, map(float, row))) for row in probabilities.detach()]
        return Assessment(F.softplus(logits).sum(1), (probabilities >= self.threshold).any(1), explanation)
