"""TinyMIM's losses, targets and student: formulas, gradients, memory, refusals, and what the step makes of them."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from relation_cases import LEARNING, TEACHING, task_of
from torch import Tensor
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.utils._python_dispatch import TorchDispatchMode

import sparing
from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.pipeline import begin
from sparing.distillation.relations import (
    DistilRelations,
    Objective,
    RelationStudent,
    cls_kl,
    default_block,
    feature_smooth_l1,
    freeze,
    relation_kl,
    relation_smooth_l1,
    student_config,
)
from sparing.models.mae import FEATURES, ViTConfig, ViTEncoder, save_vit

TEACHER = ViTConfig(16, 4, 16, 3, 4)
SMALL = ViTConfig(16, 4, 8, 2, 2)


def four(double: bool = False, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, 3, tokens, d, generator=generator) for d in (4, 4, 2, 2)]
    return [tensor.double() for tensor in made] if double else made


def relation(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT / a.shape[-1] ** 0.5


def pixels(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# --- losses


def test_relations_by_their_formula() -> None:
    a_t, b_t, a_s, b_s = four()
    p, log_r = relation(a_t, b_t).softmax(-1), relation(a_s, b_s).log_softmax(-1)
    torch.testing.assert_close(relation_kl(a_t, b_t, a_s, b_s), (p * (p.log() - log_r)).sum(-1).mean())
    assert relation_kl(a_t, b_t, a_t, b_t).abs() < 1e-6
    expected = smooth_l1_loss(relation(a_s, b_s), relation(a_t, b_t), beta=2.0)
    torch.testing.assert_close(relation_smooth_l1(a_t, b_t, a_s, b_s), expected)


@pytest.mark.parametrize("loss", [relation_kl, relation_smooth_l1])
@pytest.mark.parametrize("shared", [False, True], ids=["two", "one"])
def test_gradients_reach_the_student_only(loss: Any, shared: bool) -> None:
    a_t, b_t, a_s, b_s = (tensor.requires_grad_() for tensor in four(double=True))
    if shared:
        assert torch.autograd.gradcheck(lambda v: loss(a_t, b_t, v, v), (a_s,))
    else:
        assert torch.autograd.gradcheck(lambda a, b: loss(a_t, b_t, a, b), (a_s, b_s))
    loss(a_t, b_t, a_s, b_s).backward()
    assert a_t.grad is None
    assert b_t.grad is None


def test_half_precision_loses_no_probability() -> None:
    a_t, b_t, a_s, b_s = four()
    a_t = 30 * a_t  # a soft-max of these is 0 in float16 where it is not 1, and its logarithm -inf
    exact = relation_kl(a_t.half().float(), b_t.half().float(), a_s.half().float(), b_s.half().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_kl(a_t.half(), b_t.half(), a_s.half(), b_s.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


class Largest(TorchDispatchMode):
    """The most numbers in square relations (…, N, N) that are alive at one time, and how many were made."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.alive, self.most = tokens, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.shape[-2:] == (self.tokens, self.tokens):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.seen:
                    self.seen.add(key)
                    self.alive += (size := storage.nbytes() // 4)
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self.gone, key, size)
        return made

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def test_not_even_one_relation_of_a_block_is_in_memory() -> None:
    heads, tokens, batch = 8, 17, 2
    many = ViTConfig(16, 4, 16, 3, heads)
    student = RelationStudent(student_config(SMALL, many), many)
    with Largest(tokens) as watch:
        student(freeze(ViTEncoder(many)), pixels(batch), pixels(batch)).backward()
    assert 0 < watch.most < batch * heads * tokens**2  # one head's at a time; the networks attend without any


