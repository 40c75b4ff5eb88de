"""RELIANT: fairness losses, alternating steps, frameworks and the distiller around them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.utils import add_self_loops, to_undirected

from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.fairness import delta_eo, delta_sp
from sparing.distillation.fairness import (
    equal_opportunity_loss,
    members,
    parity_gap,
    soft_step,
    statistical_parity_loss,
)
from sparing.distillation.frameworks import CPF, GLNN, GraphAKD, SoftKD, StudentOutputs, TeacherOutputs
from sparing.distillation.reliant import BiasProxy, FairDistiller, alternating_step
from sparing.models.gnn import GAT, GCN, GraphSAGE
from sparing.models.gnn_students import CPFStudent, GLNNStudent, SGCStudent, with_columns

N = 240


def people() -> Data:
    """Nodes whose label depends on merit, and a little on a group that a feature tells."""
    draw = torch.Generator().manual_seed(0)
    sens = (torch.rand(N, generator=draw) < 0.4).long()
    merit = torch.randn(N, generator=draw)
    y = (merit + 1.2 * sens + 0.4 * torch.randn(N, generator=draw) > 0.5).long()
    x = torch.stack([merit, sens + 0.1 * torch.randn(N, generator=draw), torch.randn(N, generator=draw)], 1)
    pairs = torch.randint(N, (2, 600), generator=draw)
    pairs = pairs[:, (sens[pairs[0]] == sens[pairs[1]]) & (pairs[0] != pairs[1])]
    part = torch.arange(N) % 4
    return Data(
        x=x,
        edge_index=add_self_loops(to_undirected(pairs, num_nodes=N), num_nodes=N)[0],
        y=y,
        sens=sens,
        train_mask=part < 2,
        val_mask=part == 2,
        test_mask=part == 3,
    )


@pytest.fixture(scope="module")
def taught() -> tuple[Data, TeacherOutputs]:
    data = people()
    torch.manual_seed(0)
    teacher = GCN(3, 2, hidden=8, dropout=0)
    optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            teacher(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask]
        ).backward()
        optimizer.step()
    return data, TeacherOutputs.of(teacher, data)


def pupil(proxy: int = 2, **fields) -> GLNNStudent:
    torch.manual_seed(1)
    return GLNNStudent(3 + proxy, 2, hidden=8, hops=1, proxy_dim=proxy, **fields)


# --- losses


def test_soft_steps_meet_in_the_middle_and_end_where_they_say():
    p = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert soft_step(p).tolist() == pytest.approx([0.0742, 0.5, 0.9258], abs=5e-5)
    assert soft_step(p, "legendre").tolist() == pytest.approx([-0.123, 0.5, 1.123], abs=5e-4)
    assert soft_step(p, "sigmoid").tolist() == pytest.approx([0.0067, 0.5, 0.9933], abs=5e-5)
    with pytest.raises(InvalidValue, match="step = 'hard'; \"reference\""):
        soft_step(p, "hard")  # type: ignore[arg-type]


def test_the_true_expansion_is_the_nearest_polynomial_to_the_step():
    nodes, weights = np.polynomial.legendre.leggauss(400)
    p, target = (nodes + 1) / 2, (nodes > 0).astype(float)
    errors = {
        kind: float((weights * (soft_step(torch.tensor(p), kind).numpy() - target) ** 2).sum())
        for kind in ("legendre", "reference")
    }
    fitted = np.polynomial.legendre.legval(nodes, np.polynomial.legendre.legfit(nodes, target, 9, w=weights**0.5))
    best = float((weights * (fitted - target) ** 2).sum())
    assert errors["legendre"] == pytest.approx(best, rel=1e-3)
    assert errors["reference"] > 1.2 * best


@given(st.integers(0, 10_000))
def test_parity_asks_nothing_of_equal_groups_and_does_not_mind_their_order(seed: int):
    draw = torch.Generator().manual_seed(seed)
    prob = torch.rand(12, 3, generator=draw).softmax(1)
    sens = torch.tensor([0, 1] * 6)
    loss = statistical_parity_loss(prob, sens)
    assert loss >= 0
    torch.testing.assert_close(loss, statistical_parity_loss(prob, 1 - sens))
    order = torch.randperm(12, generator=draw)
    torch.testing.assert_close(loss, statistical_parity_loss(prob[order], sens[order]))
    assert statistical_parity_loss(prob[:1].repeat(12, 1), sens) == 0


def test_both_columns_count():
    p = torch.tensor([0.9, 0.8, 0.3, 0.2])
    prob, sens = torch.stack([1 - p, p], 1), torch.tensor([0, 0, 1, 1])
    one = (soft_step(p)[:2].mean() - soft_step(p)[2:].mean()) ** 2
    torch.testing.assert_close(statistical_parity_loss(prob, sens), 2 * one)


def test_opportunity_is_parity_among_the_positive():
    draw = torch.Generator().manual_seed(0)
    prob = torch.rand(20, 2, generator=draw).softmax(1)
    sens, labels = torch.arange(20) % 2, torch.arange(20) // 2 % 2
    index = torch.arange(12)
    found = equal_opportunity_loss(prob, sens, labels, index)
    torch.testing.assert_close(found, statistical_parity_loss(prob, sens, index[labels[index] == 1]))
    mask = torch.zeros(20, dtype=torch.bool)
    mask[index] = True
    torch.testing.assert_close(found, equal_opportunity_loss(prob, sens, labels + 4, mask, positive=5))


def test_other_groups_stay_out():
    prob = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    sens = torch.tensor([4, 7, 4, 7, 4, 7, 5, 5, 5])
    found = statistical_parity_loss(prob, sens, groups=(4, 7))
    torch.testing.assert_close(found, statistical_parity_loss(prob[:6], torch.tensor([0, 1] * 3)))
    with pytest.raises(InvalidValue, match=r"values \[4, 5, 7\]; 0 and 1"):
        statistical_parity_loss(prob, sens)


def test_an_empty_group_is_refused_not_divided_by():
    prob, sens = torch.full((6, 2), 0.5), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(InvalidValue, match="the group 1 of the sensitive attribute has no node among the 2"):
        statistical_parity_loss(prob, sens, torch.tensor([0, 1]))
    with pytest.raises(InvalidValue, match=r"the group 0 .* has no node of the positive class among the 6"):
        equal_opportunity_loss(prob, sens, torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(InvalidValue, match="a mask of 5 nodes"):
        members(sens, torch.ones(5, dtype=torch.bool))


# --- one epoch


def test_a_step_of_one_leaves_the_other_alone(taught):
    data, _ = taught
    student, proxy = pupil(), BiasProxy(N)
    first, second = members(data.sens, data.train_mask)
    before = copy.deepcopy(student.state_dict())
    rows = proxy.full().detach().clone()
    seen = []

    def answer(columns):
        seen.append(columns.detach().clone())
        if len(seen) == 2:
            seen.append(copy.deepcopy(student.state_dict()))
        return StudentOutputs(student(with_columns(data.x, columns), data.edge_index))

    optimizers = [torch.optim.SGD(part.parameters(), 0.5) for part in (student, proxy)]
    losses = alternating_step(
        answer,
        proxy,
        lambda outputs: torch.nn.functional.cross_entropy(outputs.logits, data.y),
        lambda prob: parity_gap(prob, first, second),
        5.0,
        *optimizers,
    )
    mean, own, at_proxy_step = seen
    assert torch.equal(mean, rows.mean(0))  # one row for all
    assert torch.equal(own, rows)
    assert any(not torch.equal(before[name], value) for name, value in at_proxy_step.items())
    for name, value in student.state_dict().items():  # the proxy's step moved no weight of the student
        assert torch.equal(value, at_proxy_step[name])
    assert all(p.grad is None or not p.grad.any() for p in proxy.parameters())
    assert losses.student_fairness >= 0
    with torch.no_grad():
        later = parity_gap(answer(proxy.full()).logits.softmax(1), first, second)
    assert later > losses.proxy_fairness  # it climbs


def test_without_alpha_the_proxy_stands_still(taught):
    data, _ = taught
    student, proxy = pupil(), BiasProxy(N)
    rows = proxy.full().detach().clone()
    losses = alternating_step(
        lambda columns: StudentOutputs(student(with_columns(data.x, columns), data.edge_index)),
        proxy,
        lambda outputs: outputs.logits.square().mean(),
        lambda prob: pytest.fail("fairness was computed"),
        0.0,
        torch.optim.SGD(student.parameters(), 0.1),
        torch.optim.SGD(proxy.parameters(), 0.1),
    )
    assert torch.equal(proxy.full(), rows)
    assert np.isnan(losses.student_fairness)
    assert np.isnan(losses.proxy_fairness)


def test_a_proxy_is_uniform_and_its_generators():
    one, other = (BiasProxy(500, 3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.full(), other.full())
    assert one.full().shape == (500, 3)
    assert 0 <= one.full().min().item() <= one.full().max().item() <= 1
    assert one.mean().tolist() == pytest.approx([0.5] * 3, abs=0.06)


# --- the distiller


def distilled(taught, student=None, framework=None, **settings) -> FairDistiller:
    data, teacher = taught
    settings = {"epochs": 60, "lr": 0.02} | settings
    proxy = 2 if settings.get("proxy", True) else 0
    return FairDistiller(student or pupil(proxy), teacher, framework or SoftKD(), **settings).fit(data)


@pytest.mark.parametrize(("metric", "gap"), [("sp", "delta_sp"), ("eo", "delta_eo")])
def test_the_gap_falls_beside_plain_distillation(taught, metric, gap):
    data, _ = taught
    plain = distilled(taught, proxy=False, alpha=0.0).report(data)
    fair = distilled(taught, alpha=30.0, metric=metric, fair_nodes="all").report(data)
    assert plain["student"]["accuracy"] > 0.7
    assert fair["student"][gap] < 0.5 * plain["student"][gap]
    assert fair["student"]["accuracy"] > 0.55
    assert fair["teacher"] == plain["teacher"]


def test_the_report_is_of_the_test_nodes(taught):
    data, teacher = taught
    found = distilled(taught, alpha=1.0)
    test, predicted = data.test_mask, found.predict(data)
    row = found.report(data)["student"]
    assert row["accuracy"] == pytest.approx(float((predicted == data.y)[test].float().mean()))
    assert row["delta_sp"] == delta_sp(predicted[test].numpy(), data.sens[test].numpy())
    assert row["delta_eo"] == delta_eo(predicted[test].numpy(), data.y[test].numpy(), data.sens[test].numpy())
    assert row["parameters"] == sum(p.numel() for p in found.student.parameters()) + 2
    assert row["latency_ms"] > 0
    assert found.report(data)["teacher"]["parameters"] == 3 * 8 + 8 + 8 * 2 + 2
    assert teacher.latency_ms > 0


FRAMEWORKS = {
    "cpf": (CPF(), lambda q: CPFStudent(3 + q, 2, N, 3, hidden=4)),
    "graphakd": (GraphAKD(), lambda q: SGCStudent(3 + q, 2, hidden=8)),
    "graphakd, strict": (GraphAKD(strict_reference=True), lambda q: SGCStudent(3 + q, 2, hidden=8)),
    "glnn": (GLNN(lam=0.5), lambda q: GLNNStudent(3 + q, 2, hidden=8, dropout=0.5)),
    "soft": (SoftKD(temperature=2), lambda q: GCN(3 + q, 2, hidden=8)),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("proxy", [True, False])
def test_every_framework_distils_with_and_without_a_proxy(taught, name, proxy):
    data, teacher = taught
    framework, make = FRAMEWORKS[name]
    torch.manual_seed(0)
    student, state = make(2 if proxy else 0), torch.get_rng_state()
    adversarial = isinstance(framework, GraphAKD)  # the student has a tenth of the learning rate
    lr = 0.2 if adversarial else 0.05
    found = distilled(taught, student, framework, proxy=proxy, epochs=40, lr=lr)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.alpha == framework.alpha
    assert len(found.history_) == 40
    if not adversarial:  # discriminators that learn, too, may raise it
        assert found.history_[-1].distillation < found.history_[0].distillation
    assert (found.proxy_ is None) == (not proxy)
    agree = (found.predict(data) == teacher.log_prob.argmax(1)).float().mean()
    assert agree > (0.6 if isinstance(framework, GLNN | SoftKD) else 0.5)  # a weight of 1000 asks CPF for much else
    scores = [score for _, score in found.validation_]
    if adversarial:  # a student that says the same of everybody may agree as often, but is no surer than its base rate
        share = data.y[data.val_mask].float().mean()
        assert max(scores) > -float(torch.distributions.Bernoulli(share).entropy()) + 0.01
    assert found.best_epoch_ == 1 + max(i for i, score in enumerate(scores) if score == max(scores))


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: GAT(3, 2, hidden=4, depth=2, heads=2),
        lambda: GraphSAGE(3, 2, hidden=8, depth=3),
        lambda: GraphSAGE(3, 2, hidden=8, aggregator="gcn"),
    ],
)
def test_teachers_of_other_kinds_teach(taught, teacher):
    data, _ = taught
    torch.manual_seed(0)
    outputs = TeacherOutputs.of(teacher(), data)
    assert outputs.embedding.shape == (N, 8)
    found = distilled((data, outputs), SGCStudent(5, 2, hidden=8), GraphAKD(), epochs=3, alpha=1.0)
    assert found.predict(data).shape == (N,)
    soft = distilled((data, outputs), alpha=0.0, proxy=False, epochs=150, lr=0.05, framework=SoftKD(label_weight=0))
    assert soft.history_[-1].distillation < soft.history_[0].distillation
    assert (soft.log_prob(data).exp() - outputs.prob).abs().mean() < 0.05


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_fairness_moves_the_student_and_the_proxy_of_every_framework(taught, name):
    data, _ = taught
    framework, make = FRAMEWORKS[name]

    def fit(alpha: float) -> FairDistiller:
        torch.manual_seed(0)
        return distilled(taught, make(2), framework, alpha=alpha, epochs=5, validate_every=5)

    plain, fair = fit(0.0), fit(framework.alpha)
    rest = ~data.train_mask
    assert not torch.allclose(plain.log_prob(data)[rest], fair.log_prob(data)[rest], atol=1e-5)
    assert not torch.allclose(plain.full_proxy_, fair.full_proxy_, atol=1e-5)
    assert len({losses.student_fairness for losses in fair.history_}) == 5  # no constant


def test_a_student_that_answers_with_labels_is_made_fair_where_it_has_none(taught):
    data, teacher = taught
    assert FairDistiller(FRAMEWORKS["cpf"][1](2), teacher).fair_nodes == "unlabelled"
    assert FairDistiller(pupil(), teacher).fair_nodes == "train"
    asked = {"fair_nodes": "train", "epochs": 1}
    with pytest.raises(InvalidValue, match=r"answers training nodes with their labels.*'unlabelled'"):
        FairDistiller(FRAMEWORKS["cpf"][1](2), teacher, **asked).fit(data)
    FairDistiller(FRAMEWORKS["cpf"][1](2), teacher, alpha=0.0, **asked).fit(data)


def test_the_best_epochs_proxy_comes_with_its_weights(taught):
    data, _ = taught
    found = distilled(taught, alpha=5.0, epochs=30)
    again = distilled(taught, alpha=5.0, epochs=found.best_epoch_)
    assert again.best_epoch_ == found.best_epoch_
    assert torch.equal(again.proxy_, found.proxy_)
    assert torch.equal(again.full_proxy_, found.full_proxy_)
    assert torch.equal(again.log_prob(data), found.log_prob(data))
    assert torch.equal(found.proxy_, found.full_proxy_.mean(0))


def test_patience_ends_a_training(taught):
    found = distilled(taught, proxy=False, alpha=0.0, epochs=400, lr=0.5, patience=5)
    assert len(found.history_) == found.best_epoch_ + 5 < 400


def test_no_label_outside_the_training_nodes_is_learned_from(taught):
    data, teacher = taught
    other = data.clone()
    other.y = torch.where(data.train_mask | data.val_mask, data.y, 1 - data.y)
    for metric, nodes in (("sp", "unlabelled"), ("eo", "all"), ("eo", "unlabelled")):
        settings = {"alpha": 5.0, "metric": metric, "fair_nodes": nodes, "epochs": 5}
        one, two = (distilled((given, teacher), **settings) for given in (data, other))
        assert torch.equal(one.log_prob(data), two.log_prob(data))
        assert one.history_ == two.history_


def test_unseen_nodes_are_answered_by_the_proxys_mean(taught):
    data, _ = taught
    found = distilled(taught, alpha=5.0, epochs=5)
    larger = Data(x=torch.cat([data.x, data.x[:4]]), edge_index=data.edge_index)
    assert found.predict(larger).shape == (N + 4,)
    with torch.no_grad():
        expected = found.student.eval()(with_columns(data.x, found.proxy_), data.edge_index).log_softmax(1)
    assert torch.equal(found.log_prob(data), expected)


class Keeper:
    """Keeps states in memory and dies after so many."""

    def __init__(self, lives: int) -> None:
        self.state, self.lives = None, lives

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["cpf", "graphakd", "glnn"])
def test_a_killed_training_ends_with_the_same_bits(taught, name):
    data, teacher = taught
    framework, make = FRAMEWORKS[name]

    def start(keeper):
        torch.manual_seed(2)
        return FairDistiller(make(2), teacher, framework, epochs=9, alpha=3.0, seed=5).fit(data, keeper, keep_every=2)

    whole, keeper = start(None), Keeper(lives=2)
    with pytest.raises(KeyboardInterrupt):
        start(keeper)
    assert len(keeper.state["history"]) == 4
    assert "columns" in keeper.state["parts"]["proxy"]
    again = start(keeper)
    assert np.array_equal(np.array(again.history_), np.array(whole.history_))
    assert torch.equal(again.log_prob(data), whole.log_prob(data))
    assert torch.equal(again.full_proxy_, whole.full_proxy_)


def test_a_training_that_patience_ended_goes_on_to_the_same_bits(taught):
    data, teacher = taught
    keeper = Keeper(lives=1000)

    def end() -> FairDistiller:
        settings = {"proxy": False, "alpha": 0.0, "epochs": 400, "lr": 0.5, "patience": 5}
        return FairDistiller(pupil(0), teacher, SoftKD(), **settings).fit(data, keeper, keep_every=1)

    once, again = end(), end()
    assert len(once.history_) == once.best_epoch_ + 5 < 400
    assert again.validation_ == once.validation_
    assert torch.equal(again.log_prob(data), once.log_prob(data))


def test_patience_waits_for_a_first_validation(taught):
    found = distilled(taught, alpha=0.0, epochs=30, patience=3, validate_every=8)
    assert [epoch for epoch, _ in found.validation_] == [8]
    assert found.best_epoch_ == 8


def changed(data: Data, **more) -> Data:
    other = data.clone()
    for name, value in more.items():
        other[name] = value
    return other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, t: FairDistiller(pupil(), t, SoftKD(), -1.0), "alpha = -1.0; a finite number ≥ 0"),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD(), metric="dp"), "metric = 'dp'; one of sp, eo"),
        (lambda d, t: FairDistiller(pupil(), t, fair_nodes="test"), "fair_nodes = 'test'; one of None, train"),
        (lambda d, t: FairDistiller(pupil(), t, step="hard"), "step = 'hard'"),
        (lambda d, t: FairDistiller(pupil(), t, lr=0), "lr = 0; a finite number > 0"),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD(), proxy=BiasProxy(9)).fit(d), "for 9 nodes; the graph has 240"),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD(), positive=2).fit(d), "positive = 2; the teacher knows"),
        (
            lambda d, t: FairDistiller(pupil(), TeacherOutputs(t.log_prob[:9]), SoftKD()).fit(d),
            "the teacher answered for 9 nodes; the graph has 240",
        ),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD()).fit(changed(d, sens=d.sens + 1)), r"values \[1, 2\]"),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD()).fit(changed(d, sens=0 * d.sens)), "group 1 .* no node"),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD()).fit(changed(d, sens=None)), "no sensitive attribute"),
        (
            lambda d, t: FairDistiller(pupil(), t, SoftKD(), metric="eo").fit(changed(d, y=1 - d.sens)),
            "group 1 .* no node of the positive class",
        ),
        (lambda d, t: FairDistiller(pupil(), t, SoftKD()).fit(changed(d, val_mask=d.sens > 5)), "val_mask holds no"),
        (lambda d, t: FairDistiller(pupil(), t, GraphAKD()).fit(d), "GLNNStudent has no method 'embed'"),
        (
            lambda d, t: FairDistiller(SGCStudent(5, 2, 9), t, GraphAKD()).fit(d),
            r"embedding has shape \(240, 9\), the teacher's \(240, 8\)",
        ),
        (
            lambda d, t: FairDistiller(SGCStudent(5, 2, 8), TeacherOutputs(t.log_prob), GraphAKD()).fit(d),
            "give the teacher's",
        ),
        (
            lambda d, t: FairDistiller(GLNNStudent(5, 3), t, GLNN()).fit(d),
            r"outputs have shape \(240, 3\), the teacher's \(240, 2\)",
        ),
        (
            lambda d, t: FairDistiller(CPFStudent(5, 2, N), t).fit(
                changed(d, edge_index=d.edge_index[:, d.edge_index[1] != 3])
            ),
            "no edge leads to node 3",
        ),
        (lambda d, t: TeacherOutputs(t.log_prob.exp()), "probabilities of node 0 sum to"),
        (lambda d, t: TeacherOutputs(t.log_prob, t.embedding[:5]), "for 240 nodes"),
        (lambda d, t: FairDistiller(pupil(), t).fit(changed(d, sens=d.sens[:9])), r"sens has shape \(9,\); \(240,\)"),
        (lambda d, t: FairDistiller(pupil(), t).fit(changed(d, y=d.y[:9])), r"y has shape \(9,\); \(240,\)"),
        (
            lambda d, t: FairDistiller(pupil(), t).fit(changed(d, val_mask=d.train_mask)),
            "120 nodes, the first of them 0, are in train_mask and in val_mask",
        ),
        (
            lambda d, t: FairDistiller(pupil(), t).fit(changed(d, y=torch.where(torch.arange(N) == 4, 2, d.y))),
            "node 4 of train_mask has the label 2; the teacher knows the classes 0 … 1",
        ),
        (
            lambda d, t: FairDistiller(pupil(), t).fit(changed(d, y=torch.where(torch.arange(N) == 6, -1, d.y))),
            "node 6 of val_mask has the label -1",
        ),
        (lambda d, t: FairDistiller(pupil(), t, alpha=0, positive=2).fit(d), "positive = 2; the teacher knows"),
        (lambda d, t: FairDistiller(pupil(), t).predict(d), "not fitted yet: call fit.data. first"),
        (lambda d, t: with_columns(d.x, torch.zeros(9, 2)), "columns for 9 nodes behind the features of 240"),
        (lambda d, t: statistical_parity_loss(t.prob[:9], d.sens), "rows: prob 9, sens 240"),
        (lambda d, t: equal_opportunity_loss(t.prob, d.sens, d.y[:9]), "rows: prob 240, sens 240, labels 9"),
        (lambda d, t: members(d.sens, among=d.y[:9] == 1), "rows: sens 240, among 9"),
        (lambda d, t: statistical_parity_loss(t.prob, d.sens, torch.tensor([0, N])), "index names node 240; 0 … 239"),
        (lambda d, t: statistical_parity_loss(t.prob, d.sens, torch.tensor([-1])), "index names node -1"),
        *(
            (lambda d, t, a=a: alternating_step(None, None, None, None, a, None, None), f"alpha = {a}; a finite number")
            for a in (-1.0, float("nan"), float("inf"))
        ),
        (
            lambda d, t: FairDistiller(SGCStudent(5, 2, 8), TeacherOutputs.of(GCN(3, 2, depth=1), d), GraphAKD()).fit(
                d
            ),
            "give the teacher's",
        ),
        (lambda d, t: GLNN(lam=1.5), "lam = 1.5; 0 … 1"),
        (lambda d, t: SoftKD(temperature=0), "temperature = 0; a finite number > 0"),
        (lambda d, t: SoftKD(label_weight=-1), "label_weight = -1; a finite number ≥ 0"),
    ],
)
def test_what_cannot_be_distilled_is_refused(taught, make, message):
    with pytest.raises(InvalidValue, match=message):
        make(*taught)


def test_groups_of_other_values_are_named(taught):
    data, teacher = taught
    words = changed(data, sens=torch.where(torch.arange(N) % 10 == 0, 7, 3 + data.sens))
    found = distilled((words, teacher), alpha=5.0, groups=(3, 4), epochs=5)
    assert found.report(words)["student"]["delta_sp"] == delta_sp(
        found.predict(words)[data.test_mask].numpy(), words.sens[data.test_mask].numpy(), groups=(3, 4)
    )


def test_plain_distillation_needs_no_sensitive_attribute(taught):
    data, teacher = taught
    found = FairDistiller(pupil(0), teacher, GLNN(), alpha=0.0, proxy=False, epochs=3).fit(changed(data, sens=None))
    assert len(found.history_) == 3


def test_a_loss_that_is_no_number_is_told(taught):
    data, teacher = taught
    with pytest.raises(TrainingDiverged, match="the loss of epoch 1 is nan"):
        FairDistiller(pupil(), teacher, SoftKD(), epochs=3).fit(changed(data, x=data.x * float("nan")))
