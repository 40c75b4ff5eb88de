"""The doscond fixtures that concern graphs: sets of graphs, and nodes of one graph.

``GROUPS`` maps an array that tells what a file holds to a check of all of a file's arrays. A check returns the names it
compared or used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from sparing.condensation.allocation import LabelAllocation, allocate_labels
from sparing.condensation.graphs import (
    BOUND_WEIGHT,
    EDGE_LOGIT,
    anneal_temperature,
    bound_term,
    discrete_adjacency,
    graph_distance,
    padded,
    real_gradient,
    relaxed_adjacency,
    sparsity_penalty,
    synthetic_gradient,
)
from sparing.condensation.nodes import (
    PairwiseGenerator,
    class_weights,
    node_distance,
    receptive_blocks,
    smoothness,
)
from sparing.data.graphs import PackedGraphs
from sparing.models.gnn import (
    AdjacencyGCN,
    AdjacencySGC,
    GraphClassifier,
    normalised_adjacency,
    normalised_sparse,
)

Arrays = Mapping[str, np.ndarray]
METRICS: tuple[Any, ...] = ("mse", "ours", "cos")


def close(found: Any, expected: np.ndarray, name: str) -> None:
    """By the fixtures' tolerance for what is no gradient."""
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{name}: {found.shape} is not {expected.shape}"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def gradient_close(found: Sequence[Tensor], arrays: Arrays, names: Sequence[str]) -> None:
    """By the fixtures' tolerance for the tensors of one gradient."""
    largest = max(float(np.abs(arrays[name]).max()) for name in names)
    for tensor, name in zip(found, names, strict=True):
        array = arrays[name]
        assert tuple(tensor.shape) == array.shape, f"{name}: {tuple(tensor.shape)} is not {array.shape}"
        error = float(np.abs(tensor.detach().numpy() - array).max())
        allowed = max(1e-4 * float(np.abs(array).max()), 1e-6 * largest)
        assert error <= allowed, f"{name}: an entry differs by {error:.3g}, more than {allowed:.3g}"


def below(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.tensor(v) for k, v in arrays.items() if k.startswith(prefix)}


# --- sets of graphs


def real_graphs(features: int) -> PackedGraphs | None:
    """The set under the data root whose node labels are so many, or None where there is no data."""
    root = os.environ.get("SPARING_DATA", "")
    files = sorted((Path(root) / "tu_graphs").glob("*.npz")) if root else []
    for file in files:
        arrays = np.load(file, allow_pickle=False)
        if int(arrays["node_label"].max()) + 1 == features:
            label = torch.tensor(arrays["node_label"].astype(np.int64))
            numbers = {
                name: torch.tensor(arrays[name].astype(np.int64))
                for name in ("node_ptr", "edge_ptr", "edge_src", "edge_dst", "graph_label")
            }
            return PackedGraphs(
                torch.nn.functional.one_hot(label, features).float(),
                numbers["node_ptr"],
                torch.stack([numbers["edge_src"], numbers["edge_dst"]]),
                numbers["edge_ptr"],
                numbers["graph_label"],
            )
    assert not files, f"no set of graphs in {root} has {features} features"
    return None