def test_features_and_class_tokens_by_their_formulas() -> None:
    teacher, student = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    e = student - layer_norm(teacher, (6,), eps=1e-6)
    expected = torch.where(e.abs() <= 2, 0.5 * e**2 / 2, e.abs() - 1).mean()
    torch.testing.assert_close(feature_smooth_l1(teacher, student), expected)
    p, log_r = teacher[:, 0].softmax(-1), student[:, 0].log_softmax(-1)
    torch.testing.assert_close(cls_kl(teacher[:, 0], student[:, 0]), (p * (p.log() - log_r)).sum(-1).mean())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: relation_kl(*four()[:2], *four(tokens=6)[2:]), "equal batches, heads and tokens"),
        (lambda: feature_smooth_l1(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), r"\(1, 2, 3\).*\(1, 2, 4\)"),
        (lambda: feature_smooth_l1(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), beta=0), "beta = 0"),
        (lambda: cls_kl(torch.zeros(1, 3), torch.zeros(1, 4)), "differ"),
        (lambda: student_config(ViTConfig(16, 4, 20, 2, 2), ViTConfig(16, 4, 24, 3, 8)), "width 20 .* the 8 heads"),
        (lambda: student_config(SMALL, TEACHER, 4), "target_block = 4; 1 … 3"),
        (lambda: student_config(SMALL, TEACHER, 2, heads=2), "student_heads = 2; block 2 of the teacher has 4"),
        (lambda: RelationStudent(SMALL, TEACHER), "last block has 2 heads, block 3 of the teacher 4"),
        (lambda: RelationStudent(SMALL, TEACHER, target_block=0), "target_block = 0"),
        (lambda: RelationStudent(ViTConfig(16, 8, 8, 2, 2), TEACHER), r"2² tokens .*4²"),
        (lambda: RelationStudent(SMALL, TEACHER, Objective("features"), drop_path=1.0), "drop_path = 1.0"),
        (lambda: freeze(ViTEncoder(TEACHER), 1.0), "teacher_drop_path = 1.0"),
        (lambda: Objective(relations=("qk", "qk")), "each once"),
        (lambda: Objective(relations=()), "relations = ()"),
        (lambda: Objective("token"), "target = 'token'"),
        (lambda: Objective(mask_ratio=0.0), "mask_ratio = 0.0"),
        (lambda: Objective(reconstruction=True), "input = 'raw'; \"masked\""),
    ],
)
def test_what_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        call()


def test_a_teacher_in_training_is_refused() -> None:
    student = RelationStudent(student_config(SMALL, TEACHER), TEACHER)
    with pytest.raises(InvalidValue, match="training mode"):
        student(ViTEncoder(TEACHER).train(), pixels(), pixels())


# --- teacher and student


def test_the_teacher_stops_at_its_block() -> None:
    teacher = freeze(ViTEncoder(TEACHER))
    ran = []
    for number, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        block.norm1.register_forward_hook(lambda *_, number=number: ran.append(f"norm {number}"))
    student = RelationStudent(student_config(SMALL, TEACHER, 2), TEACHER, target_block=2)
    student(teacher, pixels(), pixels())
    assert ran == ["norm 0", 0, "norm 1"]


def test_the_default_block() -> None:
    assert default_block(ViTConfig.named("vit_large")) == 18
    assert default_block(ViTConfig.named("vit_base")) == 12
    assert default_block(ViTConfig.named("vit_large", last_heads=8)) == 24  # a student that became a teacher


def test_a_frozen_teacher_is_a_copy_without_gradients() -> None:
    model = ViTEncoder(TEACHER, [0.5] * 3).train()
    teacher = freeze(model)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(pixels()), teacher(pixels()))
    assert model.training
    assert model.blocks[0].drop_path.rate == 0.5
    dropped = freeze(model, 0.9)
    assert not dropped.training
    torch.manual_seed(0)
    assert not torch.equal(dropped(pixels(64)), dropped(pixels(64)))


@pytest.mark.parametrize(
    "objective",
    [
        *(Objective("features", feature=feature) for feature in FEATURES),
        Objective("cls_token"),
        Objective(relations=("vv", "qq", "kk")),
        Objective(softmax=False),
        Objective(input="masked", mask_ratio=0.5),
        Objective(input="masked", reconstruction=True),
        Objective("cls_token", input="masked", reconstruction=True),
    ],
    ids=lambda o: "-".join([o.target, o.feature, *o.relations, str(o.softmax), o.input, str(o.reconstruction)]),
)
def test_gradients_reach_all_but_what_is_listed(objective: Objective) -> None:
    config = student_config(SMALL, TEACHER) if objective.target == "relations" else SMALL
    student = RelationStudent(config, TEACHER, objective, None, 0.0, 8, 1, 2)
    before = copy.deepcopy(student.state_dict())
    student(freeze(ViTEncoder(TEACHER)), pixels(), pixels(seed=1)).backward()
    reached = {name for name, p in student.encoder.named_parameters() if p.grad is not None}
    assert reached | set(student.untrained()) == set(student.encoder.state_dict())
    assert not reached & set(student.untrained())
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in before.items())
    if student.projection is not None:
        assert student.projection.bias.grad is not None


