"""A transformer encoder for texts: BERT (Devlin et al. 2019, arXiv 1810.04805) and the models built like it.

DistilBERT (Sanh et al. 2019) is the same without token types, RoBERTa (Liu et al. 2019) one whose positions are counted
over real tokens. Padding and token types are read off the token numbers, so these are the only input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from sparing.core.errors import DataError, InvalidValue, MissingDependency
from sparing.models.convnet import each, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKED = -1e9
"""Added to the attention score of padding. Finite, so that a row of padding alone gives numbers."""

Head = Literal["classifier", "masked_lm", "span", "tokens", "embedding"]
Pooler = Literal["none", "tanh", "relu"]
Pooling = Literal["first", "mean"]


class Embeddings(nn.Module):
    """Sum of a token's embedding, its position's and its type's; layer norm; dropout.

    Shapes: token numbers (N, T) → (N, T, dim).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_length: int,
        segments: int,
        dropout: float,
        eps: float,
        pad_id: int,
        sep_id: int,
        position_offset: int,
    ) -> None:
        super().__init__()
        self.max_length, self.pad_id, self.sep_id, self.position_offset = max_length, pad_id, sep_id, position_offset
        self.words = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length + position_offset, dim)
        if segments:
            self.segments = nn.Embedding(segments, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t dim"]:
        """(N, T) → (N, T, dim)."""
        real = ids != self.pad_id
        if self.position_offset:  # padding has the position before the first
            counted = real.long()
            summed = self.words(ids) + self.positions(counted.cumsum(1) * counted + self.position_offset - 1)
        else:
            summed = self.words(ids) + self.positions.weight[: ids.shape[1]]
        if hasattr(self, "segments"):
            separators = (ids == self.sep_id).long()
            types = ((separators.cumsum(1) > separators) & real).long()  # 1 after the first separator
            summed = summed + self.segments(types.clamp(max=self.segments.num_embeddings - 1))
        return self.dropout(self.norm(summed))


class EncoderBlock(nn.Module):
    """Self-attention, then two linear layers with an exact GELU between; each added to its input and normalised.

    Shapes: (N, T, dim), additive mask (N, 1, 1, T) → (N, T, dim).

    Args:
        dim: width of a token.
        heads: attention heads; must divide ``dim``.
        hidden: units between the two linear layers.
        dropout: share dropped of attention weights and of what is added, in training.
        eps: of the layer norms.
        head_dim: units of a head; ``dim`` shared among the heads if none.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float, eps: float, head_dim: int | None = None
    ) -> None:
        super().__init__()
        inner = dim if head_dim is None else heads * head_dim
        self.heads, self.rate = heads, dropout
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)
        self.value = nn.Linear(dim, inner)
        self.attention_out = nn.Linear(inner, dim)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.output_norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Float[Tensor, "n t dim"], mask: Float[Tensor, "n 1 1 t"]) -> Float[Tensor, "n t inner"]:
        """softmax(q kᵀ / √d + mask) v in each head: (N, T, dim) → (N, T, heads · head_dim)."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, mask, dropout_p=self.rate if self.training else 0.0)
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, x: Float[Tensor, "n t dim"], mask: Float[Tensor, "n 1 1 t"]) -> Float[Tensor, "n t dim"]:
        """(N, T, dim) → (N, T, dim)."""
        x = self.attention_norm(x + self.dropout(self.attention_out(self.attend(x, mask))))
        return self.output_norm(x + self.dropout(self.down(gelu(self.up(x)))))


class ClassifierHead(nn.Module):
    """The first token, a dense layer with its activation where there is one, dropout, a linear layer.

    Shapes: (N, T, dim) → logits (N, classes).
    """

    def __init__(self, dim: int, classes: int, pooler: Pooler, dropout: float) -> None:
        super().__init__()
        self.activation = {"none": None, "tanh": torch.tanh, "relu": torch.relu}[pooler]
        if pooler != "none":
            self.pooler = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, hidden: Float[Tensor, "n t dim"]) -> Float[Tensor, "n classes"]:
        """(N, T, dim) → (N, classes)."""
        first = hidden[:, 0]
        if self.activation is not None:
            first = self.activation(self.pooler(first))
        return self.classifier(self.dropout(first))


