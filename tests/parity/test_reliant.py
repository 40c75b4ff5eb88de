"""RELIANT beside its reference: losses, metrics, CPF and its alternating steps, GraphAKD, layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from by_kind import Arrays, close, compared, one_with, tensor
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

from sparing.core.fairness import delta_eo, delta_sp
from sparing.distillation.fairness import (
    equal_opportunity_loss,
    members,
    parity_gap,
    soft_step,
    statistical_parity_loss,
)
from sparing.distillation.frameworks import (
    CPF,
    Discriminators,
    GraphAKD,
    Lesson,
    StudentOutputs,
    TeacherOutputs,
    adversarial_terms,
    discriminator_terms,
    frobenius_distance,
    glnn_loss,
)
from sparing.distillation.reliant import BiasProxy, alternating_step
from sparing.models.gnn import GCN, GraphSAGE
from sparing.models.gnn_students import CPFStudent, propagated, with_columns


def edges(f: Arrays) -> Tensor:
    return torch.stack([tensor(f["src"]), tensor(f["dst"])]).long()


# --- one function for each kind of file; each returns the names of the arrays it used


def of_soft_step(f: Arrays) -> set[str]:
    for kind in ("reference", "legendre"):
        close(soft_step(tensor(f["s"]), kind), f[kind], kind, atol=1e-9)
    return {"s", "reference", "legendre"}


def of_losses(f: Arrays) -> set[str]:
    sens, labels, index = (tensor(f[name]) for name in ("sens", "labels", "idx"))
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "sp": lambda prob: statistical_parity_loss(prob, sens, index),
        "eo": lambda prob: equal_opportunity_loss(prob, sens, labels, index),
        "kd": lambda prob: frobenius_distance(prob, tensor(f["teacher_prob"]), index),
    }
    for name, loss in losses.items():
        logits = tensor(f["logits"]).requires_grad_()
        value = loss(softmax(logits, 1))
        value.backward()
        close(value, f[f"loss_{name}"], f"loss_{name}")
        close(logits.grad, f[f"grad_{name}"], f"grad_{name}")
    predicted = f["logits"].argmax(1)
    np.testing.assert_array_equal(predicted, f["pred"])
    close(delta_sp(predicted, f["sens"]), f["delta_sp"], "delta_sp", atol=1e-12)
    close(delta_eo(predicted, f["labels"], f["sens"]), f["delta_eo"], "delta_eo", atol=1e-12)
    return {"logits", "sens", "labels", "idx", "teacher_prob", "pred", "delta_sp", "delta_eo"} | {
        f"{kind}_{name}" for kind in ("loss", "grad") for name in losses
    }


def reference_names(student: CPFStudent) -> dict[str, nn.Parameter]:
    """The reference's name of each parameter."""
    found = {"plp_layer.fc_emb" if student.transductive else "plp_layer.attn_l": student.scores}
    if student.beta is not None:
        found["plp_layer.lr_alpha"] = student.beta
    for number, layer in enumerate(student.mlp):
        place = "linear" if len(student.mlp) == 1 else f"linears.{number}"
        found |= {f"plp_layer.mlp.{place}.{name}": p for name, p in layer.named_parameters()}
    return found


