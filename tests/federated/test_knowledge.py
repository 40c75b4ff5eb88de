"""Knowledge of tasks: which weights stay, what it weighs, the way to a file and back; PackNet's owners."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparing import InvalidValue
from sparing.federated.knowledge import (
    KnowledgeExtractor,
    PackNet,
    TaskKnowledge,
    packed,
    packnet_mask,
    prunable,
    top_share,
    unpacked,
)

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + 2
LOADER = [(X[:12], Y[:12]), (X[12:], Y[12:])]
BLOCK = range(2, 4)


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 6))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)


def test_ties_are_kept_and_at_least_one_weight():
    masks, threshold, count = top_share({"a": torch.tensor([3.0, -2.0, 2.0, 1.0])}, 0.5)
    assert (masks["a"].tolist(), threshold, count) == ([True, True, True, False], 2.0, 2)
    assert top_share({"a": torch.tensor([3.0, 1.0])}, 0.01)[2] == 1


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_are_refused(rho: float):
    for function in (KnowledgeExtractor, lambda rho: PackNet(net(), rho), lambda rho: top_share({"a": X}, rho)):
        with pytest.raises(InvalidValue, match=r"above 0 and at most 1|rho = nan; a finite number"):
            function(rho)


def test_an_extractors_fields_are_checked():
    for fields, told in (
        ({"finetune_epochs": 1.5}, "finetune_epochs = 1.5; a whole number"),
        ({"finetune_epochs": -1}, "finetune_epochs = -1; 0 or more"),
        ({"rho": "much"}, "rho = 'much'; a finite number"),
        ({"numbers": "int4"}, "numbers = 'int4'; one of float32, float16, int8"),
    ):
        with pytest.raises(InvalidValue, match=told):
            KnowledgeExtractor(**fields)


def test_extraction_leaves_the_model_and_only_kept_weights_differ_from_zero():
    model = net(norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    knowledge = KnowledgeExtractor(0.25, finetune_epochs=3).extract(model, LOADER, BLOCK, 7, sgd)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made = knowledge.materialize(model)
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    masks, _, count = top_share({name: before[name] for name in prunable(model)}, 0.25)
    kept = 0
    for name, mask in masks.items():
        weight = made.state_dict()[name]
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], before[name][mask]), "these were trained on"
        kept += int(mask.sum())
    assert kept == count == sum(len(values) for values in knowledge.values.values())
    assert (knowledge.task, knowledge.classes) == (7, BLOCK)
    assert set(knowledge.whole) == set(before) - set(masks)
    assert knowledge.nbytes == 8 * kept + sum(tensor.nbytes for tensor in knowledge.whole.values())


def test_a_little_training_helps():
    def loss(epochs: int) -> float:
        made = KnowledgeExtractor(0.2, epochs).extract(net(), LOADER, BLOCK, 0, sgd).materialize(net())
        return float(nn.functional.cross_entropy(made(X)[:, 2:4], Y - 2))

    assert loss(8) < loss(0)


def test_probabilities_teach_as_classes_do_and_others_as_the_smoothed_loss_has_it():
    def kept(y: Tensor) -> dict[str, Tensor]:
        return KnowledgeExtractor(0.3, 1).extract(net(), [(X, y)], BLOCK, 0, sgd).state(net().state_dict())

    sure, hard = nn.functional.one_hot(Y, 6).float(), kept(Y)
    for name, weight in kept(sure).items():
        torch.testing.assert_close(weight, hard[name])
    assert not torch.allclose(kept(0.7 * sure + 0.3 * sure.flip(0))["0.bias"], hard["0.bias"])
    with pytest.raises(InvalidValue, match=r"probabilities of shape \(24, 2\); \(24, 6\), of all classes"):
        kept(sure[:, 2:4])
    with pytest.raises(InvalidValue, match=r"class 2 in the data of a task of range\(3, 5\)"):
        KnowledgeExtractor(0.3, 1).extract(net(), [(X, Y.clamp(max=2))], range(3, 5))


def test_knowledge_travels_as_tensors(tmp_path: Path):
    knowledge = KnowledgeExtractor(0.3).extract(net(norm=True), LOADER, BLOCK, 2)
    save_file(knowledge.to_records(), tmp_path / "knowledge.safetensors")
    read = TaskKnowledge.from_records(load_file(tmp_path / "knowledge.safetensors"))
    assert (read.task, read.classes, read.nbytes) == (2, BLOCK, knowledge.nbytes)
    state = net(norm=True).state_dict()
    assert all(
        torch.equal(a, b) for a, b in zip(read.state(state).values(), knowledge.state(state).values(), strict=True)
    )
    with pytest.raises(InvalidValue, match="'odd' is no part"):
        TaskKnowledge.from_records(knowledge.to_records() | {"odd": X})
    with pytest.raises(InvalidValue, match="as many values as indices"):
        TaskKnowledge.from_records({"values/a": X})
    name = "indices/0.weight"
    with pytest.raises(InvalidValue, match=r"0\.weight: values of shape \(\d+,\) and torch.int32 indices of \(1,\)"):
        TaskKnowledge.from_records(knowledge.to_records() | {name: torch.tensor([0], dtype=torch.int32)})
    turned = TaskKnowledge.from_records(knowledge.to_records() | {name: -knowledge.indices["0.weight"] - 1})
    with pytest.raises(InvalidValue, match="another model"):
        turned.materialize(net(norm=True))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"about": torch.tensor([0, 4, 4])}, r"about = \[0, 4, 4\]"),
        ({"about": torch.tensor([0, -1, 4])}, r"about = \[0, -1, 4\]"),
        ({"about": torch.tensor([-1, 2, 4])}, r"about = \[-1, 2, 4\]"),
        ({"about": torch.tensor([0, 2])}, r"about = \[0, 2\]"),
        ({"about": torch.tensor([[0, 2, 4]])}, r"about = \[\[0, 2, 4\]\]"),
        ({"about": torch.tensor([0.0, 2.0, 4.5])}, r"about = .* \(torch.float32\)"),
        ({"scales/odd": torch.tensor(1.0)}, "odd: a scale, and no values"),
        ({"scales/0.weight": None}, r"0\.weight: 2 torch.int8 values without a scale"),
        ({"values/0.weight": torch.ones(2)}, r"0\.weight: 2 torch.float32 values with a scale"),
        ({"scales/0.weight": torch.ones(2)}, r"0\.weight: torch.float32 scale of shape \(2,\)"),
        ({"scales/2.weight": torch.tensor(1.0)}, r"2\.weight: 0 torch.int8 values with a scale"),
        ({"whole/0.weight": torch.ones(8, 6)}, r"0\.weight: whole, and a few values as well"),
    ],
)
def test_records_that_contradict_themselves_are_refused(changed: dict[str, Tensor | None], told: str):
    masks = {name: torch.zeros_like(net().state_dict()[name], dtype=torch.bool) for name in ("0.weight", "2.weight")}
    masks["0.weight"][0, :2] = True  # and nothing of the other
    records = TaskKnowledge.of(net().state_dict(), masks, 0, BLOCK).quantized("int8").to_records()
    TaskKnowledge.from_records(records)
    with pytest.raises(InvalidValue, match=told):
        TaskKnowledge.from_records({name: t for name, t in (records | changed).items() if t is not None})


@pytest.mark.parametrize(("numbers", "bytes_", "apart"), [("float16", 2, 1e-3), ("int8", 1, 6e-3)])
def test_fewer_bits_answer_nearly_the_same(numbers, bytes_, apart):
    full = KnowledgeExtractor(0.5).extract(net(), LOADER, BLOCK)
    small = full.quantized(numbers)
    values = sum(len(each) for each in full.values.values())
    assert full.nbytes - small.nbytes == values * (4 - bytes_) - 4 * len(small.scales)
    for name, weight in full.state(net().state_dict()).items():
        found = small.state(net().state_dict())[name]
        assert found.dtype == weight.dtype
        assert (found - weight).abs().max() <= apart * weight.abs().max()
    read = TaskKnowledge.from_records(small.to_records())
    assert torch.equal(read.materialize(net())(X), small.materialize(net())(X))
    assert KnowledgeExtractor(0.5, numbers=numbers).extract(net(), LOADER, BLOCK).nbytes == small.nbytes
    if numbers == "int8":
        with pytest.raises(InvalidValue, match="int8 already"):
            small.quantized("float16")
    with pytest.raises(InvalidValue, match="numbers = 'int4'"):
        full.quantized("int4")  # type: ignore[arg-type]


def test_knowledge_of_another_model_is_refused():
    knowledge = KnowledgeExtractor(1.0).extract(net(), LOADER, BLOCK)
    with pytest.raises(InvalidValue, match="another model"):
        knowledge.materialize(net(norm=True))
    with pytest.raises(InvalidValue, match=r"another model: 0\.weight has 24 weights there"):
        knowledge.materialize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)))


def test_a_model_without_a_matrix_has_nothing_to_keep():
    with pytest.raises(InvalidValue, match="two dimensions"):
        KnowledgeExtractor(0.1).extract(nn.BatchNorm1d(3), [], BLOCK)
    with pytest.raises(InvalidValue, match="two dimensions"):
        PackNet(nn.BatchNorm1d(3))


# --- PackNet


def test_the_cutoff_is_among_the_free_weights_of_all_tensors_together():
    weights = {"a": torch.tensor([5.0, -4.0, 3.0]), "b": torch.tensor([2.0, 1.0, 9.0])}
    owned = {"a": torch.tensor([True, False, False]), "b": torch.tensor([False, False, True])}
    taken = packnet_mask(weights, owned, 0.5)  # of 4, 3, 2, 1: at least 2.5
    assert taken["a"].tolist() == [False, True, True]
    assert taken["b"].tolist() == [False, False, False]
    with pytest.raises(InvalidValue, match="no weight is free"):
        packnet_mask({"a": X}, {"a": torch.ones_like(X, dtype=torch.bool)}, 0.5)


@pytest.mark.parametrize("shape", [(3, 5), (8,), (2, 2, 2, 2), (1, 1)])
def test_masks_are_kept_as_bits(shape: tuple[int, ...]):
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert bits.nbytes == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape), mask)
    with pytest.raises(InvalidValue, match="bits of a mask"):
        unpacked(bits, (*shape, 9))


def test_a_quantile_that_falls_on_a_weight_keeps_that_weight():
    weights = {"a": torch.arange(1.0, 112.0)}  # 0.9 · 110 is a little more than 99 in floating-point numbers
    assert int(packnet_mask(weights, {"a": torch.zeros(111, dtype=torch.bool)}, 0.1)["a"].sum()) == 12


def test_earlier_tasks_answer_as_they_did_whatever_comes_later():
    pack = PackNet(net(norm=True), 0.3)
    answers: list[Tensor] = []
    for task in range(3):
        pack.train(LOADER, BLOCK, 2, sgd)
        pack.prune(last=task == 2)
        pack.finetune(LOADER, BLOCK, 2, sgd)
        answers.append(pack.knowledge(task, BLOCK).materialize(net(norm=True))(X))
    for task in range(3):
        assert torch.equal(pack.knowledge(task, BLOCK).materialize(net(norm=True))(X), answers[task])
    assert all(mask.all() for mask in pack.owned.values()), "the last takes all"
    for one in range(3):
        for other in range(one):
            assert not any((pack.masks[one][name] & pack.masks[other][name]).any() for name in pack.names)
    with pytest.raises(InvalidValue, match="3 tasks have been pruned for"):
        pack.knowledge(3, BLOCK)
