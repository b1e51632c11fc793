"""A small network with adapted linear layers, and the gradient that each kind of upload shows.

For a layer with dense gradient ``G = d loss / d W`` at its effective weight ``W`` and scaling s:

    full     W                                        dW = G, and the bias'
    lora     W0 + s B A                               dA = s B^T G,   dB = s G A^T
    ffa      W0 + s B A,   A fixed                    dB = s G A^T
    florg    W0 + s left (A^T A - A0^T A0) right      dA = s A (P + P^T),   P = left^T G right^T
    ce_lora  W0 + s B R A,  A and B not sent          dR = s B^T G A^T

Written from formulas and without PEFT: an audit wants the algebra alone, in fp64, twice
differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from fedcore.errors import unknown_name

Parameters = dict[str, Tensor]
"""``"LAYER.FACTOR"`` to a tensor."""

CE_STD = 1e-3
GRAM_SCALE = 0.1
RESOLUTION = 1e-8


@dataclass(frozen=True)
class UploadKind:
    """What trains at a client and which of it is sent, by the factor's name."""

    name: str
    title: str
    trains: tuple[str, ...]
    sends: tuple[str, ...]


UPLOADS = {
    kind.name: kind
    for kind in (
        UploadKind("full", "full fine-tuning: W, bias", ("W", "b"), ("W", "b")),
        UploadKind("lora", "LoRA: A and B", ("A", "B"), ("A", "B")),
        UploadKind("ffa", "FFA-LoRA: B", ("B",), ("B",)),
        UploadKind("florg", "FLoRG: Gram factor A", ("A",), ("A",)),
        UploadKind("ce_lora", "CE-LoRA: core R", ("A", "B", "R"), ("R",)),
    )
}


