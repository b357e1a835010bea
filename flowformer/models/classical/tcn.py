"""Causal convolutions trained without labels, and a support vector classifier on what they compute.

Source: Franceschi, Dieuleveut and Jaggi, Unsupervised Scalable Representation Learning for Multivariate Time Series,
NeurIPS 2019, and their code, White-Link/UnsupervisedScalableRepresentationLearningTimeSeries (networks/causal_cnn.py,
scikit_wrappers.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from flowformer.core.checks import check_sizes
from flowformer.core.masks import fill
from flowformer.models.classical.fitted import FittedModel, check_finite, chosen
from flowformer.models.classical.svm import SupportVectors

_BATCH = 50  # series that are encoded at a time


class CausalBlock(nn.Module):
    """Two dilated causal convolutions with weight normalisation and leaky ReLU, and a residual connection.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        kernel_size: Steps that a convolution sees.
        dilation: Distance between them.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(in_chans, out_chans, kernel_size, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(out_chans, out_chans, kernel_size, dilation=dilation))
        self.residual = nn.Conv1d(in_chans, out_chans, 1) if in_chans != out_chans else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: (batch, in_chans, length).

        Returns:
            (batch, out_chans, length), of which no step depends on later ones.
        """
        h = x
        for convolution in (self.first, self.second):
            h = nn.functional.leaky_relu(_convolve(convolution, h))
        return h + self.residual(x)


def _convolve(convolution: Any, x: Tensor) -> Tensor:
    """A causal convolution. Weights that would see nothing but what is before the first step are left out."""
    (dilation,) = convolution.dilation
    weight = convolution.weight
    seeing = min(weight.shape[2], (x.shape[2] - 1) // dilation + 1)
    padded = nn.functional.pad(x, ((seeing - 1) * dilation, 0))
    return nn.functional.conv1d(padded, weight[:, :, -seeing:], convolution.bias, dilation=dilation)


class CausalEncoder(nn.Module):
    """Encoder of a series of any length as one vector: causal blocks, their maximum over time, a linear layer.

    Args:
        in_chans: Channels of a series.
        channels: Channels of the blocks.
        depth: Number of blocks before the last one; dilation doubles from block to block.
        reduced_dim: Channels of the last block.
        dim: Channels of the vector.
        kernel_size: Steps that a convolution sees.

    Raises:
        ValueError, TypeError: for sizes that do not fit.
    """

    def __init__(
        self,
        in_chans: int,
        *,
        channels: int = 40,
        depth: int = 10,
        reduced_dim: int = 160,
        dim: int = 320,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, channels=channels, depth=depth, reduced_dim=reduced_dim, dim=dim)
        check_sizes(kernel_size=kernel_size)
        widths = [in_chans, *[channels] * depth, reduced_dim]
        self.dim = dim
        self.blocks = nn.Sequential(
            *(CausalBlock(widths[i], widths[i + 1], kernel_size, 2**i) for i in range(depth + 1))
        )
        self.head = nn.Linear(reduced_dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return one vector for each series.

        Args:
            x: (batch, length, in_chans), padded on the right.
            mask: (batch, length) boolean, True = real time step; each series has one.

        Returns:
            (batch, dim).
        """
        h = self.blocks(fill(x, mask).transpose(1, 2))
        if mask is not None:
            h = h.masked_fill(~mask[:, None], -torch.inf)
        return self.head(h.amax(2))


class TCNClassifier(FittedModel):
    """The encoder of Franceschi et al., 2019, and a support vector classifier on its vectors.

    The encoder is trained first, without labels (:class:`flowformer.tasks.series.triplets.TripletTask`);
    :meth:`fit` fits the classifier to the vectors of the training series.

    Args:
        encoder: The encoder.
        num_classes: Number of classes.
    """

    library: ClassVar[str] = "sklearn"

    def __init__(self, encoder: CausalEncoder, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.num_classes = encoder, num_classes
        self.classifier = SupportVectors(encoder.dim, num_classes)

    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Fit the support vector classifier; nothing in it is random."""
        device = next(self.encoder.parameters()).device
        with torch.no_grad():
            parts = zip(x.to(device).split(_BATCH), mask.to(device).split(_BATCH), strict=True)
            features = torch.cat([self.encoder(*part) for part in parts])
        self.classifier.fit(features.cpu(), y)
        self.classifier.to(device)

    def check_fitted(self) -> None:
        """Check what was loaded, weights of the encoder among it: the classifier would choose a class by NaN too."""
        for name, weights in self.encoder.named_parameters(prefix="encoder"):
            check_finite(name, weights)
        self.classifier.check_fitted()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes, those of a choice."""
        return chosen(self.classifier(self.encoder(x, mask)), self.num_classes)