def test_both_see_the_same_patches_of_a_masked_input() -> None:
    objective = Objective(input="masked", mask_ratio=0.5)
    student = RelationStudent(student_config(SMALL, TEACHER), TEACHER, objective, drop_path=0.0)
    teacher, noise = freeze(ViTEncoder(TEACHER)), torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    loss = student(teacher, pixels(), pixels(), noise)
    gone = noise >= noise.sort(1).values[:, 8:9]
    hidden = pixels().unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).clone()
    hidden[gone] = 7.0
    changed = hidden.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    assert torch.equal(student(teacher, changed, changed, noise), loss)
    assert not torch.equal(student(teacher, pixels(), pixels(), 1 - noise), loss)


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    teacher = freeze(ViTEncoder(TEACHER))
    for block in teacher.blocks:  # a teacher whose tokens have something to do with each other
        block.attn.qkv.weight.mul_(2)
    student = RelationStudent(student_config(SMALL, TEACHER), TEACHER, drop_path=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-2)
    losses = []
    for _ in range(80):
        loss = student(teacher, pixels(8), pixels(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- the step


def test_a_student_keeps_its_teachers_heads_until_it_is_fine_tuned(tmp_path: Path) -> None:
    job = begin(task_of(), TEACHING, store=tmp_path / "store")
    step = DistilRelations(model=LEARNING, epochs=1, batch_size=12, lr=0.01, target_block=2)
    after = step.apply(job)
    assert after.predictor is None
    assert after.model.config.heads_of == (2, 4)
    assert any("keep their first values" in remark and "norm.weight" in remark for remark in job.notes.remarks)
    assert "4 heads; the student's blocks have 2, 4" in job.notes.remarks[0]
    smaller = DistilRelations(id="again", model={**LEARNING, "dim": 4, "heads": 1}, epochs=1, batch_size=12, lr=0.01)
    last = smaller.apply(after.replace(store=job.store.child("again")))
    assert last.model.config.heads_of == (1, 4)  # its teacher's last block had 4 when it was taught
    tuned = sparing.FineTune(epochs=1, batch_size=12, lr=0.01).apply(last.replace(store=job.store.child("tuned")))
    assert tuned.model.config.heads_of == (1, 1)
    assert tuned.predictor is not None


def test_untrained_tensors_keep_their_first_values(tmp_path: Path) -> None:
    from sparing.core.predictor import build_model
    from sparing.core.randomness import isolated_rng

    job = begin(task_of(), TEACHING, store=tmp_path / "store")
    after = DistilRelations(model=LEARNING, epochs=1, batch_size=12, lr=0.01).apply(job)
    with isolated_rng("model", job.seed):
        first = build_model("mae_vit", job.task, **{k: v for k, v in LEARNING.items() if k != "name"}).state_dict()
    state = after.model.state_dict()
    kept = {name for name in state if torch.equal(state[name], first[name])}
    last = {f"blocks.1.{part}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    wanted = {f"{part}.{kind}" for part in (*last, "fc_norm", "head") for kind in ("weight", "bias")}
    assert wanted | {"pos_embed"} <= kept
    assert "blocks.1.attn.qkv.weight" not in kept


def test_a_teacher_in_a_folder_and_one_that_does_not_fit(tmp_path: Path) -> None:
    save_vit(ViTEncoder(TEACHER), tmp_path / "teacher")
    job = begin(task_of(), LEARNING, store=tmp_path / "store")
    fields: dict[str, Any] = {"model": LEARNING, "epochs": 1, "batch_size": 12, "lr": 0.01}
    step = DistilRelations(teacher_folder=tmp_path / "teacher", teacher_normalisation="imagenet", **fields)
    assert step.apply(job).model.config.heads_of == (2, 4)
    save_vit(ViTEncoder(ViTConfig(32, 8, 16, 2, 4)), tmp_path / "other")
    with pytest.raises(IncompatibleStep, match="image_size = 16 of the student, 32 of the teacher"):
        DistilRelations(teacher_folder=tmp_path / "other", **fields).apply(job.replace(store=job.store.child("x")))
    with pytest.raises(InvalidValue, match="there is no such folder"):
        DistilRelations(teacher_folder=tmp_path / "nowhere", **fields)
    with pytest.raises(InvalidValue, match='a "mae_vit" is expected'):
        DistilRelations(**{**fields, "model": "convnet"})
    odd = DistilRelations(**{**fields, "model": {**LEARNING, "dim": 20, "heads": 4}}, target_block=1)
    wide = begin(task_of(), {**TEACHING, "dim": 24, "heads": 6}, store=tmp_path / "store")
    with pytest.raises(InvalidValue, match=r"width 20 .* the 6 heads"):
        odd.apply(wide)


def test_public_weights_teach(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    public = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))
    public.save_pretrained(tmp_path / "public")
    job = begin(task_of(), LEARNING, store=tmp_path / "store")
    step = DistilRelations(
        teacher_folder=tmp_path / "public", model=LEARNING, epochs=1, batch_size=12, lr=0.01, flip=0.0
    )
    after = step.apply(job)
    assert after.model.config.heads_of == (2, 4)