@dataclass(frozen=True)
class Base:
    """A GELU network: ``weights`` ``(out, in)`` and ``biases`` ``(out,)`` of each layer."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def draw(cls, widths: Sequence[int], generator: torch.Generator) -> Base:
        """fp64 weights of variance ``1 / in``; zero biases."""
        pairs = list(pairwise(widths))
        return cls(
            tuple(
                torch.randn(out, wide, generator=generator, dtype=torch.float64) / sqrt(wide)
                for wide, out in pairs
            ),
            tuple(torch.zeros(out, dtype=torch.float64) for _, out in pairs),
        )

    def logits(self, pictures: Tensor) -> Tensor:
        """``(batch, in)`` to ``(batch, classes)``."""
        x = pictures
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(F.gelu(x) if layer else x, weight, bias)
        return x


@dataclass(frozen=True)
class AdaptedNetwork:
    """A base, its adapter and which of its parameters a client sends.

    Attributes:
        kind: the upload.
        base: frozen; for ``full`` it is not used once parameters are there.
        scaling: s.
        parameters: all factors, frames included, by ``"LAYER.FACTOR"``.
    """

    kind: UploadKind
    base: Base
    scaling: float
    parameters: Parameters

    @property
    def sent(self) -> Parameters:
        """The parameters whose gradient the server sees."""
        return self._having(self.kind.sends)

    @property
    def trained(self) -> Parameters:
        """The parameters that train at the client."""
        return self._having(self.kind.trains)

    @property
    def numbers(self) -> int:
        """How many numbers an upload holds."""
        return sum(values.numel() for values in self.sent.values())

    def effective(self, parameters: Mapping[str, Tensor]) -> Base:
        """The dense network that computes the same with these parameters."""
        weights, biases = [], []
        for layer, (weight, bias) in enumerate(
            zip(self.base.weights, self.base.biases, strict=True)
        ):

            def factor(name: str, layer: int = layer) -> Tensor:
                return parameters[f"{layer}.{name}"]

            if self.kind.name == "full":
                weight, bias = factor("W"), factor("b")
            elif self.kind.name == "florg":
                gram = factor("A").T @ factor("A") - factor("A0").T @ factor("A0")
                weight = weight + self.scaling * factor("left") @ gram @ factor("right")
            elif self.kind.name == "ce_lora":
                weight = weight + self.scaling * factor("B") @ factor("R") @ factor("A")
            else:
                weight = weight + self.scaling * factor("B") @ factor("A")
            weights.append(weight)
            biases.append(bias)
        return Base(tuple(weights), tuple(biases))

    def loss(self, some: Parameters, pictures: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy, with ``some`` parameters in place of the network's own."""
        network = self.effective({**self.parameters, **some})
        return F.cross_entropy(network.logits(pictures), labels)

    def gradient(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """What the server sees of one local step, for each of several batches.

        A step of plain gradient descent at a rate that the server knows shows this and nothing
        else.

        Args:
            pictures: ``(batches, size, in)``; the result can be differentiated by it.
            labels: ``(size,)``, the same for every batch.

        Returns:
            ``(batches, numbers)``, one after another the gradients by :attr:`sent`.
        """
        slopes = vmap(grad(self.loss), in_dims=(None, 0, None))(self.sent, pictures, labels)
        return torch.cat([slopes[name].flatten(1) for name in self.sent], dim=1)

    def directions(self, pictures: Tensor, labels: Tensor) -> int:
        """Of the ``size x in`` directions that a batch can change in, those the gradient shows.

        The rank of the derivative of :meth:`gradient` by the pictures ``(size, in)``, counting
        singular values above 1e-8 of the largest. In the others no attack can tell near pictures
        apart by the upload; in these the worst may still be hidden by a little noise.
        """

        def shown(x: Tensor) -> Tensor:
            return self.gradient(x[None], labels)[0]

        # The derivative is as wide as the pictures; forward mode goes by its narrow side.
        derivative = jacfwd(shown)(pictures).flatten(1)
        values = torch.linalg.svdvals(derivative)
        return int((values > RESOLUTION * values[0]).sum()) if values[0] else 0

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> AdaptedNetwork:
        """The network with some parameters replaced."""
        merged = {**self.parameters, **parameters}
        return AdaptedNetwork(self.kind, self.base, self.scaling, merged)

    def _having(self, factors: tuple[str, ...]) -> Parameters:
        return {n: v for n, v in self.parameters.items() if n.rpartition(".")[2] in factors}


def adapt(
    base: Base, upload: str, rank: int, scaling: float, generator: torch.Generator
) -> AdaptedNetwork:
    """Put the adapter of an upload kind on every layer, as its method starts it.

    ``B`` is zero and ``A`` uniform on ``±1/sqrt(in)`` for LoRA; CE-LoRA has ``A`` of standard
    deviation 1e-3, ``R`` the identity, ``B`` zero; a Gram factor is its own ``A0``, with rows of
    norm about 0.1.

    Raises:
        FedcoreError: an unknown upload.
    """
    if upload not in UPLOADS:
        raise unknown_name("upload", upload, UPLOADS)
    parameters: Parameters = {}
    for layer, (weight, bias) in enumerate(zip(base.weights, base.biases, strict=True)):
        start = _start(upload, weight, bias, rank, generator)
        parameters |= {f"{layer}.{name}": values for name, values in start.items()}
    return AdaptedNetwork(UPLOADS[upload], base, scaling, parameters)


def _start(
    upload: str, weight: Tensor, bias: Tensor, rank: int, generator: torch.Generator
) -> Parameters:
    out, wide = weight.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if upload == "full":
        return {"W": weight, "b": bias}
    if upload == "florg":
        k = min(out, wide)
        A = normal(rank, k) * (GRAM_SCALE / sqrt(k))
        left = torch.eye(out, dtype=A.dtype) if out == k else torch.linalg.qr(normal(out, k)).Q
        right = torch.eye(k, dtype=A.dtype) if wide == k else torch.linalg.qr(normal(wide, k)).Q.T
        return {"A": A, "A0": A, "left": left, "right": right}
    B = torch.zeros(out, rank, dtype=torch.float64)
    if upload == "ce_lora":
        core = torch.eye(rank, dtype=torch.float64)
        return {"A": CE_STD * normal(rank, wide), "R": core, "B": B}
    uniform = torch.rand(rank, wide, generator=generator, dtype=torch.float64)
    return {"A": (2 * uniform - 1) / sqrt(wide), "B": B}
