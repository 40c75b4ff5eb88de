"""xDeepInt: polynomial interactions of fields, without a perceptron (Yan and Li 2020, arXiv:2301.01089).

A layer multiplies what is there by a linear mix of the input's rows, so L layers hold every order of interaction from 1
to L + 1 and no higher. Rows are whole embeddings (H = 1), single numbers (H = D), or something between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sparing.core.errors import InvalidValue, did_you_mean
from sparing.models.convnet import whole
from sparing.models.ctr import CTRModel, check_dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
    "selu": functional.selu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
    "silu": functional.silu,
}


class PolynomialInteraction(nn.Module):
    """Polynomial interaction network (PIN): the layers of xDeepInt on embeddings (section 3 of the paper).

    The D numbers of each of F embeddings are cut into H chunks of d = D/H, and the chunks are stacked as G = F·H rows
    S: chunk 0 of all fields, chunk 1 of all fields, …. Layer l = 1 … L, a matrix W_l (G, G) without bias, makes
    P_l[g] = act(Σ_f W_l[f, g] S[f]) of them, always of the first S. Then

        Z_0 = S,  Z_l = Z_{l−1} ⊙ (1 + P_l)   (residual),
        Z_0 = S,  Z_l = Z_{l−1} ⊙ P_l         (plain; Z_0 … Z_L are stacked as rows),

    and the rows are cut into H parts again, which are joined along the numbers. In the plain form there are (L + 1)·G
    rows to cut, so a joined row mixes layers and chunks; this is the published definition.

    Shapes: (B, F, D) → (B, F, D), or (B, (L + 1)·F, D) in the plain form.

    Args:
        num_fields: F.
        dim: D.
        num_layers: L.
        num_subspaces: H, which divides D. 1: vector-wise; D: bit-wise.
        activation: act, a name of :data:`ACTIVATIONS`; None: the identity.
        dropout: share of S dropped before each layer's product, in training.
        residual: which form.

    Raises:
        InvalidValue: arguments outside these bounds; an input of another shape.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        num_layers: int = 4,
        num_subspaces: int = 4,
        activation: str | None = None,
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        whole("xdeepint", num_fields=num_fields, dim=dim, num_layers=num_layers, num_subspaces=num_subspaces)
        if dim % num_subspaces:
            raise InvalidValue(
                f"xdeepint: num_subspaces = {num_subspaces} does not divide dim = {dim}; each chunk has as many numbers"
            )
        if activation is not None and activation not in ACTIVATIONS:
            raise InvalidValue(
                f"xdeepint: activation = {activation!r}.{did_you_mean(str(activation), ACTIVATIONS)} "
                f"One of {', '.join(ACTIVATIONS)} is expected"
            )
        check_dropout("xdeepint", dropout)
        if not isinstance(residual, bool):
            raise InvalidValue(f"xdeepint: residual = {residual!r}; true or false is expected")
        self.num_fields, self.dim, self.num_subspaces, self.residual = num_fields, dim, num_subspaces, residual
        self.activation = activation or "identity"
        self.dropout = nn.Dropout(dropout)
        rows = num_fields * num_subspaces
        # a layer of torch is y = x Aᵀ: its weight is W_lᵀ
        layers = [nn.Linear(rows, rows, bias=False) for _ in range(num_layers)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        self.layers = nn.ModuleList(layers)

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return self.num_fields * (1 if self.residual else len(self.layers) + 1)

    @property
    def weights(self) -> list[Float[Tensor, "rows rows"]]:
        """W_l of each layer, (G, G)."""
        layers: Any = self.layers
        return [layer.weight.detach().T for layer in layers]

    def forward(self, x: Float[Tensor, "b f dim"]) -> Float[Tensor, "b rows dim"]:
        """(B, F, D) → (B, rows, D)."""
        if x.ndim != 3 or tuple(x.shape[1:]) != (self.num_fields, self.dim):
            raise InvalidValue(
                f"xdeepint: embeddings of shape {tuple(x.shape)}; (B, {self.num_fields}, {self.dim}) is expected"
            )
        act, parts = ACTIVATIONS[self.activation], self.num_subspaces
        # rows are kept last, (B, d, G), where a linear layer mixes them
        first = z = torch.cat(x.chunk(parts, 2), 1).transpose(1, 2)
        states = [z]
        for layer in self.layers:
            p = act(layer(self.dropout(first)))
            z = z + z * p if self.residual else z * p
            states.append(z)
        joined = z if self.residual else torch.cat(states, 2)
        return torch.cat(joined.chunk(parts, 2), 1).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings that the layers do not show."""
        return f"{self.num_subspaces} sub-spaces, {self.activation}, {'residual' if self.residual else 'plain'}"


class MultiHeadInteraction(nn.Module):
    """Several PINs side by side, each on its share of projected embeddings.

    A projection (D → hidden) without bias is cut into as many heads along its numbers; a
    :class:`PolynomialInteraction` of its own works on each, and what they make is stacked as rows.

    Shapes: (B, F, D) → (B, rows, hidden/heads); with residual heads there are heads·F rows.

    Args:
        num_fields: F.
        dim: D.
        hidden: numbers of the projection; the number of heads divides it.
        layers: L of each head.
        subspaces: H of each head.
        activations: act of each head; None: the identity for all.
        dropout: as in a PIN.
        residual: as in a PIN.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        hidden: int,
        layers: Sequence[int],
        subspaces: Sequence[int],
        activations: Sequence[str | None] | None = None,
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        whole("xdeepint", dim=dim, hidden=hidden, heads=len(layers))
        activations = [None] * len(layers) if activations is None else activations
        if not len(layers) == len(subspaces) == len(activations):
            raise InvalidValue(
                f"xdeepint: {len(layers)} layers, {len(subspaces)} subspaces and {len(activations)} activations; one "
                "of each for every head is expected"
            )
        if hidden % len(layers):
            raise InvalidValue(f"xdeepint: {len(layers)} heads do not divide hidden = {hidden}")
        self.projection = nn.Linear(dim, hidden, bias=False)
        nn.init.xavier_uniform_(self.projection.weight)
        self.heads = nn.ModuleList(
            PolynomialInteraction(num_fields, hidden // len(layers), *each, dropout=dropout, residual=residual)
            for each in zip(layers, subspaces, activations, strict=True)
        )

    def forward(self, x: Float[Tensor, "b f dim"]) -> Float[Tensor, "b rows part"]:
        """(B, F, D) → (B, rows, hidden/heads)."""
        parts = self.projection(x).chunk(len(self.heads), 2)
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], 1)


