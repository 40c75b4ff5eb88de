"""Click-through prediction from categorical fields: the embedding they share, and five well-known models.

A model maps ids, int64 (B, F) with one id for each of F fields, to logits (B,). Id −1 stands for whatever is unknown:
a value that was missing, never seen or too rare to have a row. It is a vector of zeros and is not trained. A table's
row of exact zeros says the same, so :meth:`CTRModel.prune` can drop such rows without changing any answer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from sparing.core.errors import InvalidValue
from sparing.core.predictor.module import build_model, named_model
from sparing.models.convnet import whole


def watched() -> bool:
    """False while a graph is made of the model: a graph cannot look at values."""
    return not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing())


def check_cardinalities(model: str, cardinalities: object) -> tuple[int, ...]:
    """The ids each field has, 0 or more; :class:`InvalidValue` for anything else."""
    if isinstance(cardinalities, str) or not isinstance(cardinalities, Sequence) or not cardinalities:
        raise InvalidValue(f"{model}: cardinalities = {cardinalities!r}; the number of ids of each field is expected")
    whole(model, 0, **{f"cardinalities[{field}]": count for field, count in enumerate(cardinalities)})
    return tuple(cardinalities)


class Fields(nn.Module):
    """Where the ids of each field lie when all fields' ids are counted through.

    Args:
        cardinalities: ids of each of the F fields.
    """

    def __init__(self, cardinalities: Sequence[int]) -> None:
        super().__init__()
        counts = torch.tensor(cardinalities, dtype=torch.long)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Bool[Tensor, "b f"], Int[Tensor, "b f"]]:
        """Ids (B, F) → (whether each is known, its place among all fields' ids or 0), both (B, F).

        Raises:
            InvalidValue: ids of another shape or type, below −1, or beyond their field's. In an exported graph, which
                cannot refuse, these are unknown.
        """
        counts, offsets = self.get_buffer("counts"), self.get_buffer("offsets")
        if ids.ndim != 2 or ids.shape[1] != len(counts) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InvalidValue(
                f"ids of type {ids.dtype} and shape {tuple(ids.shape)}; whole numbers (B, {len(counts)}) are expected"
            )
        known = (ids >= 0) & (ids < counts)
        if watched() and not ids.is_meta and bool((wrong := (ids != -1) & ~known).any()):
            row, field = wrong.nonzero()[0].tolist()
            raise InvalidValue(
                f"ids[{row}, {field}] = {int(ids[row, field])}; −1 (unknown) or one of the field's "
                f"{int(counts[field])} ids from 0 is expected"
            )
        return known, torch.where(known, ids + offsets, torch.zeros_like(ids))


class FieldEmbedding(nn.Embedding):
    """One table for all fields, so that a training step makes one look-up and one update.

    Rows lie in the order of the fields. Entries begin truncated normal, cut at two standard deviations.

    Args:
        cardinalities: N_f ≥ 0, ids of each field; the table has Σ N_f rows (one, of zeros, where that is 0).
        dim: D, numbers in a row.
        std: standard deviation of the initial values; None: 1/√D. With 0 they are zeros.
        sparse: whether gradients are sparse tensors, which take time for the rows of a batch and not for the table.
    """

    def __init__(self, cardinalities: Sequence[int], dim: int, std: float | None = None, sparse: bool = False) -> None:
        self.cardinalities = check_cardinalities("FieldEmbedding", cardinalities)
        whole("FieldEmbedding", dim=dim)
        self.std = 1 / math.sqrt(dim) if std is None else std
        if isinstance(self.std, bool) or not isinstance(self.std, int | float) or not 0 <= self.std < math.inf:
            raise InvalidValue(f"FieldEmbedding: std = {std!r}; a number of at least 0 is expected, or none")
        super().__init__(max(sum(cardinalities), 1), dim, sparse=sparse)

    def reset_parameters(self) -> None:
        """Draw the initial values anew."""
        if self.std and sum(self.cardinalities):
            nn.init.trunc_normal_(self.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        else:
            nn.init.zeros_(self.weight)

    def forward(  # type: ignore[override]  # it must be told which ids are known
        self, known: Bool[Tensor, "b f"], places: Int[Tensor, "b f"]
    ) -> Float[Tensor, "b f dim"]:
        """What :class:`Fields` says of ids (B, F) → (B, F, D), zeros for those that are not known."""
        rows = embedding(places, self.weight, sparse=self.sparse)
        return torch.where(known[..., None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

    def field(self, number: int) -> Float[Tensor, "n dim"]:
        """The rows (N_f, D) of one field, a view."""
        start = sum(self.cardinalities[:number])
        return self.weight[start : start + self.cardinalities[number]]

    def extra_repr(self) -> str:
        """Without ``sparse``, which is an affair of training."""
        return f"{len(self.cardinalities)} fields, {sum(self.cardinalities)} rows of {self.embedding_dim}"


class CTRModel(nn.Module):
    """What the models here have in common.

    Args:
        cardinalities: ids of each of the F fields.
        fields: the other arguments that build this model again.
    """

    def __init__(self, cardinalities: Sequence[int], **fields: Any) -> None:
        super().__init__()
        self.cardinalities = check_cardinalities(type(self).__name__, cardinalities)
        self.fields = Fields(self.cardinalities)
        self._config = fields

    @abstractmethod
    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""

    def _table(self, dim: int, std: float | None = None) -> FieldEmbedding:
        return FieldEmbedding(self.cardinalities, dim, std)

    @property
    def tables(self) -> list[FieldEmbedding]:
        """The embedding tables, all with the same rows."""
        return [module for module in self.modules() if isinstance(module, FieldEmbedding)]

    def zero_rows(self) -> Bool[Tensor, " rows"]:
        """Which ids, counted through all fields (Σ N_f,), have exact zeros in every table."""
        zero = torch.stack([(table.weight.detach() == 0).all(1) for table in self.tables]).all(0)
        return zero[: sum(self.cardinalities)]

    def sparsity(self) -> dict[str, float]:
        """Shares in 0…1: "zero_rows" of the rows there are and "zero_weights" of the tables' numbers.

        Models add others. A model without a row has 0 of both.
        """
        zero, size = sum(int((t.weight == 0).sum()) for t in self.tables), sum(t.weight.numel() for t in self.tables)
        rows = self.zero_rows()
        if not len(rows):
            return {"zero_rows": 0.0, "zero_weights": 0.0}
        return {"zero_rows": int(rows.sum()) / len(rows), "zero_weights": zero / size}

    def prune(self) -> tuple[CTRModel, list[Int[np.ndarray, " n"]]]:
        """A model of the same class without the rows of exact zeros, and for each field where its ids went.

        The second is an int64 array (N_f,) for each field: the id in the smaller model, −1 for a row that is dropped.
        Answers to ids sent through it are the same, bit for bit; :class:`RemappedIds` does both.
        """
        kept = ~self.zero_rows()
        maps, counts = [], []
        for part in kept.split(list(self.cardinalities)):
            maps.append(torch.where(part, part.cumsum(0) - 1, -1).cpu().numpy())
            counts.append(int(part.sum()))
        with torch.random.fork_rng(devices=[]):
            smaller = build_model(type(self), cardinalities=counts, **self._config)
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, FieldEmbedding):
                rows = module.weight.detach()[: len(kept)][kept]
                state[f"{name}.weight"] = rows if len(rows) else torch.zeros_like(module.weight[:1])
        like = self.tables[0].weight
        smaller = smaller.to(device=like.device, dtype=like.dtype).train(self.training)
        smaller.load_state_dict(state)
        assert isinstance(smaller, CTRModel)
        return smaller, maps


class RemappedIds(nn.Module):
    """A model behind a list of where ids went: it takes the ids there were before rows were dropped.

    The list has four bytes for each id; a row that is kept has 4·D.

    Shapes: ids (B, F) → what the model makes of ids (B, F).

    Args:
        model: the smaller model: {name: a registered one, field: value}.
        cardinalities: ids of each field before.
    """

    def __init__(self, model: Mapping[str, Any], cardinalities: Sequence[int]) -> None:
        super().__init__()
        self.cardinalities = check_cardinalities("RemappedIds", cardinalities)
        name, fields = named_model(model, "model")
        self.fields = Fields(self.cardinalities)
        self.model = build_model(name, **fields)
        self.register_buffer("new_ids", torch.full((max(sum(cardinalities), 1),), -1, dtype=torch.int32))

    def forward(self, ids: Tensor) -> Any:
        """Ids (B, F) as they were → the model's answer."""
        known, places = self.fields(ids)
        return self.model(torch.where(known, self.get_buffer("new_ids")[places].long(), -1))


def without_zero_rows(model: CTRModel | RemappedIds) -> RemappedIds:
    """The model :meth:`~CTRModel.prune` makes, behind the ids it had: the same answers from fewer bytes.

    Of a model that has a list of ids already, it is the list that changes.
    """
    inner: Any = model.model if isinstance(model, RemappedIds) else model
    smaller, maps = inner.prune()
    spec = smaller.__dict__["_sparing_spec"]
    remapped = build_model(
        RemappedIds, model={"name": spec.builder, **spec.config}, cardinalities=list(model.cardinalities)
    )
    assert isinstance(remapped, RemappedIds)
    remapped.model.load_state_dict(smaller.state_dict())
    if sum(model.cardinalities):
        new_ids = torch.from_numpy(np.concatenate(maps)).to(torch.int32)
        if isinstance(model, RemappedIds):
            before, counts = model.get_buffer("new_ids").cpu(), model.fields.get_buffer("counts").cpu()
            places = before + inner.fields.get_buffer("offsets").cpu().repeat_interleave(counts)
            unknown = torch.full((1,), -1, dtype=torch.int32)
            new_ids = torch.cat([new_ids, unknown])[torch.where(before >= 0, places, -1)]
        remapped.get_buffer("new_ids").copy_(new_ids)
    like = inner.tables[0].weight
    remapped.model.to(dtype=like.dtype)
    return remapped.to(like.device).train(model.training)


def perceptron(model: str, in_features: int, widths: Sequence[int], dropout: float) -> nn.Sequential:
    """[linear → ReLU (→ dropout)] for each width."""
    whole(model, **{f"widths[{i}]": width for i, width in enumerate(widths)})
    check_dropout(model, dropout)
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_features, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        in_features = width
    return nn.Sequential(*layers)


def check_dropout(model: str, dropout: object) -> None:
    """Raise :class:`InvalidValue` unless ``dropout`` is a share below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InvalidValue(f"{model}: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")


class LogisticRegression(CTRModel):
    """Logistic regression on categorical fields: a weight for each id, and a bias.

    Shapes: ids (B, F) → logits (B,): b + Σ_f w_f[id].

    Args:
        cardinalities: ids of each field.
    """

    def __init__(self, cardinalities: Sequence[int]) -> None:
        super().__init__(cardinalities)
        self.weights = self._table(1, std=0.01)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        return self.bias + self.weights(*self.fields(ids)).sum((1, 2))


def pairwise(v: Float[Tensor, "b f dim"]) -> Float[Tensor, " b"]:
    """Σ over pairs of fields of ⟨v_i, v_j⟩, as ½ Σ_d [(Σ_f v)² − Σ_f v²] (Rendle 2010, lemma 3.1)."""
    return 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)


class FactorizationMachine(CTRModel):
    """Factorisation machine of second order on categorical fields (Rendle 2010).

    Shapes: ids (B, F) → logits (B,): b + Σ_f w_f[id] + Σ_{i<j} ⟨v_i, v_j⟩.

    Args:
        cardinalities: ids of each field.
        dim: D, numbers in a factor.
        init_std: standard deviation of initial factors; None: 1/√D.
    """

    def __init__(self, cardinalities: Sequence[int], dim: int = 16, init_std: float | None = None) -> None:
        super().__init__(cardinalities, dim=dim, init_std=init_std)
        self.weights = self._table(1, std=0.0)
        self.factors = self._table(dim, init_std)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        found = self.fields(ids)
        return self.bias + self.weights(*found).sum((1, 2)) + pairwise(self.factors(*found))


class FNN(CTRModel):
    """A perceptron on the weights and factors of a factorisation machine (Zhang, Du and Wang 2016, arXiv:1601.02376).

    Shapes: ids (B, F) → logits (B,). Its input are (w, v) of all fields, F·(D + 1) numbers. The paper's network begins
    with those of a trained machine, which :meth:`begin_with` takes over, and has tanh where this has ReLU.

    Args:
        cardinalities: ids of each field.
        dim: D, numbers in a factor.
        widths: units of each hidden layer.
        dropout: share of hidden units dropped in training.
        init_std: standard deviation of initial factors; None: 1/√D.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        dim: int = 16,
        widths: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(cardinalities, dim=dim, widths=list(widths), dropout=dropout, init_std=init_std)
        self.weights = self._table(1, std=0.01)
        self.factors = self._table(dim, init_std)
        size = len(self.cardinalities) * (dim + 1)
        self.deep = perceptron("FNN", size, widths, dropout)
        self.head = nn.Linear(widths[-1] if widths else size, 1)

    def begin_with(self, machine: FactorizationMachine) -> None:
        """Take over the weights and factors of a machine with the same fields and D."""
        if (machine.cardinalities, machine.factors.embedding_dim) != (self.cardinalities, self.factors.embedding_dim):
            raise InvalidValue(
                f"FNN: the machine has {machine.factors} and this {self.factors}; the same fields and D are expected"
            )
        self.weights.load_state_dict(machine.weights.state_dict())
        self.factors.load_state_dict(machine.factors.state_dict())

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        found = self.fields(ids)
        x = torch.cat([self.weights(*found), self.factors(*found)], 2)
        return self.head(self.deep(x.flatten(1))).squeeze(1)


class DeepFM(CTRModel):
    """A factorisation machine and a multilayer perceptron on the same embeddings (Guo et al. 2017, arXiv:1703.04247).

    Shapes: ids (B, F) → logits (B,).

    Args:
        cardinalities: ids of each field.
        dim: D, numbers in an embedding.
        widths: units of each hidden layer on the F·D numbers of all embeddings.
        dropout: share of hidden units dropped in training.
        init_std: standard deviation of initial embeddings; None: 1/√D.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        dim: int = 16,
        widths: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(cardinalities, dim=dim, widths=list(widths), dropout=dropout, init_std=init_std)
        self.weights = self._table(1, std=0.0)
        self.factors = self._table(dim, init_std)
        size = len(self.cardinalities) * dim
        self.deep = perceptron("DeepFM", size, widths, dropout)
        self.head = nn.Linear(widths[-1] if widths else size, 1)

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        found = self.fields(ids)
        v = self.factors(*found)
        return self.weights(*found).sum((1, 2)) + pairwise(v) + self.head(self.deep(v.flatten(1))).squeeze(1)


class CrossLayer(nn.Module):
    """x_{l+1} = x_0 ⊙ (W x_l + b) + x_l (Wang et al. 2021, arXiv:2008.13535, equation 1; equation 2 with a rank).

    Shapes: (B, n), (B, n) → (B, n).

    Args:
        size: n.
        rank: r of W = U Vᵀ with U and V (n, r); None: W is whole.
    """

    def __init__(self, size: int, rank: int | None = None) -> None:
        super().__init__()
        self.product: nn.Module = nn.Linear(size, size)
        if rank is not None:
            whole("CrossLayer", rank=rank)
            self.product = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size))

    def forward(self, first: Float[Tensor, "b n"], x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """x_0 and x_l → x_{l+1}."""
        return first * self.product(x) + x


class DCNv2(CTRModel):
    """Deep and cross network V2, parallel: cross layers beside a perceptron (Wang et al. 2021, arXiv:2008.13535).

    Shapes: ids (B, F) → logits (B,), linear in both parts' last layers.

    Args:
        cardinalities: ids of each field.
        dim: D, numbers in an embedding.
        layers: cross layers.
        rank: of their matrices; None: whole.
        widths: units of each hidden layer of the perceptron.
        dropout: share of hidden units dropped in training.
        init_std: standard deviation of initial embeddings; None: 1/√D.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        dim: int = 16,
        layers: int = 3,
        rank: int | None = None,
        widths: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        config = {"dim": dim, "layers": layers, "rank": rank, "dropout": dropout, "init_std": init_std}
        super().__init__(cardinalities, widths=list(widths), **config)
        whole("DCNv2", layers=layers)
        self.embedding = self._table(dim, init_std)
        size = len(self.cardinalities) * dim
        self.cross = nn.ModuleList(CrossLayer(size, rank) for _ in range(layers))
        self.deep = perceptron("DCNv2", size, widths, dropout)
        self.head = nn.Linear(size + (widths[-1] if widths else size), 1)

    def forward(self, ids: Tensor) -> Float[Tensor, " b"]:
        """Ids (B, F) → logits (B,)."""
        first = crossed = self.embedding(*self.fields(ids)).flatten(1)
        for layer in self.cross:
            crossed = layer(first, crossed)
        return self.head(torch.cat([crossed, self.deep(first)], 1)).squeeze(1)
