"""A multilayer perceptron on flattened inputs."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole


class MLP(nn.Module):
    """Multilayer perceptron on flattened inputs.

    Flatten, then [linear → ReLU (→ dropout)] for each width, then a linear layer to the logits.

    Shapes: (N, in_channels, image_size, image_size), or with ``in_features`` (N, in_features)
    → (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels.
        in_features: length of a flat input; replaces ``in_channels`` and ``image_size``.
        widths: units of each hidden layer; none gives a linear classifier.
        dropout: share of hidden units dropped in training, 0 ≤ dropout < 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        in_features: int | None = None,
        widths: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole("mlp", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        if in_features is None:
            in_features = in_channels * image_size * image_size
        whole("mlp", in_features=in_features, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        if not 0 <= dropout < 1:
            raise InvalidValue(f"mlp: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")
        self.in_features = in_features
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_features
        for width in widths:
            layers += [nn.Linear(size, width), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            size = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(size, num_classes)

    def forward(self, inputs: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, …) with ``in_features`` numbers each → logits (N, num_classes)."""
        if inputs.ndim < 2 or inputs[0].numel() != self.in_features:
            raise InvalidValue(
                f"mlp: an input of shape {tuple(inputs.shape)}; {self.in_features} numbers for each sample are expected"
            )
        return self.head(self.layers(inputs))