def graph_sets(arrays: Arrays) -> set[str]:
    features, hidden, classes, depth, nodes, per_class = (int(number) for number in arrays["cfg"])
    pooling: Any = str(arrays["pooling"])
    network = GraphClassifier(features, classes, hidden, depth, pooling)
    network.load_state_dict({k.replace("lin3.", "head."): v for k, v in below(arrays, "w/").items()})
    order = [name.replace("head.", "lin3.") for name, _ in network.named_parameters()]
    assert arrays["param_order"].tolist() == order
    used = {"cfg", "pooling", "beta", "lr_adj", "lr_feat", "param_order", "noise_logit", "anneal_cnt", "cnt_used"}
    used |= {f"w/{name}" for name in order}
    allocation = allocate_labels([per_class] * classes, per_class=per_class)
    np.testing.assert_array_equal(allocation.labels, arrays["labels_syn"])
    x = torch.tensor(arrays["feat_syn"], requires_grad=True)
    omega = torch.tensor(arrays["adj_logits"], requires_grad=True)
    used |= {"labels_syn", "feat_syn", "adj_logits"}
    used |= beginning(arrays, nodes, classes)
    # random graphs
    noise, relaxed = torch.tensor(arrays["noise_logit"]), {}
    for drawn in arrays["anneal_cnt"].tolist():
        relaxed[drawn] = relaxed_adjacency(omega, noise, anneal_temperature(drawn))
        close(relaxed[drawn], arrays[f"adj_relaxed_{drawn}"], f"adj_relaxed_{drawn}")
        used.add(f"adj_relaxed_{drawn}")
    np.testing.assert_array_equal(discrete_adjacency(omega.detach()), arrays["adj_infer"])
    used.add("adj_infer")
    adjacency = relaxed_adjacency(omega, noise, anneal_temperature(int(arrays["cnt_used"])))
    # each class's gradients
    graphs = real_graphs(features)
    distances: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
    for c, (first, last) in enumerate(allocation.ranges):
        names = {side: [f"{side}_grad_{c}/{name}" for name in order] for side in ("real", "syn")}
        real = [torch.tensor(arrays[name]) for name in names["real"]]
        if graphs is not None:
            rows = torch.tensor(arrays[f"real_ids_{c}"])
            batch = graphs.take(rows)
            embedding = network.embed_sparse(batch.x, batch.edge_index, batch.batch)
            answers(arrays, network, embedding, f"real_{{}}_{c}", c)
            real = real_gradient(network, graphs, rows)
            gradient_close(real, arrays, names["real"])
        answers(arrays, network, network.embed_dense(x[first:last], adjacency[first:last]), f"syn_{{}}_{c}", c)
        synthetic = synthetic_gradient(network, x[first:last], adjacency[first:last], allocation.labels[first:last])
        gradient_close(synthetic, arrays, names["syn"])
        for metric in METRICS:
            distances[metric].append(graph_distance(synthetic, real, metric))
            close(distances[metric][-1], arrays[f"match_{metric}_{c}"], f"match_{metric}_{c}")
        used |= {*names["real"], *names["syn"], f"real_ids_{c}", *(f"match_{metric}_{c}" for metric in METRICS)}
        used |= {f"{side}_{what}_{c}" for side in ("real", "syn") for what in ("logp", "embed", "loss")}
    # regularisers
    sparsity = float(arrays["sparsity"])
    close(sparsity_penalty(omega, sparsity), arrays["loss_reg"], "loss_reg")
    over = sparsity_penalty(omega, sparsity / 2)
    close(over, arrays["loss_reg_half"], "loss_reg_half")
    bound = bound_term(x, adjacency, classes, depth, pooling)
    close(bound, arrays["bound_second"], "bound_second")
    close(bound / (0.15 * (classes - 1) / classes / len(x)), arrays["akx"], "akx")
    close(BOUND_WEIGHT, arrays["bound_term_weight"], "bound_term_weight")
    used |= {"sparsity", "loss_reg", "loss_reg_half", "bound_second", "akx", "bound_term_weight"}
    # the whole loss, its gradients, one step
    for metric in METRICS:
        total = torch.stack(distances[metric]).sum() + float(arrays["beta"]) * over
        close(total, arrays[f"total_{metric}"], f"total_{metric}")
        found = torch.autograd.grad(total, [omega, x], retain_graph=True)
        for gradient, name in zip(found, (f"grad_adj_{metric}", f"grad_feat_{metric}"), strict=True):
            gradient_close([gradient], arrays, [name])
        used |= {f"total_{metric}", f"grad_adj_{metric}", f"grad_feat_{metric}"}
        if metric == "mse":
            step(arrays, omega, x, found)
    return used | {"adj_logits_after_step", "feat_syn_after_step"} | allocations(arrays)


def answers(arrays: Arrays, network: GraphClassifier, embedding: Tensor, name: str, c: int) -> None:
    """Log-probabilities, pooled vectors and loss of graphs of class c; ``name`` has a place for what it is."""
    logits = network.head(embedding)
    close(embedding, arrays[name.format("embed")], name.format("embed"))
    close(log_softmax(logits, dim=1), arrays[name.format("logp")], name.format("logp"))
    loss = cross_entropy(logits, torch.full((len(logits),), c))
    close(loss, arrays[name.format("loss")], name.format("loss"))


def beginning(arrays: Arrays, nodes: int, classes: int) -> set[str]:
    """The real graphs begun with, padded."""
    names = [f"init_ids_{c}" for c in range(classes)]
    graphs = real_graphs(int(arrays["cfg"][0]))
    if graphs is not None:
        x, adjacency = padded(graphs, torch.tensor(np.concatenate([arrays[name] for name in names])), nodes)
        np.testing.assert_array_equal(x, arrays["init_feat"])
        np.testing.assert_array_equal(adjacency, arrays["init_adj"])
        close(adjacency.mean(), arrays["sparsity"], "sparsity")
        logits = EDGE_LOGIT * (2 * adjacency - 1)
        np.testing.assert_array_equal(discrete_adjacency(logits), arrays["init_adj"])
    return {*names, "init_feat", "init_adj"}


