"""Image classification tasks: splits, figures, corruptions, preprocessing, and a folder of one's own."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.core import registry
from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Task
from sparing.data.images import LabelledImages
from sparing.tasks.images import ImageClassification
from sparing.tasks.images.corruptions import contrast, corruption_functions, gaussian_blur, gaussian_noise
from sparing.tasks.images.digits import Digits
from sparing.tasks.images.folder import ImageFolder
from sparing.tasks.images.published import CIFAR10, FashionMNIST

PARTS = ("train", "val", "calibration", "test")


def rows(task: Task, root: Path | None = None) -> dict[str, np.ndarray]:
    splits = task.splits(root)
    return {part: getattr(splits, part).rows for part in PARTS}


class Oracle:
    """Says the right class with probability ~1, but for the units in ``wrong`` the next one."""

    def __init__(self, split: LabelledImages, wrong: tuple[int, ...] = ()) -> None:
        self.answers = split.labels.copy()
        self.answers[list(wrong)] = (self.answers[list(wrong)] + 1) % len(split.class_names)
        self.classes, self.position = len(split.class_names), 0

    def __call__(self, images: Any) -> np.ndarray:
        answers = self.answers[self.position : self.position + len(images)]
        self.position += len(images)
        return 50 * np.eye(self.classes, dtype=np.float32)[answers]


def test_digits_are_cut_once_for_good() -> None:
    task = Digits()
    parts = rows(task)
    assert {part: len(parts[part]) for part in PARTS} == {"train": 1080, "val": 179, "calibration": 179, "test": 359}
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == list(range(1797))
    again = rows(Digits())
    assert all((parts[part] == again[part]).all() for part in PARTS)
    for part in PARTS:
        assert len(set(getattr(task.splits(None), part).labels.tolist())) == 10


def test_digits_are_normalised_by_their_training_pixels() -> None:
    images, _ = Digits().splits(None).train.batch(np.arange(1080))
    assert images.shape == (1080, 1, 8, 8)
    assert images.mean() == pytest.approx(0, abs=1e-3)
    assert images.std() == pytest.approx(1, abs=1e-3)


def test_evaluate_counts_units_classes_and_order() -> None:
    task = Digits()
    split = task.splits(None).test
    result = task.evaluate(Oracle(split, wrong=(0, 300)), split)  # type: ignore[arg-type]
    assert result.metrics["accuracy"] == pytest.approx(357 / 359)
    assert result.per_unit is not None
    assert np.flatnonzero(result.per_unit == 0).tolist() == [0, 300]
    assert set(result.by_class) == set(task.labels)
    assert min(result.by_class.values()) == result.metrics["worst_class_accuracy"] < 1
    assert list(result.metrics) == [metric.name for metric in task.metrics]


def test_outputs_of_a_wrong_shape_are_refused() -> None:
    task = Digits()
    with pytest.raises(InvalidValue, match=r"\(359, 3\) for 359 units of 10 classes"):
        task.evaluate(lambda images: np.zeros((len(images), 3)), task.splits(None).test)  # type: ignore[arg-type]


def test_the_loss_takes_labels_and_probabilities() -> None:
    task = Digits()
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    hard = task.loss(logits, (None, labels))
    assert hard == pytest.approx(float(task.loss(logits, (None, torch.nn.functional.one_hot(labels, 10).float()))))


@pytest.mark.parametrize("task", [Digits(), FashionMNIST(), CIFAR10()], ids=lambda task: task.name)
def test_what_a_task_says_of_itself_fits_together(task: ImageClassification) -> None:
    (example,) = task.example_input(3)
    again = task.example_input(3)[0]
    assert torch.equal(example, again)
    fields = task.model_fields()
    assert example.shape == (3, fields["in_channels"], fields["image_size"], fields["image_size"])
    model = task.default_model().eval()
    assert model(example).shape == (3, len(task.labels))
    raw = task.preprocessing(task.raw_example())
    assert raw.shape == example[:1].shape
    assert raw.dtype == np.float32
    assert Preprocessing.from_config(task.preprocessing.to_config()) == task.preprocessing
    assert task.capabilities == {"classification", "images"}
    assert task.headline.name == "accuracy"
    assert registry.name_of("tasks", type(task)) == task.name


def test_default_model_of_fashion_mnist_is_large_enough_for_the_int8_claim() -> None:
    assert sum(parameter.numel() for parameter in FashionMNIST().default_model().parameters()) >= 300_000


def test_fingerprints_tell_tasks_and_settings_apart() -> None:
    tasks = [Digits(), FashionMNIST(), FashionMNIST(train_limit=100), CIFAR10()]
    assert len({task.fingerprint() for task in tasks}) == len(tasks)
    assert Digits().fingerprint() == Digits().fingerprint()


IMAGES = np.random.RandomState(0).randint(0, 256, (6, 20, 16, 3)).astype(np.uint8)


def test_noise_has_its_strength_and_depends_on_the_index_alone() -> None:
    grey = np.full((50, 40, 40, 1), 128, np.uint8)
    noisy = gaussian_noise(grey, np.arange(50))
    assert (noisy.astype(float) - 128).std() == pytest.approx(0.08 * 255, rel=0.02)
    np.testing.assert_array_equal(noisy[7:9], gaussian_noise(grey[7:9], np.array([7, 8])))
    assert (noisy[0] != noisy[1]).any()


def test_blur_is_a_gaussian_filter() -> None:
    from scipy.ndimage import gaussian_filter

    expected = np.rint(gaussian_filter(IMAGES.astype(np.float64), (0, 0.7, 0.7, 0), mode="nearest"))
    assert np.abs(gaussian_blur(IMAGES, np.arange(6)) - expected).max() <= 1  # rounding at one half


def test_contrast_shrinks_to_the_mean() -> None:
    result = contrast(IMAGES, np.arange(6)).astype(float)
    assert result.std() == pytest.approx(0.4 * IMAGES.std(), rel=0.02)
    np.testing.assert_allclose(result.mean(axis=(1, 2)), IMAGES.mean(axis=(1, 2)), atol=0.5)


def test_corruptions_stay_in_range_and_leave_the_split_alone() -> None:
    task = Digits()
    split = task.splits(None).test
    before = split.pixels(np.arange(50)).copy()
    views = task.corruptions(split)
    assert set(views) == set(corruption_functions(16, 8)) == {"gaussian_noise", "gaussian_blur", "contrast"}
    for view in views.values():
        pixels = view.pixels(np.arange(50))
        assert pixels.max() <= 16
        assert (pixels != before).any()
        assert (view.labels == split.labels).all()
        assert view.fingerprint() != split.fingerprint()
    np.testing.assert_array_equal(split.pixels(np.arange(50)), before)


def test_fashion_mnist(data_root: Path) -> None:
    task = FashionMNIST(test_limit=500)
    parts = rows(task, data_root)
    assert {part: len(parts[part]) for part in PARTS} == {"train": 54000, "val": 4800, "calibration": 1200, "test": 500}
    train = task.splits(data_root).train
    assert np.bincount(train.labels).tolist() == [5400] * 10
    pixels = train.raw(np.arange(len(train))) / 255
    assert task.normalisation == ((pytest.approx(pixels.mean(), abs=5e-4),), (pytest.approx(pixels.std(), abs=5e-4),))
    image, label = train[0]
    assert image.shape == (1, 28, 28)
    assert 0 <= label < 10
    assert task.splits(data_root) is task.splits(data_root)


def test_cifar10_from_either_form(data_root: Path, tmp_path: Path) -> None:
    task = CIFAR10(train_limit=1000, test_limit=100)
    splits = task.splits(data_root)
    assert [len(getattr(splits, part)) for part in PARTS] == [900, 80, 20, 100]
    folder = tmp_path / "cifar10"
    folder.mkdir()
    source = splits.train.source.images
    for number in range(5):
        batch = slice(200 * number, 200 * number + 200)
        records = np.concatenate(
            [
                splits.train.all_labels[batch, None].astype(np.uint8),
                source[batch].transpose(0, 3, 1, 2).reshape(200, -1),
            ],
            1,
        )
        (folder / f"data_batch_{number + 1}.bin").write_bytes(records.tobytes())
    (folder / "test_batch.bin").write_bytes(bytes(3073 * 10))
    binary = CIFAR10().splits(tmp_path)
    assert binary.train.fingerprint() == splits.train.fingerprint()


@pytest.mark.parametrize("limit", [0, -1, True, 2.5])
def test_limits_are_checked(limit: Any) -> None:
    with pytest.raises(InvalidValue, match=f"train_limit = {limit!r}"):
        FashionMNIST(train_limit=limit)


def plant(folder: Path, classes: dict[str, int], size: tuple[int, int] = (10, 14)) -> Path:
    """Images whose class decides their colour, of several sizes."""
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((size[0] + index % 3, size[1], 3), 40 * (label + 1), np.uint8)
            pixels[index % size[0]] += index  # no two alike
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_without_splits_is_cut(tmp_path: Path) -> None:
    task = ImageFolder(str(plant(tmp_path / "photos", {"owl": 20, "cat": 20})), size=8)
    assert task.labels == ("cat", "owl")
    parts = rows(task)
    assert {part: len(parts[part]) for part in PARTS} == {"train": 26, "val": 4, "calibration": 2, "test": 8}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(40))
    train = task.splits().train
    images, _ = train.batch(np.arange(len(train)))
    assert images.shape == (26, 3, 8, 8)
    assert np.abs(images.mean(axis=(0, 2, 3))).max() < 1e-2
    assert np.abs(images.std(axis=(0, 2, 3)) - 1).max() < 1e-2
    assert task.preprocessing(task.raw_example()).shape == (1, 3, 8, 8)
    assert task.default_model().eval()(task.example_input()[0]).shape == (2, 2)


def test_splits_given_are_kept_and_calibration_comes_from_train(tmp_path: Path) -> None:
    base = tmp_path / "photos"
    for split, count in (("train", 20), ("val", 3), ("test", 4)):
        plant(base / split, {"a": count, "b": count})
    task = ImageFolder(str(base), size=8)
    parts, names = rows(task), task.tree.files.names
    assert {part: {names[row].split("/")[0] for row in parts[part]} for part in PARTS} == {
        "train": {"train"},
        "val": {"val"},
        "calibration": {"train"},
        "test": {"test"},
    }
    assert (len(parts["val"]), len(parts["test"])) == (6, 8)


def test_memory_limit_changes_where_images_live_not_what_they_are(tmp_path: Path) -> None:
    base = str(plant(tmp_path / "photos", {"a": 12, "b": 12}))
    small, lazy = ImageFolder(base, size=8), ImageFolder(base, size=8, memory_mb=0)
    assert type(lazy.splits().train.source).__name__ == "ImageFiles"
    for part in PARTS:
        here, there = getattr(small.splits(), part), getattr(lazy.splits(), part)
        np.testing.assert_array_equal(here.batch(np.arange(len(here)))[0], there.batch(np.arange(len(there)))[0])


def test_what_is_saved_with_the_model_does_what_training_saw(tmp_path: Path) -> None:
    base = plant(tmp_path / "photos", {"a": 12, "b": 12}, size=(30, 21))
    task = ImageFolder(str(base), size=8, channels=1)
    saved = Preprocessing.from_config(task.preprocessing.to_config())
    train = task.splits().train
    paths = [base / task.tree.files.names[row] for row in train.rows]
    np.testing.assert_array_equal(saved(paths), train.batch(np.arange(len(train)))[0])


def test_a_relative_path_is_found_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "set", {"a": 9, "b": 9})
    monkeypatch.delenv("SPARING_DATA", raising=False)
    assert len(ImageFolder("set", size=8).splits(tmp_path).test) == 4
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    assert ImageFolder("set", size=8).labels == ("a", "b")
    with pytest.raises(DataError, match=r"neither none nor .*none exists"):
        ImageFolder("none").splits()


def test_damage_names_the_file(tmp_path: Path) -> None:
    base = plant(tmp_path / "photos", {"a": 9, "b": 9})
    (base / "b" / "3.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"photos/b/3\.png: of no known format"):
        ImageFolder(str(base), size=8).splits()


def test_too_few_images_say_how_many_are_needed(tmp_path: Path) -> None:
    base = plant(tmp_path / "photos", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"2 images of 2 classes leave none .* at least 4 images"):
        ImageFolder(str(base), size=8).splits()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 3}, "size = 3; a whole number in 4…2048"),
        ({"size": "64"}, "size = '64'"),
        ({"channels": 4}, "channels = 4"),
        ({"test_share": 0.0}, "test_share = 0.0"),
        ({"test_share": 0.6, "val_share": 0.5}, "below 1 is expected"),
        ({"memory_mb": float("nan")}, "memory_mb = nan"),
    ],
)
def test_folder_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ImageFolder("x", **fields)


def test_real_photographs_in_a_zip(data_root: Path) -> None:
    task = ImageFolder("sign_digits/sign_digits_64.zip", size=32)
    splits = task.splits(data_root)
    assert [len(getattr(splits, part)) for part in PARTS] == [1386, 203, 70, 403]
    assert task.labels == tuple("0123456789")
    with zipfile.ZipFile(data_root / "sign_digits/sign_digits_64.zip") as archive:
        name = task.tree.files.names[splits.test.rows[0]]
        with Image.open(io.BytesIO(archive.read(name))) as image:
            whole = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(task.preprocessing([whole])[0], splits.test[0][0].numpy())


def test_sign_digits_are_split_by_person(data_root):
    task = registry.resolve("tasks", "sign_digits")()
    parts = task.splits(data_root)
    assert [len(parts.train) + len(parts.calibration), len(parts.val), len(parts.test)] == [1456, 203, 403]
    names = np.array(task.tree.files.names)
    people = {part: {name.split("/")[-1].split("_")[0] for name in names[getattr(parts, part).rows]} for part in PARTS}
    for part in ("val", "test"):
        assert not people[part] & people["train"]
    assert task.labels == tuple("0123456789")


def test_sign_digits_that_are_missing_are_asked_for_with_the_place(tmp_path):
    with pytest.raises(DataError, match=r"sign_digits_64\.zip is missing.*ardamavi.*image_folder"):
        registry.resolve("tasks", "sign_digits")().splits(tmp_path)


def test_a_folder_of_images_is_cut_to_size_after_its_shorter_side_is_brought_to_resize(tmp_path):
    rows = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 10)  # 240 rows, each ten of one grey
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(6):
            Image.fromarray(np.tile(rows[:, None], (1, 240))).save(tmp_path / label / f"{number}.png")
    whole, middle = (ImageFolder(str(tmp_path), size=16, resize=resize, channels=1) for resize in (None, 32))
    spread = {task: np.ptp(task.splits(None).train.pixels([0]).astype(int)) for task in (whole, middle)}
    assert spread[middle] < 0.6 * spread[whole]
    with pytest.raises(InvalidValue, match="resize = 8; at least size = 16"):
        ImageFolder(str(tmp_path), size=16, resize=8)