def of_plp(f: Arrays) -> set[str]:
    x, graph, proxy_init = tensor(f["x"]), edges(f), tensor(f["proxy_init"])
    train, rest, sens = (tensor(f[name]) for name in ("idx_train", "idx_no_train", "sens"))
    labels, teacher = tensor(f["labels"]), tensor(f["teacher_prob"])
    student = CPFStudent(
        x.shape[1] + proxy_init.shape[1],
        f["out"].shape[1],
        len(x),
        int(f["num_layers"]),
        int(f["emb_dim"]),
        int(f["mlp_layers"]),
        feat_drop=0,
        attn_drop=0,
        transductive="init_plp_layer.fc_emb" in f,
    )
    student.set_labels(train, labels[train])
    close(student.labels_init, f["labels_init"], "labels_init", atol=1e-6)
    names = reference_names(student)
    # parameters of the reference that have no use: "alpha", and the balance without a perceptron
    idle = {"alpha"} | (set() if student.mlp else {"plp_layer.lr_alpha"})
    idle = {name for name in idle if f"init_{name}" in f}
    assert {f"init_{name}" for name in {*names, *idle}} == {name for name in f if name.startswith("init_")}
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(tensor(f[f"init_{name}"]))

    def answer(columns: Tensor | None) -> StudentOutputs:
        assert columns is not None
        return StudentOutputs(student(with_columns(x, columns), graph))

    lesson = Lesson(TeacherOutputs(teacher.log()), graph, train, labels[train], rest)
    proxy = BiasProxy(*proxy_init.shape)
    with torch.no_grad():
        proxy.columns.copy_(proxy_init)
    mean = with_columns(x, proxy.mean().detach())
    y = student(mean, graph)
    close(y, f["out"], "out")
    close(log_softmax(y, 1), f["log_prob"], "log_prob")
    close(student.attention(mean, graph), f["attention"], "attention")
    if student.mlp:
        close(student.balance[:, 0], f["balance"], "balance")
    loss = CPF().loss(StudentOutputs(y), lesson)
    close(loss, f["loss_kd"], "loss_kd")
    for (name, parameter), slope in zip(names.items(), torch.autograd.grad(loss, list(names.values())), strict=True):
        assert slope.shape == parameter.shape
        close(slope, f[f"grad_kd_{name}"], f"grad_kd_{name}")

    positive = labels == 1 if str(f["metric"]) == "eo" else None
    first, second = members(sens, rest, among=positive)
    settings = {"lr": float(f["lr"]), "weight_decay": float(f["weight_decay"])}
    optimizers = [torch.optim.Adam(part.parameters(), **settings) for part in (student, proxy)]
    trace = []
    for _ in range(int(f["steps"])):
        losses = alternating_step(
            answer,
            proxy,
            lambda outputs: CPF().loss(outputs, lesson),
            lambda prob: parity_gap(prob, first, second),
            float(f["alpha"]),
            *optimizers,
        )
        trace.append([losses.student_fairness, losses.proxy_fairness])
    close(np.array(trace), f["fair_loss_trace"], "fair_loss_trace")
    for name, parameter in names.items():
        close(parameter, f[f"after_{name}"], f"after_{name}", atol=1e-5)
    close(proxy.full(), f["proxy_after"], "proxy_after", atol=1e-5)
    for name in idle:
        np.testing.assert_array_equal(f[f"after_{name}"], f[f"init_{name}"])
    settings_and_data = (
        "steps lr weight_decay alpha metric num_layers mlp_layers emb_dim src dst x labels idx_train idx_no_train sens "
        "labels_init proxy_init teacher_prob out log_prob attention balance loss_kd fair_loss_trace proxy_after"
    )
    used = {f"{kind}_{name}" for kind in ("init", "grad_kd", "after") for name in names}
    return set(settings_and_data.split()) | used | {f"{kind}_{name}" for kind in ("init", "after") for name in idle}


def of_graphakd(f: Arrays) -> set[str]:
    train = tensor(f["train_mask"]).nonzero().flatten()
    teacher = TeacherOutputs(tensor(f["teacher_log_prob"]), tensor(f["teacher_emb"]))
    labels = tensor(f["labels"])
    lesson = Lesson(teacher, edges(f), train, labels[train], (~tensor(f["train_mask"])).nonzero().flatten())
    nets = Discriminators(f["teacher_log_prob"].shape[1], f["teacher_emb"].shape[1])
    parameters = dict(nets.named_parameters())
    theirs = {name: name.replace("graph.", "global.") for name in parameters}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensor(f[theirs[name]]))
    logits, embedding = (tensor(f[f"student_{name}"]).requires_grad_() for name in ("logits", "emb"))
    close(nets.logit(teacher.log_prob), f["logit_disc_teacher"], "logit_disc_teacher")
    for who, e in (("teacher", teacher.embedding), ("student", embedding)):
        close(nets.local(e, lesson.edge_index)[:, None], f[f"pair_{who}"], f"pair_{who}")
    terms = discriminator_terms(nets, logits, embedding, lesson)
    for name, value in terms.items():
        close(value, f[f"d_{name}"], f"d_{name}")
    student = StudentOutputs(logits, embedding)
    strict = GraphAKD(strict_reference=True)
    close(strict.helper_loss(nets, student, lesson), f["d_total"], "d_total")
    own = adversarial_terms(nets, logits, embedding, lesson)
    for name, value in own.items():
        close(value, f[f"g_{name}"], f"g_{name}")
    total = strict.loss(student, lesson, nets)
    close(total, f["g_total"], "g_total")
    total.backward()
    close(logits.grad, f["grad_student_logits"], "grad_student_logits")
    close(embedding.grad, f["grad_student_emb"], "grad_student_emb")
    data = (
        "src dst teacher_emb student_emb teacher_log_prob student_logits labels train_mask pair_teacher pair_student "
        "logit_disc_teacher d_total g_total grad_student_logits grad_student_emb"
    )
    return set(data.split()) | {f"d_{name}" for name in terms} | {f"g_{name}" for name in own} | set(theirs.values())


