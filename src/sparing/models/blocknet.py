"""The small convolutional networks that condensed images are made with, and judged by."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import Norm, norm_of, whole


class _Embedding(nn.Module):
    """``features``, flattened, then ``classifier``."""

    features: nn.Sequential
    classifier: nn.Module

    def __init__(self, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size

    def embed(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n features"]:
        """(N, in_channels, image_size, image_size) → what the classifier sees, channel by channel, (N, features)."""
        if tuple(images.shape[1:]) != (self.in_channels, self.image_size, self.image_size):
            raise InvalidValue(
                f"{type(self).__name__}: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, "
                f"{self.image_size}, {self.image_size}) is expected"
            )
        return self.features(images).flatten(1)

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, in_channels, image_size, image_size) → logits (N, num_classes)."""
        return self.classifier(self.embed(images))


def _first_padding(in_channels: int) -> int:
    """Zeros around an image for a 3×3 convolution: as many for grey ones as make 28 pixels 32."""
    return 3 if in_channels == 1 else 1


def _convolved(model: str, convolution: nn.Conv2d, norm: str) -> list[nn.Module]:
    """Convolution, norm if there is one, and ReLU."""
    layer = norm_of(model, norm, convolution.out_channels)
    return [convolution, *(() if isinstance(layer, nn.Identity) else (layer,)), nn.ReLU()]


class BlockNet(_Embedding):
    """Convolutional network of equal blocks, which gradients are matched on (Zhao et al. 2021, arXiv:2006.05929).

    A block is 3×3 convolution → norm → ReLU → 2×2 average pooling; all positions of the last enter the head. The
    papers on condensation call it ConvNet, or ConvNetD3 for three blocks.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels.
        width: channels of each block.
        depth: number of blocks.
        norm: "instance" (each channel of each image for itself, with learned scale and shift), "batch" or "none".
        hidden: units of a layer between features and logits, with ReLU; None: the head is one linear layer.
        first_padding: zeros around the image; None: 3 for one channel, which makes 28 pixels 32, otherwise 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "instance",
        hidden: int | None = None,
        first_padding: int | None = None,
    ) -> None:
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
        whole("blocknet", **sizes, width=width, depth=depth)
        if first_padding is None:
            first_padding = _first_padding(in_channels)
        whole("blocknet", at_least=0, first_padding=first_padding)
        super().__init__(in_channels, image_size)
        layers: list[nn.Module] = []
        channels, size = in_channels, image_size
        for block in range(depth):
            padding = first_padding if block == 0 else 1
            size = (size + 2 * padding - 2) // 2
            if size < 1:
                raise InvalidValue(
                    f"blocknet: {depth} blocks halve an image of {image_size} pixels to nothing; give a smaller depth, "
                    f"at most {block}, or larger images"
                )
            layers += _convolved("blocknet", nn.Conv2d(channels, width, 3, padding=padding), norm)
            layers.append(nn.AvgPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier: nn.Module = nn.Linear(width * size * size, num_classes)
        if hidden is not None:
            whole("blocknet", hidden=hidden)
            self.classifier = nn.Sequential(
                nn.Linear(width * size * size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
            )


class AlexNet(_Embedding):
    """AlexNet for small images: two 5×5 convolutions with local response norm, three linear layers.

    Convolution (64) → ReLU → max pooling → norm → convolution (64) → ReLU → norm → max pooling, then linear layers of
    384 and 192 units and the logits, as in the study of backdoors in distilled data (Liu et al. 2023,
    arXiv:2301.01197); after Krizhevsky et al. 2012. Pooling is 3×3 with stride 2.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels; 32 gives the classifier 4096 inputs.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> None:
        whole("alexnet", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        super().__init__(in_channels, image_size)

        def norm() -> nn.Module:
            return nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1.0)

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, padding=1)

        size = ((image_size + 1) // 2 + 1) // 2
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, 64, 5, padding=2), nn.ReLU(), pool(), norm()),
            *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), norm(), pool()),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(64 * size * size, 384), nn.ReLU()),
            *(nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, num_classes)),
        )