def step(arrays: Arrays, omega: Tensor, x: Tensor, gradients: Sequence[Tensor]) -> None:
    """Adam's first step. It moves each entry by the learning rate, but for gradients next to Adam's 1e-8, where
    rounding decides how far; and those may not move further."""
    names = ("adj_logits_after_step", "feat_syn_after_step"), ("lr_adj", "lr_feat"), ("grad_adj_mse", "grad_feat_mse")
    for start, gradient, after, lr_name, stored in zip((omega, x), gradients, *names, strict=True):
        rate = float(arrays[lr_name])
        moved = start.detach().clone().requires_grad_()
        moved.grad = gradient
        torch.optim.Adam([moved], lr=rate).step()
        size = np.abs(arrays[stored])
        sure = size > max(1e-4 * float(size.max()), 1e-6)
        assert sure.any(), f"{after}: no entry has a gradient"
        np.testing.assert_allclose(moved.detach().numpy()[sure], arrays[after][sure], rtol=1e-4, atol=1e-5)
        assert np.abs(moved.detach().numpy() - arrays[after]).max() <= 2 * rate * 1.001, after


def allocations(arrays: Arrays) -> set[str]:
    used = set()
    for name in [name for name in arrays if re.fullmatch(r"alloc_\d+_counts", name)]:
        prefix = name.removesuffix("counts")
        found = allocate_labels(arrays[name].tolist(), rate=float(arrays[f"{prefix}rate"]))
        np.testing.assert_array_equal(found.labels, arrays[f"{prefix}labels"], err_msg=name)
        np.testing.assert_array_equal(np.array(found.ranges), arrays[f"{prefix}ranges"], err_msg=name)
        used |= {name, *(f"{prefix}{part}" for part in ("rate", "labels", "ranges"))}
    return used


# --- nodes of one graph


def node_graphs(arrays: Arrays) -> set[str]:
    x, labels = torch.tensor(arrays["features"]), torch.tensor(arrays["labels"])
    train, synthetic_labels = torch.tensor(arrays["idx_train"]), torch.tensor(arrays["labels_syn"])
    used = {"features", "labels", "idx_train", "labels_syn", "feat_syn", "adj", "adj_norm"}
    target, source = torch.tensor(arrays["adj"]).nonzero().unbind(1)
    sparse = normalised_sparse(torch.stack([source, target]), len(x))
    close(sparse.to_dense(), arrays["adj_norm"], "adj_norm, sparse")
    close(normalised_adjacency(torch.tensor(arrays["adj"]).float()), arrays["adj_norm"], "adj_norm, dense")
    counts = torch.bincount(synthetic_labels)
    classes = len(counts)
    # the generator
    state = below(arrays, "pge/")
    unused = {name for name in state if ".running_" in name or name.endswith("num_batches_tracked")}
    for name in unused:
        assert (state[name] == float(name.endswith("var"))).all(), f"{name} was used"
    generator = PairwiseGenerator(x.shape[1], len(state["layers.0.bias"]))
    generator.load_state_dict({name: value for name, value in state.items() if name not in unused})
    order = [name for name, _ in generator.named_parameters()]
    stored = arrays["pge_param_order"].tolist()
    assert sorted(stored) == sorted(order)
    made = torch.tensor(arrays["feat_syn"], requires_grad=True)
    adjacency = generator.eval()(made)  # batch statistics at inference, too
    close(adjacency, arrays["adj_syn"], "adj_syn")
    close(generator.train()(made), arrays["adj_syn"], "adj_syn in training")
    normalised = normalised_adjacency(adjacency)
    close(normalised, arrays["adj_syn_norm"], "adj_syn_norm")
    close(smoothness(adjacency, synthetic_labels, classes), arrays["smooth_reg"], "smooth_reg")
    used |= {f"pge/{name}" for name in state} | {"pge_param_order", "adj_syn", "adj_syn_norm", "smooth_reg"}
    # the networks
    ends = torch.cat([torch.tensor([0]), counts.cumsum(0)]).tolist()
    np.testing.assert_array_equal(synthetic_labels, torch.arange(classes).repeat_interleave(counts))
    allocation = LabelAllocation(synthetic_labels, tuple(pairwise(ends)))
    weights = class_weights(allocation)
    kinds = sorted({name.removesuffix("_param_order") for name in arrays if name.endswith("_param_order")} - {"pge"})
    assert kinds, "no network"
    for kind in kinds:
        network, names = node_network(arrays, kind)
        used |= {f"{kind}_param_order", *(f"{kind}/{name}" for name in names)}
        used |= {f"{kind}_logp_real", f"{kind}_logp_syn"}
        close(log_softmax(network(x, sparse), dim=1), arrays[f"{kind}_logp_real"], f"{kind}_logp_real")
        logits = network(made, normalised)
        close(log_softmax(logits, dim=1), arrays[f"{kind}_logp_syn"], f"{kind}_logp_syn")
        parameters = list(network.parameters())
        totals: dict[str, Any] = dict.fromkeys(METRICS, 0.0)
        for c, (first, last) in enumerate(allocation.ranges):
            members = train[labels[train] == c]
            mine = cross_entropy(logits[first:last], synthetic_labels[first:last])
            close(mine, arrays[f"{kind}_loss_syn_{c}"], f"{kind}_loss_syn_{c}")
            synthetic = torch.autograd.grad(mine, parameters, create_graph=True)
            loss, real = real_side(network, x, sparse, members, c)
            close(loss, arrays[f"{kind}_loss_real_{c}"], f"{kind}_loss_real_{c}")
            used |= {f"{kind}_loss_{side}_{c}" for side in ("real", "syn")}
            for side, gradient in (("syn", synthetic), ("real", real)):
                keys = [f"{kind}_grad_{side}_{c}/{name}" for name in names]
                gradient_close([across(g) for g in gradient], arrays, keys)
                used |= set(keys)
            for metric in METRICS:
                distance = node_distance(synthetic, real, metric)
                close(distance, arrays[f"{kind}_match_{metric}_{c}"], f"{kind}_match_{metric}_{c}")
                totals[metric] = totals[metric] + weights[c] * distance
                used.add(f"{kind}_match_{metric}_{c}")
        for metric, total in totals.items():
            close(total, arrays[f"{kind}_total_{metric}"], f"{kind}_total_{metric}")
            found = torch.autograd.grad(total, [made, *generator.parameters()], retain_graph=True)
            gradient_close(found[:1], arrays, [f"{kind}_gradfeat_{metric}"])
            keys = [f"{kind}_gradpge_{metric}/{name}" for name in order]
            gradient_close(found[1:], arrays, keys)
            used |= {f"{kind}_total_{metric}", f"{kind}_gradfeat_{metric}", *keys}
    return used