class SpanHead(nn.Module):
    """A logit of being the answer's first token and one of being its last, for each token.

    Shapes: (N, T, dim) → (N, T, 2).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, 2)

    def forward(self, hidden: Float[Tensor, "n t dim"]) -> Float[Tensor, "n t 2"]:
        """(N, T, dim) → (N, T, 2)."""
        return self.classifier(hidden)


class MaskedLMHead(nn.Module):
    """Dense layer, GELU, layer norm, then a product with every word's embedding.

    Shapes: (N, P, dim), table of embeddings (V, dim) → logits (N, P, V).
    """

    def __init__(self, dim: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Float[Tensor, "n p dim"], table: Float[Tensor, "v dim"]) -> Float[Tensor, "n p v"]:
        """(N, P, dim), (V, dim) → (N, P, V)."""
        return linear(self.norm(gelu(self.dense(hidden))), table, self.bias)


class Bert(nn.Module):
    """Transformer encoder for texts with post-norm blocks and one of five heads (Devlin et al. 2019).

    Shapes: token numbers int64 (N, T), T ≤ max_length, padded behind with ``pad_id`` → by ``head``: "classifier"
    (N, num_classes); "masked_lm" (N, P, vocab_size) at the slots ``positions`` (N, P), or at all T; "span" (N, T, 2);
    "tokens" (N, T, dim); "embedding" (N, dim).

    Args:
        vocab_size: number of different tokens.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads, of all blocks or of each; must divide ``dim`` unless ``head_dim`` is given.
        hidden: units of a block's feed-forward, of all blocks or of each; 4·dim if none.
        max_length: longest input in tokens.
        segments: number of token types: 2 for BERT, 0 for none. Tokens behind the first ``sep_id`` are of type 1.
        dropout: share dropped of embeddings, attention weights, each block's two branches, the classifier's input.
        eps: of the layer norms.
        pad_id: the token that fills up a batch and that is never attended to.
        sep_id: the token that separates two texts.
        position_offset: positions are counted over all tokens from 0, or, if this is more than 0, over those that are
            no padding from here (RoBERTa: 2).
        head: what is made of the last block's output.
        num_classes: logits of a classifier.
        pooler: a classifier's dense layer on the first token: "tanh" (BERT, RoBERTa), "relu" (DistilBERT) or "none".
        pooling: an embedding is the "first" token or the "mean" of those that are no padding.
        head_dim: units of each attention head; ``dim`` shared among the heads if none.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"text_encoder"})

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        heads: int | Sequence[int] = 4,
        hidden: int | Sequence[int] | None = None,
        max_length: int = 64,
        segments: int = 0,
        dropout: float = 0.1,
        eps: float = 1e-12,
        pad_id: int = 0,
        sep_id: int = 3,
        position_offset: int = 0,
        head: Head = "classifier",
        num_classes: int = 2,
        pooler: Pooler = "none",
        pooling: Pooling = "first",
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        whole("bert", vocab_size=vocab_size, dim=dim, depth=depth, max_length=max_length, num_classes=num_classes)
        heads_of = each("bert", "heads", heads, depth)
        hidden_of = each("bert", "hidden", 4 * dim if hidden is None else hidden, depth)
        if head_dim is not None:
            whole("bert", head_dim=head_dim)
        elif any(dim % count for count in heads_of):
            raise InvalidValue(f"bert: dim = {dim} cannot be shared among heads = {heads}")
        for name, value, limit in (
            ("segments", segments, 1 << 16),
            ("position_offset", position_offset, 1 << 16),
            ("pad_id", pad_id, vocab_size - 1),
            ("sep_id", sep_id, vocab_size - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
                raise InvalidValue(f"bert: {name} = {value!r}; a whole number in 0…{limit} is expected")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InvalidValue(f"bert: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise InvalidValue(f"bert: eps = {eps!r}; 0 < eps < 1 is expected")
        for name, choice, choices in (("head", head, Head), ("pooler", pooler, Pooler), ("pooling", pooling, Pooling)):
            if choice not in get_args(choices):
                raise InvalidValue(f"bert: {name} = {choice!r}; one of {', '.join(get_args(choices))} is expected")
        self.max_length, self.pad_id, self.task_head, self.pooling = max_length, pad_id, head, pooling
        self.embeddings = Embeddings(
            vocab_size, dim, max_length, segments, dropout, eps, pad_id, sep_id, position_offset
        )
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, count, units, dropout, eps, head_dim)
            for count, units in zip(heads_of, hidden_of, strict=True)
        )
        if head == "classifier":
            self.head: nn.Module = ClassifierHead(dim, num_classes, pooler, dropout)
        elif head == "span":
            self.head = SpanHead(dim)
        elif head == "masked_lm":
            self.head = MaskedLMHead(dim, vocab_size, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, ids: Shaped[Tensor, "..."]) -> Float[Tensor, "n t dim"]:
        """Token numbers (N, T) → what the last block gives (N, T, dim)."""
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise InvalidValue(
                f"bert: an input of shape {tuple(ids.shape)} and type {ids.dtype}; token numbers (N, T) of type int64 "
                "are expected"
            )
        if not 1 <= ids.shape[1] <= self.max_length:
            raise InvalidValue(f"bert: {ids.shape[1]} tokens; 1…{self.max_length} (max_length) are expected")
        x = self.embeddings(ids)
        mask = torch.zeros_like(ids, dtype=x.dtype).masked_fill(ids == self.pad_id, MASKED)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, ids: Shaped[Tensor, "..."], positions: Int[Tensor, "n p"] | None = None) -> Float[Tensor, "..."]:
        """Token numbers (N, T), for the head "masked_lm" also slots (N, P) → the head's output (see the class)."""
        if positions is not None and self.task_head != "masked_lm":
            raise InvalidValue(
                f'bert: positions are for the head "masked_lm"; this model has the head {self.task_head!r}'
            )
        hidden = self.encode(ids)
        if self.task_head == "tokens":
            return hidden
        if self.task_head == "embedding":
            return self._pooled(hidden, ids)
        if self.task_head != "masked_lm":
            return self.head(hidden)
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        return self.head(hidden, self.embeddings.words.weight)

    def _pooled(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if self.pooling == "first":
            return hidden[:, 0]
        real = (ids != self.pad_id).unsqueeze(2).to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1).clamp(min=1)