class Interaction(NamedTuple):
    """One weight of an interaction matrix, as what it does."""

    order: int
    """l + 1 of layer l: the order up to which it takes part."""
    source: int
    """Field i, whose chunk is mixed in."""
    source_chunk: int
    target: int
    """Field j, whose running state is multiplied."""
    target_chunk: int
    weight: float
    """W_l[i of its chunk, j of its chunk]."""


class XDeepInt(CTRModel):
    """xDeepInt: bounded-order interactions of categorical fields, vector-wise and bit-wise (Yan and Li 2020).

    Embeddings X, a :class:`PolynomialInteraction` O of them, and logit = Σ_d (Σ_r k_r O[r, d] + b). The bias is added
    for each of the D numbers, so it counts D times, and so does its gradient; this is the published definition.

    Shapes: ids (B, F), −1 for unknown → logits (B,).

    The published strengths of regularisation belong to a loss that is summed over the batch.

    Args:
        cardinalities: ids of each field.
        dim: D, numbers in an embedding.
        num_layers: L, layers; interactions have orders up to L + 1.
        num_subspaces: H, which divides D.
        activation: of the interactions; none in the published runs.
        dropout: share of inputs dropped before each product, in training.
        residual: the paper's form; False gives the plain one.
        init_std: standard deviation of initial embeddings; None: 1/√D.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        dim: int = 16,
        num_layers: int = 4,
        num_subspaces: int = 4,
        activation: str | None = None,
        dropout: float = 0.0,
        residual: bool = True,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            cardinalities,
            dim=dim,
            num_layers=num_layers,
            num_subspaces=num_subspaces,
            activation=activation,
            dropout=dropout,
            residual=residual,
            init_std=init_std,
        )
        self.embedding = self._table(dim, init_std)
        self.interaction = PolynomialInteraction(
            len(self.cardinalities), dim, num_layers, num_subspaces, activation, dropout, residual
        )
        self.head = nn.Linear(self.interaction.rows, 1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        return self.head(self.interaction(self.embedding(*self.fields(ids))).transpose(1, 2)).sum((1, 2))

    def sparsity(self) -> dict[str, float]:
        """Also "zero_interactions": the share of exact zeros among the weights of all W_l."""
        weights = self.interaction.weights
        zero = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        return {**super().sparsity(), "zero_interactions": zero}

    def interactions(self, most: int | None = 20) -> list[Interaction]:
        """The weights of all W_l that are not zero, the largest first; ``most`` of them, or all."""
        found = []
        fields = len(self.cardinalities)
        for number, weight in enumerate(self.interaction.weights):
            for source, target in (weight != 0).nonzero().tolist():
                chunks = source // fields, target // fields
                entry = source % fields, chunks[0], target % fields, chunks[1], float(weight[source, target])
                found.append(Interaction(number + 2, *entry))
        return sorted(found, key=lambda each: -abs(each.weight))[:most]

    def multiply_adds(self) -> int:
        """Multiply-adds of one example: L·(F·H)²·(D/H) + 2·L·F·D + F·D; plain: L·F·D in the middle, L·F·D more last."""
        pin = self.interaction
        layers, fields, dim, parts = len(pin.layers), pin.num_fields, pin.dim, pin.num_subspaces
        each = 2 if pin.residual else 1
        return layers * (fields * parts) ** 2 * (dim // parts) + each * layers * fields * dim + pin.rows * dim
