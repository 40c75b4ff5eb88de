"""Detection: COCO's figures on hand-made cases, the loss, answers of a saved predictor, a run to a ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparing
from coco_cases import coco_folder, content, row_of, scene
from sparing.core.collation import batches_of
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue
from sparing.core.predictor import ModulePredictor, build_model, load, spec_of, to_onnx
from sparing.core.task import IGNORED
from sparing.core.transfer import build_on
from sparing.models.detection import encode_boxes, match_anchors
from sparing.tasks.images.detection import CocoDetection, coco_scores

BACKBONE = {"name": "mobilenet", "widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "expansion": 2}
MODEL = {"name": "ssdlite", "backbone": BACKBONE, "extra_channels": [8], "sizes": [8, 14, 20, 26]}


def truth(*boxes: list[float], labels: list[int] | None = None, crowd: list[int] | None = None) -> dict[str, Any]:
    corner = np.array(boxes, float).reshape(-1, 4)
    return {
        "boxes": corner,
        "labels": np.array(labels or [0] * len(boxes)),
        "crowd": np.array(crowd or [0] * len(boxes)),
        "area": (corner[:, 2] - corner[:, 0]) * (corner[:, 3] - corner[:, 1]),
    }


def answer(*boxes: list[float], scores: list[float] | None = None, labels: list[int] | None = None) -> dict[str, Any]:
    return {
        "boxes": np.array(boxes, float).reshape(-1, 4),
        "scores": np.array(scores or [0.9] * len(boxes)),
        "labels": np.array(labels or [0] * len(boxes)),
    }


A, B = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 90.0]


def test_right_boxes_score_one() -> None:
    figures, by_class = coco_scores([truth(A, B)], [answer(A, B)], 1)
    assert [figures[name] for name in ("ap", "ap50", "ap75", "ar100", "ap_small", "ap_medium")] == pytest.approx(
        [1.0] * 6
    )
    assert figures["ap_large"] == -1
    assert by_class.tolist() == pytest.approx([1.0])


def test_half_of_the_objects_found() -> None:
    # precision 1 up to a recall of one half, which 51 of the 101 recalls 0, 0.01 … do not exceed
    figures, _ = coco_scores([truth(A, B)], [answer(A)], 1)
    assert figures["ap"] == pytest.approx(51 / 101)
    assert figures["ar100"] == pytest.approx(0.5)
    assert figures["ar1"] == pytest.approx(0.5)


def test_a_wrong_box_before_the_right_one_halves_the_precision() -> None:
    far = [200.0, 200.0, 220.0, 220.0]
    figures, _ = coco_scores([truth(A)], [answer(far, A, scores=[0.9, 0.8])], 1)
    assert figures["ap"] == pytest.approx(0.5)
    figures, _ = coco_scores([truth(A)], [answer(A, far, scores=[0.9, 0.8])], 1)
    assert figures["ap"] == pytest.approx(1.0)


def test_overlap_decides_at_which_thresholds_a_box_counts() -> None:
    shifted = [2.0, 0.0, 12.0, 10.0]  # 80 of 120 square pixels: counts at 0.5, 0.55, 0.6 and 0.65
    figures, _ = coco_scores([truth(A)], [answer(shifted)], 1)
    assert figures["ap50"] == pytest.approx(1.0)
    assert figures["ap75"] == pytest.approx(0.0)
    assert figures["ap"] == pytest.approx(0.4)


def test_classes_are_apart_and_averaged() -> None:
    figures, by_class = coco_scores([truth(A, B, labels=[0, 1])], [answer(A, B, labels=[0, 0])], 3)
    assert figures["ap"] == pytest.approx(0.5)
    assert by_class.tolist() == [pytest.approx(1.0), pytest.approx(0.0), -1.0]


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong() -> None:
    inside = [52.0, 52.0, 60.0, 60.0]
    figures, _ = coco_scores([truth(A, B, crowd=[0, 1])], [answer(inside, A, scores=[0.9, 0.8])], 1)
    assert figures["ap"] == pytest.approx(1.0)
    figures, _ = coco_scores([truth(A, B)], [answer(inside, A, scores=[0.9, 0.8])], 1)
    assert figures["ap"] < 0.5


@pytest.mark.parametrize("answers", [[answer()], [answer(B)]])
def test_nothing_found_scores_nothing(answers: list[dict[str, Any]]) -> None:
    assert coco_scores([truth(A)], answers, 1)[0]["ap"] == 0


def task_of(folder: Path, **fields: Any) -> CocoDetection:
    return CocoDetection(str(coco_folder(folder)), **{"size": 32, **fields})


class Oracle:
    """A predictor that knows the answers."""

    def __init__(self, task: CocoDetection, split: Any) -> None:
        self.model, self.queue = build_model("ssdlite", task, **{k: v for k, v in MODEL.items() if k != "name"}), []
        for batch in batches_of(split, 64, task.collate):
            anchors: Any = self.model.anchors
            shape = (len(batch[0]), len(anchors))
            logits, offsets = torch.zeros(*shape, 3), torch.zeros(*shape, 4)
            for image in range(len(batch[0])):
                real = batch[1]["labels"][image] != IGNORED
                boxes, labels = batch[1]["boxes"][image][real], batch[1]["labels"][image][real]
                matched = match_anchors(anchors, boxes)
                logits[image, :, 2] = 20
                for number in (matched >= 0).nonzero()[:, 0].tolist():
                    which = int(matched[number])
                    logits[image, number] = torch.eye(3)[labels[which]] * 20
                    offsets[image, number] = encode_boxes(boxes[which : which + 1], anchors[number : number + 1])[0]
            self.queue.append({"logits": logits, "offsets": offsets, "anchors": anchors.expand(shape[0], -1, -1)})

    def __call__(self, images: Any) -> Any:
        return {name: part.numpy() for name, part in self.queue.pop(0).items()}


def test_a_predictor_that_knows_scores_one_and_has_no_box_loss(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    split = task.splits(None).train
    oracle = Oracle(task, split)
    outputs, batch = oracle.queue[0], next(batches_of(split, 64, task.collate))
    assert float(task.loss(outputs, batch)) < 1e-3
    found = task.evaluate(oracle, split)  # type: ignore[arg-type]
    assert found.metrics["ap"] == pytest.approx(1.0)
    assert set(found.by_class) == {"square", "bar"}


def test_the_loss_is_a_mean_over_images_and_leaves_crowds_out(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    what = content()
    for entry in what["annotations"][::2]:
        entry["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(what))
    task = task_of(tmp_path)
    model = task.default_model().eval()
    batch = next(batches_of(task.splits(None).train, 4, task.collate))
    outputs = task.outputs(model, batch)
    without = {**batch[1], "labels": batch[1]["labels"].masked_fill(batch[1]["crowd"], IGNORED)}
    torch.testing.assert_close(task.loss(outputs, batch), task.loss(outputs, (batch[0], without)))
    assert not torch.equal(batch[1]["labels"], without["labels"])


def test_splits_as_the_files_say_or_cut(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    parts = task.splits(None)
    assert {n: len(getattr(parts, n)) for n in ("train", "val", "calibration", "test")} == {
        "train": 16,
        "val": 2,
        "calibration": 1,
        "test": 5,
    }
    rows = [row for name in ("train", "val", "calibration", "test") for row in getattr(parts, name).images.rows]
    assert sorted(rows) == list(range(24))
    (tmp_path / "test.json").write_text(json.dumps(content(7)))
    with_test = task_of(tmp_path).splits(None)
    assert len(with_test.test) == 7
    assert len(with_test.train) == 21
    (tmp_path / "test.json").rename(tmp_path / "val.json")
    assert [len(part) for part in (lambda s: (s.val, s.test))(task_of(tmp_path).splits(None))] == [7, 5]
    measured = task_of(tmp_path, test="val.json").splits(None)  # then validation is cut from the training images
    assert (len(measured.val), len(measured.test)) == (2, 7)
    (tmp_path / "val.json").rename(tmp_path / "test.json")
    limited = task_of(tmp_path, train_limit=10, test_limit=4).splits(None)
    assert (len(limited.test), len(limited.train) + len(limited.val) + len(limited.calibration)) == (4, 10)
    several = task_of(tmp_path, train=["instances.json", "test.json"], test="test.json").splits(None)
    assert len(several.train) + len(several.val) + len(several.calibration) == 31


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 8}, "size = 8"),
        ({"merge": "some"}, "merge = 'some'"),
        ({"val_share": 0}, "val_share = 0"),
        ({"test_share": 0.9, "val_share": 0.2}, "add up to 1.1"),
        ({"train_limit": 1}, "train_limit = 1"),
        ({"memory_mb": -1}, "memory_mb = -1"),
        ({"val": "val.json", "test": "val.json"}, "val and test both are 'val.json'"),
    ],
)
def test_impossible_fields_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=f"coco_detection: .*{message}"):
        task_of(tmp_path, **fields)


def test_folders_without_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of train\.json"):
        CocoDetection(str(tmp_path)).splits(None)
    with pytest.raises(DataError, match="neither"):
        CocoDetection(str(tmp_path / "absent")).splits(None)
    coco_folder(tmp_path)
    other = content(3)
    other["categories"][0]["name"] = "circle"
    (tmp_path / "test.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="its categories are not those of"):
        task_of(tmp_path).splits(None)


def test_images_from_files_are_the_same_as_from_memory(tmp_path: Path) -> None:
    one, other = (task_of(tmp_path, memory_mb=memory).splits(None).test[0] for memory in (512, 0))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1]["boxes"], other[1]["boxes"])


def test_a_saved_predictor_answers_with_boxes(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data")
    predictor = ModulePredictor(build_model("ssdlite", task, **{k: v for k, v in MODEL.items() if k != "name"}), task)
    raws = [scene(1)[0], scene(2)[0]]
    expected = predictor.predict(raws)
    assert len(expected) == 2
    assert set(expected[0]) == {"boxes", "scores", "labels"}
    assert ((expected[0]["boxes"] >= 0) & (expected[0]["boxes"] <= 1)).all()
    for number, other in enumerate((predictor, to_onnx(predictor, task=task))):
        again = load(other.save(tmp_path / str(number))).predict(raws)
        assert len(again[0]["boxes"]) == len(expected[0]["boxes"]) > 0
        np.testing.assert_allclose(again[0]["scores"], expected[0]["scores"], atol=1e-4)
    assert "postprocessing" in (tmp_path / "0" / "README.md").read_text()


@pytest.mark.slow
def test_from_files_to_a_ledger(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data", test_share=0.25)
    row = row_of(task, MODEL, epochs=30, store=tmp_path / "store", batch_size=6, lr=0.01)
    assert row.runtime == "onnxruntime"
    assert row.figures["ap50"].value > 0.3, row.figures["ap50"]


def test_coco_mini_is_loaded_as_a_task(data_root: Path) -> None:
    task = CocoDetection("coco_mini", size=64)
    parts = task.splits(data_root)
    assert len(parts.train) + len(parts.val) + len(parts.calibration) + len(parts.test) == 92
    assert len(task.labels) == 80
    figures, _ = task.coco_figures(ModulePredictor(task.default_model(), task), parts.test)
    assert set(figures) >= {"ap", "ap_small", "ar100"}


def classification() -> sparing.CustomTask:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32, generator=draw), torch.arange(16) % 4)
    return sparing.CustomTask(
        "four", data, data, data, data, model="mobilenet", loss=torch.nn.functional.cross_entropy, labels="abcd"
    )


def test_a_classifier_is_put_under_a_detector(tmp_path: Path) -> None:
    plain = {name: value for name, value in BACKBONE.items() if name != "name"}
    classifier = build_model("mobilenet", classification(), image_size=32, num_classes=4, **plain)
    old, new = classification(), task_of(tmp_path)
    new.splits(None)
    moved, begun = build_on(classifier, old, new, {"name": "ssdlite", "extra_channels": [8]})
    assert begun == ["extra", "classify", "locate"]
    state = classifier.state_dict()
    for name, tensor in moved.backbone.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, state[name]), name
    assert moved(*new.example_input(2))["logits"].shape[-1] == 3
    again = build_model(spec_of(moved))  # type: ignore[arg-type]
    assert again.state_dict().keys() == moved.state_dict().keys()


def test_what_cannot_stand_on_another_is_refused(tmp_path: Path) -> None:
    old, new = classification(), task_of(tmp_path)
    new.splits(None)
    with pytest.raises(IncompatibleStep, match="built by hand"):
        build_on(torch.nn.Linear(2, 2), old, new, "ssdlite")
    with pytest.raises(InvalidValue, match="backbone"):
        build_on(build_model("mobilenet", old, image_size=32), old, new, "convnet")
    with pytest.raises(InvalidValue, match="model = 'ssdlit'"):
        sparing.Transfer(task=new, model="ssdlit")