def from_transformers(
    model: PreTrainedModel | str | Path, *, pooling: Pooling | None = None, sep_id: int | None = None
) -> Bert:
    """A :class:`Bert` with the weights of a model of the package ``transformers``, answering the same.

    BERT, DistilBERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA are understood, bare or with the head
    ``ForSequenceClassification``, ``ForQuestionAnswering`` or ``ForMaskedLM``.

    Args:
        model: the model, or a local folder that ``save_pretrained`` wrote (safetensors; nothing is downloaded).
        pooling: a bare model becomes one with the head "embedding", the "first" token or the "mean"; None: "tokens".
        sep_id: number of the token between two texts, for models with token types; looked up in a folder's vocabulary.

    Raises:
        InvalidValue: for what this network is not: another family, activation or kind of positions, a decoder, an
            output layer of its own.
        DataError: for a folder that cannot be read.
        MissingDependency: for a folder without ``transformers``.
    """
    from sparing.core.predictor import build_model

    if isinstance(model, str | Path):
        folder = Path(model)
        sep_id = _separator(folder) if sep_id is None else sep_id
        model = _loaded(folder)
    config, name = model.config, type(model).__name__
    family = _FAMILIES.get(config.model_type)
    suffix = next((suffix for suffix in _HEADS if name.endswith(suffix)), None)
    if family is None or suffix is None:
        raise InvalidValue(
            f"a {name} ({config.model_type}) cannot be made a bert: one of {', '.join(_FAMILIES)} that is a "
            f"{', a '.join('…' + suffix for suffix in _HEADS)} is expected"
        )
    head = _HEADS[suffix]
    if head == "classifier" and family.classifier is None:
        raise InvalidValue(f"{name}: its classifier has a GELU between two layers; a bert's is tanh, ReLU or nothing")
    if pooling is not None and head != "tokens":
        raise InvalidValue(f"{name}: pooling = {pooling!r} is for a bare model; this one has a head of its own")
    fields = _fields(config, family, name, sep_id)
    if head == "tokens" and pooling is not None:
        fields |= {"head": "embedding", "pooling": pooling}
    elif head == "classifier":
        fields |= {"head": head, "num_classes": config.num_labels, "pooler": family.pooler}
    else:
        fields |= {"head": head}
    made = build_model("bert", **fields)
    assert isinstance(made, Bert)
    _copy(made, model.state_dict(), family, "" if head == "tokens" else f"{model.base_model_prefix}.", head, name)
    return made.train(model.training)


