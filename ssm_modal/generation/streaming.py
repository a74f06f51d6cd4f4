"""Classification of a stream: chunk by chunk, with the state between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_modal.errors import StateError
from ssm_modal.models.classifier import ClassifierState, SequenceClassifier


class StreamingClassifier:
    """What a causal classifier makes of everything heard so far, after each chunk, whatever its size.

        stream = StreamingClassifier(model)
        for chunk in chunks:                    # (rows, n) each, as the model's input takes it
            probabilities = stream.feed(chunk)  # (rows, n_classes)

    After the last chunk the probabilities are those of the whole at once, to rounding. No gradients.

    Raises StateError for a model that needs the whole sequence. rows: streams side by side, in step.
    """

    def __init__(self, model: SequenceClassifier, rows: int = 1) -> None:
        if not model.backbone.has_state:
            raise StateError(
                "the model has a layer that needs the whole sequence, expected a causal classifier such as "
                "audio_classifier_causal"
            )
        self.model, self.rows = model.eval(), rows
        self.state: ClassifierState = model.init_state(rows)

    def feed(self, chunk: Tensor) -> Tensor:
        """Take in `chunk`, (rows, n) with n from 0; returns the probabilities (rows, n_classes) fp32 (fp64
        for an fp64 model) so far. Raises as the model's forward."""
        with torch.inference_mode():
            logits, state = self.model(chunk, self.state)
        assert state is not None  # the model has one
        self.state = state
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)

    def reset(self) -> None:
        """Forget everything heard."""
        self.state = self.model.init_state(self.rows)