class LeNet(_Embedding):
    """LeNet-5 with ReLU and max pooling: two 5×5 convolutions, three linear layers (LeCun et al. 1998).

    Convolution (6) → norm → ReLU → max pooling → convolution (16) → norm → ReLU → max pooling, then linear layers of
    120 and 84 units and the logits, as condensed images are judged by in Zhao et al. 2021, arXiv:2006.05929. Pooling is
    2×2.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image; a grey one gets two pixels of zeros around it, which makes 28 pixels 32.
        num_classes: number of logits.
        image_size: height and width in pixels; at least 12 for grey images, otherwise 16.
        norm: "none", "instance" (each channel of each image for itself, with learned scale and shift) or "batch".
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, norm: Norm = "none") -> None:
        whole("lenet", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        super().__init__(in_channels, image_size)
        padding = 2 if in_channels == 1 else 0
        size = ((image_size + 2 * padding - 4) // 2 - 4) // 2
        if size < 1:
            raise InvalidValue(
                f"lenet: image_size = {image_size}; convolutions and poolings need at least {16 - 2 * padding} pixels"
            )
        self.features = nn.Sequential(
            *(*_convolved("lenet", nn.Conv2d(in_channels, 6, 5, padding=padding), norm), nn.MaxPool2d(2)),
            *(*_convolved("lenet", nn.Conv2d(6, 16, 5), norm), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(16 * size * size, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)),
        )


class VGG11(_Embedding):
    """VGG-11 for small images: eight 3×3 convolutions, five times max pooling, one linear layer.

    Configuration A of Simonyan and Zisserman 2015, arXiv:1409.1556, with one linear layer in place of three, as
    condensed images are judged by in Zhao et al. 2021, arXiv:2006.05929. Each convolution is followed by a norm, if
    there is one, and ReLU.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image; a grey one gets three pixels of zeros around it, which makes 28 pixels 32.
        num_classes: number of logits.
        image_size: height and width in pixels; at least 28 for grey images, otherwise 32.
        width: channels of the first stage; those after it have 2, 4, 8 and 8 times as many.
        norm: "instance" (each channel of each image for itself, with learned scale and shift), "batch" or "none".
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        width: int = 64,
        norm: Norm = "instance",
    ) -> None:
        whole("vgg11", in_channels=in_channels, num_classes=num_classes, image_size=image_size, width=width)
        super().__init__(in_channels, image_size)
        padding = _first_padding(in_channels)
        size = (image_size + 2 * padding - 2) >> 5
        if size < 1:
            raise InvalidValue(
                f"vgg11: image_size = {image_size}; five times halved needs at least {34 - 2 * padding} pixels"
            )
        layers: list[nn.Module] = []
        channels = in_channels
        for convolutions in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
            for times in convolutions:
                convolution = nn.Conv2d(channels, width * times, 3, padding=1 if layers else padding)
                layers += _convolved("vgg11", convolution, norm)
                channels = width * times
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * size * size, num_classes)


class SixLayerCNN(_Embedding):
    """Six-layer network of FedKNOW: three pairs of 3×3 convolutions, max pooling after each, two linear layers.

    The network for CIFAR-100 of Luopan et al. 2023, arXiv:2212.01738: each convolution is followed by ReLU, each pool
    and the hidden linear layer by dropout.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels, at least 8.
        width: channels of the first pair; the others have 2 and 4 times as many.
        hidden: units of the hidden linear layer.
        dropout: share of channels' values dropped after each pool in training; of hidden units twice as many.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 100,
        image_size: int = 32,
        width: int = 32,
        hidden: int = 1024,
        dropout: float = 0.25,
    ) -> None:
        whole("cnn6", in_channels=in_channels, num_classes=num_classes, width=width, hidden=hidden)
        whole("cnn6", 8, image_size=image_size)
        if not 0 <= dropout < 0.5:
            raise InvalidValue(f"cnn6: dropout = {dropout!r}; 0 ≤ dropout < 0.5 is expected")
        super().__init__(in_channels, image_size)
        layers: list[nn.Module] = []
        channels = in_channels
        for wide in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
                channels = wide
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * (image_size // 8) ** 2, hidden), nn.ReLU(), nn.Dropout(2 * dropout)),
            nn.Linear(hidden, num_classes),
        )