class _Family(NamedTuple):
    """Where a family keeps what, in terms of our names; ``{i}`` is the block."""

    blocks: str
    block: dict[str, str]
    pooler: Pooler
    classifier: tuple[str, str] | None
    """(dense layer on the first token, linear layer); a name that begins with "." is inside the encoder."""
    language: tuple[str, str, str, str]
    """(dense layer, layer norm, decoder, its bias)."""
    by_padding: bool = False
    """Positions are counted over real tokens, and every token is of type 0."""


_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTIL_BLOCK = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
_ROBERTA = _Family(
    "encoder.layer",
    _BERT_BLOCK,
    "tanh",
    ("classifier.dense", "classifier.out_proj"),
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    by_padding=True,
)
_FAMILIES = {
    "bert": _Family(
        "encoder.layer",
        _BERT_BLOCK,
        "tanh",
        (".pooler.dense", "classifier"),
        (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
    ),
    "distilbert": _Family(
        "transformer.layer",
        _DISTIL_BLOCK,
        "relu",
        ("pre_classifier", "classifier"),
        ("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _Family(
        "encoder.layer",
        _BERT_BLOCK,
        "none",
        None,
        (
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
            "generator_lm_head.bias",
        ),
    ),
}
_HEADS: dict[str, Head] = {
    "ForSequenceClassification": "classifier",
    "ForQuestionAnswering": "span",
    "ForMaskedLM": "masked_lm",
    "Model": "tokens",
}


def _loaded(folder: Path) -> PreTrainedModel:
    import json

    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{config} is missing; a local folder that save_pretrained wrote is expected")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("transformers", "text", f"reading {folder}") from error
    try:
        named = json.loads(config.read_text("utf8")).get("architectures") or [""]
        kind = getattr(transformers, str(named[0]), None)
        if kind is None:
            raise DataError(f"{config}: architectures = {named}; the name of a class of transformers is expected first")
        model, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise DataError(f"{folder} cannot be read as a model of transformers: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise DataError(
            f"{folder}: its weights lack {missing[0]} ({len(missing)} such tensors), which a {type(model).__name__} "
            "has; the model must be trained and saved with its head"
        )
    return model


def _separator(folder: Path) -> int | None:
    """The number of [SEP] in a folder's vocabulary, if it has one."""
    import json

    listed, tokenizer = folder / "vocab.txt", folder / "tokenizer.json"
    try:
        if listed.is_file():
            words = listed.read_text("utf8").splitlines()
            return words.index("[SEP]") if "[SEP]" in words else None
        if tokenizer.is_file():
            added = json.loads(tokenizer.read_text("utf8")).get("added_tokens") or []
            return next((int(token["id"]) for token in added if token.get("content") == "[SEP]"), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: its vocabulary cannot be read: {error}") from error
    return None


def _fields(config: Any, family: _Family, name: str, sep_id: int | None) -> dict[str, Any]:
    def setting(*names: str) -> Any:
        return next((getattr(config, key) for key in names if getattr(config, key, None) is not None), None)

    activation = setting("hidden_act", "activation")
    if activation != "gelu":
        raise InvalidValue(f"{name}: activation = {activation!r}; the exact gelu is expected")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise InvalidValue(f"{name}: position_embedding_type = {positions!r}; absolute positions are expected")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise InvalidValue(f"{name}: it is a decoder (is_decoder or add_cross_attention); an encoder is expected")
    dim = setting("hidden_size", "dim")
    narrow = getattr(config, "embedding_size", dim)
    if narrow != dim:
        raise InvalidValue(f"{name}: embeddings of size {narrow} are projected to {dim}; equal sizes are expected")
    pad_id = config.pad_token_id
    if pad_id is None:
        raise InvalidValue(f"{name}: its config names no pad_token_id, by which padding is known")
    types = 0 if config.model_type == "distilbert" else config.type_vocab_size
    if family.by_padding:
        types = min(types, 1)
    if sep_id is None:
        sep_id = setting("sep_token_id")
    if sep_id is None and types > 1:
        raise InvalidValue(
            f"{name}: it has {types} token types, and its config names no sep_token_id, after which the second text "
            "begins; pass sep_id, the number of [SEP] in its vocabulary"
        )
    offset = pad_id + 1 if family.by_padding else 0
    return {
        "vocab_size": config.vocab_size,
        "dim": dim,
        "depth": setting("num_hidden_layers", "n_layers"),
        "heads": setting("num_attention_heads", "n_heads"),
        "hidden": setting("intermediate_size", "hidden_dim"),
        "max_length": config.max_position_embeddings - offset,
        "segments": types,
        "dropout": setting("hidden_dropout_prob", "dropout"),
        "eps": getattr(config, "layer_norm_eps", 1e-12),
        "pad_id": pad_id,
        "sep_id": min(3, config.vocab_size - 1) if sep_id is None else sep_id,
        "position_offset": offset,
    }


def _copy(made: Bert, state: dict[str, Tensor], family: _Family, prefix: str, head: Head, name: str) -> None:
    """Fill ``made``; a tensor that is missing, of another shape, or left over is refused."""
    layers = {
        "embeddings.words": "embeddings.word_embeddings",
        "embeddings.positions": "embeddings.position_embeddings",
    }
    layers |= {"embeddings.segments": "embeddings.token_type_embeddings", "embeddings.norm": "embeddings.LayerNorm"}
    for i in range(len(made.blocks)):
        layers |= {f"blocks.{i}.{ours}": f"{family.blocks}.{i}.{theirs}" for ours, theirs in family.block.items()}
    where = {ours: prefix + theirs for ours, theirs in layers.items()}
    if head == "classifier" and family.classifier is not None:
        for ours, theirs in zip(("head.pooler", "head.classifier"), family.classifier, strict=True):
            where[ours] = prefix + theirs[1:] if theirs.startswith(".") else theirs
    elif head == "span":
        where["head.classifier"] = "qa_outputs"
    elif head == "masked_lm":
        dense, norm, decoder, bias = family.language
        where |= {"head.dense": dense, "head.norm": norm}
        if not torch.equal(state[f"{decoder}.weight"], state[where["embeddings.words"] + ".weight"]):
            raise InvalidValue(f"{name}: {decoder}.weight is not the table of its embeddings; tied ones are expected")
        if f"{decoder}.bias" in state and not torch.equal(state[f"{decoder}.bias"], state[bias]):
            raise InvalidValue(f"{name}: {decoder}.bias is not {bias}; one bias is expected")
    used = {f"{decoder}.weight", f"{decoder}.bias"} if head == "masked_lm" else set()
    with torch.no_grad():
        for ours, tensor in made.state_dict().items():
            layer, _, attribute = ours.rpartition(".")
            theirs = bias if ours == "head.bias" else f"{where[layer]}.{attribute}"
            found = state.get(theirs)
            if found is not None and ours == "embeddings.segments.weight":
                found = found[: len(tensor)]
            if found is None or found.shape != tensor.shape:
                has = "no such tensor" if found is None else f"the shape {tuple(found.shape)}"
                raise InvalidValue(f"{name}: {theirs} has {has}; {tuple(tensor.shape)} is expected")
            tensor.copy_(found)
            used.add(theirs)
    buffers = ("embeddings.position_ids", "embeddings.token_type_ids")
    ignored = {prefix + key for key in buffers} | (
        {"pooler.dense.weight", "pooler.dense.bias"} if not prefix else set()
    )
    if left := sorted(state.keys() - used - ignored):
        raise InvalidValue(f"{name}: {left[0]} has no place in a bert ({len(left)} such tensors)")