def of_glnn(f: Arrays) -> set[str]:
    logits = tensor(f["student_logits"]).requires_grad_()
    train, labels = tensor(f["idx_train"]), tensor(f["labels"])
    given = (logits, tensor(f["teacher_log_prob"]), labels[train], train)
    loss = glnn_loss(*given, float(f["lam"]))
    loss.backward()
    close(loss, f["loss"], "loss")
    close(logits.grad, f["grad"], "grad")
    close(glnn_loss(*given, 1.0), f["ce"], "ce")
    close(glnn_loss(*given, 0.0), f["kl"], "kl")
    return {"student_logits", "teacher_log_prob", "labels", "idx_train", "lam", "ce", "kl", "loss", "grad"}


def of_layers(f: Arrays) -> set[str]:
    x, graph, weight, bias = tensor(f["x"]), edges(f), tensor(f["weight"]), tensor(f["bias"])
    for name, made in (
        ("gcn", GCN(x.shape[1], len(weight), depth=1)),
        ("sage_gcn", GraphSAGE(x.shape[1], len(weight), depth=1, aggregator="gcn")),
    ):
        layer = made.eval().layers[0]
        with torch.no_grad():
            layer.lin.weight.copy_(weight)
            (layer.bias if name == "gcn" else layer.lin.bias).copy_(bias)
        close(made(x, graph), f[name], name, atol=1e-6)
        close(made(x.to_sparse(), graph), f[name], f"{name}, sparse features", atol=1e-6)
    close(propagated(x, graph, 1) @ weight.T + bias, f["gcn"], "gcn, by propagation", atol=1e-6)
    close(propagated(x, graph, 2) @ weight.T + bias, f["sgc_k2"], "sgc_k2", atol=1e-6)
    return {"src", "dst", "x", "weight", "bias", "gcn", "sgc_k2", "sage_gcn"}


KINDS = {
    "legendre": of_soft_step,
    "delta_sp": of_losses,
    "labels_init": of_plp,
    "d_total": of_graphakd,
    "lam": of_glnn,
    "sage_gcn": of_layers,
}


def test_against_the_reference(
    oracles: Callable[[str], list[Path]], record_property: Callable[[str, object], None]
) -> None:
    record_property("arrays compared", compared(oracles("reliant"), KINDS))


@pytest.mark.parametrize(
    ("marker", "changed", "noticed"),
    [
        ("legendre", "s", "reference"),
        ("delta_sp", "logits", "loss_sp"),
        ("labels_init", "x", "out"),
        ("d_total", "student_emb", "pair_student"),
        ("lam", "student_logits", "loss"),
        ("sage_gcn", "weight", "gcn"),
    ],
)
def test_other_inputs_would_be_noticed(
    oracles: Callable[[str], list[Path]], marker: str, changed: str, noticed: str
) -> None:
    arrays = one_with(oracles("reliant"), marker)
    with pytest.raises(AssertionError, match=noticed):
        KINDS[marker](arrays | {changed: arrays[changed][..., ::-1].copy() * 0.9})