def across(parameter: Tensor) -> Tensor:
    """A weight (in, out) of the file as ours, (out, in), or back; a bias as it is."""
    return parameter.mT if parameter.ndim == 2 else parameter


def node_network(arrays: Arrays, kind: str) -> tuple[AdjacencyGCN | AdjacencySGC, list[str]]:
    """(the network with the file's weights, the file's names of its parameters in our order)."""
    state = below(arrays, f"{kind}/")
    stored = arrays[f"{kind}_param_order"].tolist()
    assert sorted(stored) == sorted(state)
    if kind == "gcn":
        depth = sum(name.endswith("weight") for name in state)
        last = state[f"layers.{depth - 1}.weight"]
        hidden = last.shape[0] if depth > 1 else 1
        network: Any = AdjacencyGCN(len(state["layers.0.weight"]), last.shape[1], hidden, depth)
        names = [name for name, _ in network.named_parameters()]
    else:
        assert kind == "sgc", f"unknown network {kind!r}"
        network = AdjacencySGC(*state["conv.weight"].shape)
        names = [name.replace("layers.0", "conv") for name, _ in network.named_parameters()]
    ours = [name for name, _ in network.named_parameters()]
    network.load_state_dict({mine: across(state[theirs]) for mine, theirs in zip(ours, names, strict=True)})
    return network, names


def real_side(
    network: AdjacencyGCN | AdjacencySGC, x: Tensor, adjacency: Tensor, members: Tensor, c: int
) -> tuple[Tensor, Sequence[Tensor]]:
    """Loss and gradient on nodes of class c, from their neighbourhood alone, as the condenser computes them."""
    for _ in range(network.linear_hops):
        x = torch.sparse.mm(adjacency, x)
    entering, blocks = receptive_blocks(adjacency, members, sum(network.hops) - network.linear_hops)
    logits = network(x[entering], [*[None] * network.linear_hops, *blocks])
    loss = cross_entropy(logits, torch.full((len(members),), c))
    return loss, torch.autograd.grad(loss, list(network.parameters()))


GROUPS: dict[str, Callable[[Arrays], set[str]]] = {"adj_logits": graph_sets, "adj_syn": node_graphs}
