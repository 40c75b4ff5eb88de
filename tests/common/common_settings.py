"""How each registered part is tried. A new part needs one line here; one without it fails its test."""

from __future__ import annotations

import itertools
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sparing
from coco_cases import coco_folder
from event_files import bars, dvs_files
from sparing.compression.pruning import BlockPrune, LockPattern
from sparing.compression.shrinking import Shrink
from sparing.core.predictor import build_model
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.data.graphs import PackedGraphs
from sparing.data.images import LabelledImages
from sparing.data.node_tables import save_node_table
from sparing.data.preprocessing import ChannelsFirst, Decode, ToFloat
from sparing.models.spiking.streaming import StreamSpikes
from sparing.tasks.ctr.own import ClickTable
from sparing.tasks.images.digits import Digits
from sparing.testing import ModelCase, StepCase, TaskCase, TinyGraph, TinyGraphs, TinyPeople, graph_of, tiny_task

TRAIN = sparing.Train(id="first", epochs=1, batch_size=16, lr=0.02)
BLOCKS = {"name": "blocknet", "num_classes": 3, "image_size": 8, "width": 4, "depth": 1}
LAST = sparing.Train(id="last", epochs=2, batch_size=16, lr=0.02, checkpoint_every_batches=1)
PLAIN = sparing.Train(id="last", epochs=2, batch_size=16, checkpoint_every_batches=1)
STUDENT = {"name": "convnet", "num_classes": 3, "image_size": 8, "widths": [4]}


def poolings() -> sparing.Task:
    """Images for a model without any layer that could be quantised."""
    tiny = tiny_task().splits(None)
    return sparing.CustomTask(
        "pools",
        *(getattr(tiny, part) for part in ("train", "test", "val", "calibration")),
        model=lambda: build_model(Pools),
        loss=nn.functional.cross_entropy,
        labels="abc",
    )


def photographs() -> sparing.Task:
    """Grey images of 8×8 pixels that are kept as uint8: what can be augmented."""
    preprocessing = Preprocessing((Decode("L"), ChannelsFirst(), ToFloat()))

    def part(count: int, seed: int) -> LabelledImages:
        labels = np.arange(count) % 3
        bright = np.arange(8)[None, :, None, None] // 3 == labels[:, None, None, None]
        pixels = np.random.RandomState(seed).randint(0, 128, (count, 8, 8, 1)) + 127 * bright
        return LabelledImages(pixels.astype(np.uint8), labels, preprocessing, "abc")

    return sparing.CustomTask(
        "photographs",
        *(part(count, seed) for seed, count in enumerate((48, 30, 24, 24))),
        model=lambda: build_model("convnet", num_classes=3, image_size=8, widths=[4, 8]),
        loss=nn.functional.cross_entropy,
        labels="abc",
        preprocessing=preprocessing,
        capabilities={"images"},
    )


def unlabelled_photographs() -> sparing.Task:
    """The same, for a vision transformer that is to be pre-trained on them."""
    task = photographs()
    task.default_model = lambda: build_model("mae_vit", **TRUNK)
    return task


TRUNK = {
    **{"in_channels": 1, "num_classes": 3, "image_size": 8, "patch_size": 4},
    **{"dim": 8, "depth": 2, "heads": 2},
}
"""Fields of a mae_vit for :func:`unlabelled_photographs`."""
DECODER = {"decoder_dim": 4, "decoder_depth": 1, "decoder_heads": 1}


def small_photos(size: int = 16) -> sparing.Task:
    """Colour images of 16×16 pixels: what networks that halve an image four times can work on."""
    draw = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 3, size, size, generator=draw), torch.arange(count) % 3)

    return sparing.CustomTask(
        "small photos",
        part(24),
        part(12),
        model=lambda: build_model("mobilenet", num_classes=3, image_size=16),
        loss=nn.functional.cross_entropy,
        labels="abc",
        capabilities={"images"},
    )


NARROW = {
    "depths": [1, 1, 2, 2],
    "stem_dim": 4,
    "embed_dims": [4, 6, 8, 8],
    "dim_heads": [2, 2, 4, 4],
    "window_sizes": [1, 1, 2, 1],
    "norm_layers": ["bn_2d"] * 4,
}
"""Fields of an EMO for :func:`small_photos`."""


class Pools(nn.Module):
    """The mean of an image times three numbers: nothing but reductions and products."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.scale


def word_rows() -> list[list[str]]:
    """Ninety lists of three to eight words, whose last one tells two kinds apart."""
    words = np.random.RandomState(0).choice(["some", "words", "that", "mean", "nothing", "at", "all"], (90, 7))
    return [[*row[: 2 + number % 6].tolist(), "red" if number % 2 else "green"] for number, row in enumerate(words)]


SMALL_BERT = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0}
"""Fields of a bert for :func:`few_texts`."""


class FewTexts(sparing.TextClassification):
    """Texts whose model is small as well."""

    def default_model(self) -> nn.Module:
        return build_model("bert", self, **SMALL_BERT)


def few_texts() -> sparing.Task:
    """Texts of two kinds, of different lengths, and a vocabulary of their own."""
    texts = [" ".join(row) for row in word_rows()]
    return FewTexts("colours", texts, [number % 2 for number in range(90)], length=10, vocab_size=60)


def text_files(place: Path) -> Path:
    """A folder of thirty small text files."""
    if not any(place.iterdir()):
        rows = [" ".join(row) for row in word_rows()]
        for number in range(30):
            (place / f"{number:02}.txt").write_text("\n".join(rows[number::30]), "utf8")
    return place


def lines() -> sparing.Task:
    """The lines of :func:`text_files` as characters, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        task = registered_task("text_corpus", path=str(text_files(Path(folder))), length=24, level="characters")
        task.splits(None)
    return task


def sentences() -> sparing.Task:
    """Texts of 3 to 8 words for language modelling, each a sample of its length."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentences.txt"
        path.write_text("\n".join(" ".join(row) for row in word_rows() * 2))
        task = registered_task(
            "text_corpus", path=str(path), length=24, level="characters", samples="lines", split="tail"
        )
        task.splits(None)
    return task


def no_difference(batch):
    """Samples that are all equally difficult."""
    return np.zeros(len(batch[0]), np.int64)


def registered_task(name: str, **fields):
    """A registered task, built as a recipe builds it."""
    from sparing.core.registry import resolve

    return resolve("tasks", name)(**fields)


def click_table(place: Path) -> Path:
    """A CSV file of a few rows, whose label follows from a shop and a price."""
    path = place / "clicks.csv"
    if not path.exists():
        draw = np.random.RandomState(0)
        shops, prices, numbers = draw.randint(0, 6, 400), draw.rand(400).round(4), range(400)
        clicked = draw.rand(400) < 0.2 + 0.6 * ((shops % 2 == 0) ^ (prices > 0.5))
        rows = [
            f"{n},{shop},{price},{int(y)}" for n, shop, price, y in zip(numbers, shops, prices, clicked, strict=True)
        ]
        path.write_text("\n".join(["row,shop,price,label", *rows]))
    return path


@cache
def clicks_folder() -> tempfile.TemporaryDirectory[str]:
    """Where the file of :func:`clicks` lies until the process ends."""
    return tempfile.TemporaryDirectory(prefix="sparing-clicks-")


class EmptyRows(ClickTable):
    """A table whose model has three ids more in each field, which nothing says and whose rows are zero."""

    def default_model(self) -> nn.Module:
        sizes = [count + 3 for count in self.encoder.cardinalities]
        model = build_model("fnn", cardinalities=sizes, dim=4, widths=[8])
        with torch.no_grad():
            for table, field in itertools.product(model.tables, range(len(sizes))):
                table.field(field)[-3:] = 0
        return model


def clicks(kind: type[ClickTable] = ClickTable) -> sparing.Task:
    """A table of clicks, for models of click-through data and steps on them."""
    return kind(str(click_table(Path(clicks_folder().name))), exclude=["row"], val_share=0.2)


def event_folder(place: Path) -> Path:
    """The recordings of :func:`bars`, made once."""
    return place if any(place.iterdir()) else bars(place)


def few_events() -> sparing.Task:
    """The recordings of :func:`event_folder`, read, with a small model."""
    from sparing.tasks.events.own import EventFolder

    class FewEvents(EventFolder):
        model = SMALL_SNN

    with tempfile.TemporaryDirectory() as folder:
        task = FewEvents(str(event_folder(Path(folder))), 8, 1000, 4, 1)
        task.splits(None)
        task.path, task.name = "bars", f"few events of {len(task.labels)} kinds"  # not the folder that is gone
    return task


SMALL_SNN = {"widths": [3, 4], "pools": [1, 2], "hidden": [5], "r_t": 2, "r_c": 2}
"""Fields of a gesture_snn for :func:`few_events`."""

STEPS = {
    "train": StepCase(
        sparing.Train(epochs=2, batch_size=16, lr=0.02, checkpoint_every_batches=1),
        nothing="training moves the weights",
    ),
    "distil": StepCase(
        sparing.Distil(teacher="first", model=STUDENT, epochs=2, batch_size=16, checkpoint_every_batches=1),
        before=(TRAIN,),
        nothing="training moves the weights",
    ),
    "distil_fair": StepCase(
        sparing.DistilFair(
            teacher="first",
            student={"name": "glnn", "hidden": 4, "hops": 1},
            epochs=4,
            checkpoint_every=1,
        ),
        before=(TRAIN,),
        task=TinyPeople,
        nothing="training moves the weights",
    ),
    "block_prune": StepCase(
        BlockPrune(sparsity=0.5, convolutions=True),
        after=(LAST, Shrink(id="realised")),
        nothing=StepCase(BlockPrune(), task=poolings, nothing="is the case"),
    ),
    "lock_pattern": StepCase(
        LockPattern(),
        before=(BlockPrune(id="pruned", sparsity=0.5, convolutions=True), TRAIN),
        after=(LAST, Shrink(id="realised")),
        nothing=StepCase(LockPattern(), before=(TRAIN,), nothing="is the case"),
    ),
    "shrink": StepCase(
        Shrink(ratio=0.5),
        before=(TRAIN,),
        nothing=StepCase(Shrink(ratio=0), before=(TRAIN,), nothing="is the case"),
    ),
    "compile": StepCase(
        sparing.Compile(max_batch=4, samples=8),
        before=(TRAIN,),
        task=few_texts,
        nothing=StepCase(sparing.Compile(kernels="sparse"), before=(TRAIN,), task=few_texts, nothing="is the case"),
    ),
    "predictive_exit": StepCase(
        sparing.PredictiveExit(codewords=2, epochs=2, batch_size=16, max_loss=0.9, checkpoint_every_batches=1),
        before=(TRAIN,),
        nothing=StepCase(sparing.PredictiveExit(epochs=1), before=(TRAIN,), task=poolings, nothing="is the case"),
    ),
    "block_scaling": StepCase(
        sparing.BlockScaling(sparsities=(0, 0.5), epochs=3, batch_size=16, lr=0.01, runs=2, max_bytes=2000),
        before=(TRAIN,),
        nothing=StepCase(sparing.BlockScaling(epochs=1), before=(TRAIN,), task=poolings, nothing="is the case"),
    ),
    "pretrain": StepCase(
        sparing.Pretrain(epochs=2, **DECODER, batch_size=16, lr=0.01, checkpoint_every_batches=1),
        task=unlabelled_photographs,
        nothing="training moves the weights",
    ),
    "distil_relations": StepCase(
        sparing.DistilRelations(
            model={"name": "mae_vit", **TRUNK, "dim": 4, "heads": 1},
            epochs=2,
            batch_size=16,
            lr=0.01,
            checkpoint_every_batches=1,
        ),
        task=unlabelled_photographs,
        nothing="training moves the weights",
    ),
    "finetune": StepCase(
        sparing.FineTune(epochs=2, labels_per_class=4, batch_size=4, lr=0.01, mixup=0.8, checkpoint_every_batches=1),
        task=unlabelled_photographs,
        nothing="training moves the weights",
    ),
    "leap": StepCase(
        sparing.Leap(rho=0.5),
        after=(sparing.Train(epochs=2, batch_size=16, lr=0.02, checkpoint_every_batches=1),),
        nothing="any optimizer makes steps that can be perturbed; with rho = 0 it is the control, and says so",
    ),
    "group_ftrl": StepCase(
        sparing.GroupFtrl(lambda1=2),
        after=(PLAIN, sparing.DropZeroRows(id="realised")),
        task=clicks,
        nothing=StepCase(sparing.GroupFtrl(), task=poolings, nothing="is the case"),
    ),
    "drop_zero_rows": StepCase(
        sparing.DropZeroRows(),
        before=(TRAIN,),
        task=partial(clicks, EmptyRows),
        nothing=StepCase(sparing.DropZeroRows(), before=(TRAIN,), task=clicks, nothing="is the case"),
    ),
    "federate": StepCase(
        sparing.Federate(
            clients=3,
            rounds_per_task=2,
            fraction=0.6,
            local_epochs=1,
            batch_size=8,
            lr=0.01,
            classes_per_client=2,
            engine="inprocess",
        ),
        nothing="training moves the weights",
    ),
    "rpgd": StepCase(
        sparing.Rpgd(momentum=0.9, freeze_g_steps=2, g_shrink=0.5),
        after=(PLAIN,),
        nothing=StepCase(sparing.Rpgd(), task=poolings, nothing="is the case"),
    ),
    "weight_norm": StepCase(
        sparing.WeightNormalization(init="data"),
        after=(PLAIN,),
        nothing=StepCase(sparing.WeightNormalization(), task=poolings, nothing="is the case"),
    ),
    "quantize": StepCase(
        sparing.Quantize(goal="bytes", max_loss=1.0, samples=8),
        before=(TRAIN,),
        nothing=StepCase(sparing.Quantize(), before=(TRAIN,), task=poolings, nothing="is the case"),
    ),
    "condense": StepCase(
        sparing.Condense(
            method="dc",
            per_class=2,
            iterations=3,
            outer_steps=2,
            inner_steps=1,
            network=BLOCKS,
            settings={"checkpoint_every": 1},
        ),
        after=(LAST,),
        nothing=StepCase(sparing.Condense(method="random", per_class=16), nothing="is the case"),
    ),
    "export": StepCase(
        sparing.Export(),
        before=(TRAIN,),
        nothing=StepCase(sparing.Export(id="again"), before=(TRAIN, sparing.Export()), nothing="is the case"),
    ),
    "transfer": StepCase(
        sparing.Transfer(task="digits"),
        nothing=StepCase(sparing.Transfer(task="digits"), task=Digits, nothing="is the case"),
    ),
    "audit_backdoor": StepCase(
        sparing.AuditBackdoor(
            defences=("patch_scan", "pixel_range", "residual_map"),
            settings={"patch_scan": {"sides": [4], "random": 0, "images": 20}},
            holdout=20,
            victims=1,
            epochs=1,
            condense=sparing.Condense(
                method="dc",
                per_class=1,
                iterations=2,
                outer_steps=2,
                inner_steps=1,
                network={**BLOCKS, "hidden": 4},
                settings={"checkpoint_every": 1},
            ),
            simulate="doorping",
            size=2,
            portion=0.2,
            max_steps=3,
        ),
        before=(TRAIN,),
        task=photographs,
        nothing=StepCase(sparing.AuditBackdoor(), task=photographs, nothing="is the case"),
    ),
    "augment": StepCase(
        sparing.Augment(flip=0.5, randaugment=2),
        after=(LAST,),
        task=photographs,
        nothing=StepCase(sparing.Augment(crop="off", jitter=0), task=photographs, nothing="is the case"),
    ),
    "stream": StepCase(
        StreamSpikes(),
        before=(TRAIN,),
        task=few_events,
        nothing=StepCase(
            StreamSpikes(id="again"), before=(TRAIN, StreamSpikes()), task=few_events, nothing="is the case"
        ),
    ),
    "ema": StepCase(
        sparing.Ema(decay=0.9, use="best"),
        after=(LAST,),
        nothing="every training has weights to average",
    ),
    "smooth_labels": StepCase(sparing.SmoothLabels(), after=(LAST,), nothing="it always adds a term"),
    "curriculum": StepCase(
        sparing.Curriculum(
            metrics={"sequence_length": {}, "vocabulary_rarity": {"start": 50}},
            postprocess="truncate",
            length={"start": 4},
        ),
        after=(PLAIN,),
        task=sentences,
        nothing=StepCase(sparing.Curriculum(metrics={"same": {}}, own={"same": no_difference}), nothing="is the case"),
    ),
    "drop_tokens": StepCase(
        sparing.DropTokens(start=2, multiple=1),
        after=(PLAIN,),
        task=sentences,
        nothing=StepCase(sparing.DropTokens(start=500), task=sentences, nothing="is the case"),
    ),
    "token_lr": StepCase(
        sparing.TokenLr(),
        after=(PLAIN,),
        task=sentences,
        nothing="every training has a learning rate",
    ),
    "warmup_cosine": StepCase(
        sparing.WarmupCosine(warmup_share=0.25), after=(LAST,), nothing="every training has a learning rate"
    ),
}


def image_folder(place: Path) -> Path:
    """A folder of class sub-folders with eight small images each."""
    from PIL import Image

    if any(place.iterdir()):
        return place
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (place / label).mkdir(parents=True)
        for number in range(24):
            pixels = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


def cifar100_files(place: Path) -> Path:
    """A data folder with CIFAR-100's two binary files: of each class sixteen images to train on and two to test."""
    folder = place / "cifar100" / "cifar-100-binary"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for seed, (name, count) in enumerate({"train.bin": 1600, "test.bin": 200}.items()):
            records = np.random.RandomState(seed).randint(0, 256, (count, 2 + 3072)).astype(np.uint8)
            records[:, 1] = np.arange(count) % 100
            records[:, 0] = records[:, 1] // 5
            (folder / name).write_bytes(records.tobytes())
    return place


def text_table(place: Path) -> Path:
    """A CSV file of a few texts."""
    path = place / "texts.csv"
    if not path.exists():
        rows = [f'"{" ".join(row)}, or not",{number % 2}' for number, row in enumerate(word_rows())]
        path.write_text("\n".join(["text,label", *rows]), "utf8")
    return path


def tu_files(place: Path) -> Path:
    """A folder of TU's text files: the paths and rings of :class:`TinyGraphs`, numbered nodes and a number of each."""
    packed = PackedGraphs.of(TinyGraphs().read(None))
    owner = torch.repeat_interleave(torch.arange(len(packed)), packed.sizes)
    tables = {
        "A": packed.together().edge_index.T + 1,
        "graph_indicator": owner[:, None] + 1,
        "graph_labels": packed.y[:, None] * 2 - 1,
        "node_labels": (torch.arange(len(owner)) - packed.node_ptr[owner])[:, None],
        "node_attributes": packed.x,
    }
    for name, rows in tables.items():
        (place / f"RINGS_{name}.txt").write_text("\n".join(", ".join(map(str, row)) for row in rows.tolist()), "ascii")
    return place


def people_file(place: Path) -> Path:
    """Sixty people with a sensitive attribute, and edges between them."""
    path = place / "people.npz"
    if not path.is_file():
        draw = np.random.RandomState(0)
        y = np.arange(60) % 2
        x = draw.randn(60, 3) + y[:, None]
        save_node_table(path, x, "abc", y, draw.randint(0, 60, (2, 150)), sens=np.arange(60) // 2 % 2)
    return path


def scenes(name: str) -> sparing.Task:
    """The images of :func:`coco_folder` in memory, for detectors and segmenters."""
    with tempfile.TemporaryDirectory() as folder:
        task = registered_task(name, path=str(coco_folder(Path(folder))), size=32)
        splits = task.splits(None)
        for part in (splits.train, splits.val, splits.calibration, splits.test):
            part.fingerprint()
    return task


NARROW_BACKBONE = {"name": "mobilenet", "widths": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "expansion": 2}


TASKS = {
    "digits": lambda data, scratch: TaskCase(Digits),
    "continual": lambda data, scratch: TaskCase(lambda: registered_task("continual", of="digits", tasks=3)),
    "cora": lambda data, scratch: TaskCase(lambda: registered_task("cora"), data),
    "citeseer": lambda data, scratch: TaskCase(lambda: registered_task("citeseer"), data),
    "fashion_mnist": lambda data, scratch: TaskCase(lambda: registered_task("fashion_mnist"), data),
    "cifar10": lambda data, scratch: TaskCase(lambda: registered_task("cifar10"), data),
    "cifar100": lambda data, scratch: TaskCase(lambda: registered_task("cifar100"), cifar100_files(scratch)),
    "sign_digits": lambda data, scratch: TaskCase(lambda: registered_task("sign_digits"), data),
    "recidivism": lambda data, scratch: TaskCase(lambda: registered_task("recidivism"), data),
    "credit_default": lambda data, scratch: TaskCase(lambda: registered_task("credit_default"), data),
    "german_credit": lambda data, scratch: TaskCase(lambda: registered_task("german_credit"), data),
    "node_table": lambda data, scratch: TaskCase(lambda: registered_task("node_table", path=str(people_file(scratch)))),
    "mutag": lambda data, scratch: TaskCase(
        lambda: registered_task("mutag"), data, repeats="6 pairs of its molecules are the same graph"
    ),
    "nci1": lambda data, scratch: TaskCase(lambda: registered_task("nci1"), data),
    "proteins": lambda data, scratch: TaskCase(
        lambda: registered_task("proteins"), data, repeats="49 of its proteins are the same graph as another"
    ),
    "dd": lambda data, scratch: TaskCase(lambda: registered_task("dd"), data),
    "tu_folder": lambda data, scratch: TaskCase(lambda: registered_task("tu_folder", path=str(tu_files(scratch)))),
    "sst2": lambda data, scratch: TaskCase(lambda: registered_task("sst2", train_limit=2000), data),
    "ag_news": lambda data, scratch: TaskCase(lambda: registered_task("ag_news", train_limit=2000), data),
    "trec": lambda data, scratch: TaskCase(lambda: registered_task("trec"), data),
    "squad": lambda data, scratch: TaskCase(
        lambda: registered_task("squad", train_limit=200, test_limit=40, length=160, stride=32), data
    ),
    "text_file": lambda data, scratch: TaskCase(
        lambda: registered_task("text_file", path=str(text_table(scratch)), length=10, vocab_size=60)
    ),
    "hflights": lambda data, scratch: TaskCase(lambda: registered_task("hflights"), data),
    "click_table": lambda data, scratch: TaskCase(
        lambda: registered_task("click_table", path=str(click_table(scratch)), exclude=["row"]),
        repeats="rows are known by six shops and 64 bins of prices",
    ),
    "gesture_events": lambda data, scratch: TaskCase(lambda: registered_task("gesture_events"), data),
    "dvs128_gesture": lambda data, scratch: TaskCase(
        lambda: registered_task("dvs128_gesture", dt_us=1000, T=4, downsample=16), dvs_files(scratch)
    ),
    "event_folder": lambda data, scratch: TaskCase(
        lambda: registered_task("event_folder", path=str(event_folder(scratch)), side=8, dt_us=1000, T=4, downsample=1)
    ),
    "masked_lm": lambda data, scratch: TaskCase(lambda: registered_task("masked_lm", copies=2), data),
    "tiny_shakespeare": lambda data, scratch: TaskCase(lambda: registered_task("tiny_shakespeare"), data),
    "us_addresses": lambda data, scratch: TaskCase(
        lambda: registered_task("us_addresses", vocab_size=600),
        data,
        repeats="some lines, such as greetings, are in many addresses",
        weight=lambda batch: int(batch["attention_mask"][:, 1:].sum()),
    ),
    "text_corpus": lambda data, scratch: TaskCase(
        lambda: registered_task("text_corpus", path=str(text_files(scratch)), length=24, vocab_size=260)
    ),
    "coco_detection": lambda data, scratch: TaskCase(
        lambda: registered_task("coco_detection", path=str(coco_folder(scratch)), size=32)
    ),
    "coco_segmentation": lambda data, scratch: TaskCase(
        lambda: registered_task("coco_segmentation", path=str(coco_folder(scratch)), size=32)
    ),
    "emoji80_detection": lambda data, scratch: TaskCase(
        lambda: registered_task("emoji80_detection", train_limit=200, test_limit=40), data
    ),
    "emoji80_segmentation": lambda data, scratch: TaskCase(
        lambda: registered_task("emoji80_segmentation", train_limit=200, test_limit=40), data
    ),
    "image_folder": lambda data, scratch: TaskCase(
        lambda: registered_task("image_folder", path=str(image_folder(scratch)), size=8)
    ),
}
"""Name → (data folder, scratch folder) → case."""
NEEDS_DATA = frozenset(
    {
        "fashion_mnist",
        "cifar10",
        "gesture_events",
        "sign_digits",
        "cora",
        "citeseer",
        "recidivism",
        "credit_default",
        "german_credit",
        "mutag",
        "nci1",
        "proteins",
        "dd",
        "sst2",
        "ag_news",
        "trec",
        "masked_lm",
        "squad",
        "hflights",
        "tiny_shakespeare",
        "us_addresses",
        "emoji80_detection",
        "emoji80_segmentation",
    }
)


MODELS = {
    "alexnet": ModelCase("alexnet", Digits),
    "bert": ModelCase("bert", few_texts, SMALL_BERT),
    "blocknet": ModelCase("blocknet", Digits, {"width": 4, "depth": 2}),
    "cnn6": ModelCase("cnn6", Digits, {"width": 2, "hidden": 8}),
    "convnet": ModelCase("convnet", Digits, {"widths": [4, 8]}),
    "emo": ModelCase("emo", small_photos, {"variant": "0.14M", "num_classes": 3, "image_size": 16, **NARROW}),
    "gat": ModelCase("gat", TinyGraph, {"hidden": 4, "heads": 2}, apart=False),
    "gcn": ModelCase("gcn", TinyGraph, {"hidden": 8}, apart=False),
    "gpt": ModelCase("gpt", lines, {"dim": 16, "depth": 3, "heads": 2, "dropout": 0.0}),
    "gesture_snn": ModelCase("gesture_snn", few_events, SMALL_SNN),
    "ms_res_snn": ModelCase(
        "ms_res_snn",
        partial(small_photos, 32),
        {"num_classes": 3, "T": 2, "r_c": 2, "widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1]},
    ),
    "lenet": ModelCase("lenet", small_photos, {"in_channels": 3, "num_classes": 3, "image_size": 16}),
    "vgg11": ModelCase("vgg11", partial(small_photos, 32), {"num_classes": 3, "width": 2}),
    "sage": ModelCase("sage", TinyGraph, {"hidden": 8}, apart=False),
    "cpf": ModelCase("cpf", TinyPeople, {"num_nodes": 120, "num_layers": 3, "hidden": 4}, apart=False),
    "fair_student": ModelCase("fair_student", TinyPeople, {"student": {"name": "glnn", "hidden": 4}}, apart=False),
    "glnn": ModelCase("glnn", TinyPeople, {"hidden": 4, "hops": 2}, apart=False),
    "sgc_student": ModelCase("sgc_student", TinyPeople, {"hidden": 4}, apart=False),
    "graph_gcn": ModelCase("graph_gcn", TinyGraphs, {"hidden": 8, "depth": 2}, sample=graph_of),
    "mae_vit": ModelCase("mae_vit", Digits, {"patch_size": 2, "dim": 8, "depth": 2, "heads": 2}),
    "mobilenet": ModelCase("mobilenet", small_photos, {"num_classes": 3, "image_size": 16, "widths": [4, 6, 8, 8]}),
    "segmenter": ModelCase(
        "segmenter",
        partial(scenes, "coco_segmentation"),
        {"backbone": NARROW_BACKBONE, "num_classes": 3, "channels": 6, "dilations": [1, 2], "stage": 3},
    ),
    "ssdlite": ModelCase(
        "ssdlite",
        partial(scenes, "coco_detection"),
        {"backbone": NARROW_BACKBONE, "num_classes": 2, "image_size": 32, "extra_channels": [8]},
    ),
    "resnet": ModelCase("resnet", Digits, {"widths": [4, 8], "depths": 1}),
    "vit": ModelCase("vit", Digits, {"patch_size": 2, "dim": 8, "depth": 2, "heads": 2}),
    "lr": ModelCase("lr", clicks),
    "fm": ModelCase("fm", clicks, {"dim": 4}),
    "fnn": ModelCase("fnn", clicks, {"dim": 4, "widths": [6], "dropout": 0.1}),
    "deepfm": ModelCase("deepfm", clicks, {"dim": 4, "widths": [6], "dropout": 0.1}),
    "dcnv2": ModelCase("dcnv2", clicks, {"dim": 4, "widths": [6], "layers": 2, "rank": 3}),
    "xdeepint": ModelCase("xdeepint", clicks, {"dim": 4, "num_layers": 2, "num_subspaces": 2}),
    "remapped_ids": ModelCase("remapped_ids", clicks, {"model": {"name": "lr", "cardinalities": [2, 3]}}),
    "mlp": ModelCase("mlp", Digits, {"widths": [8], "dropout": 0.1}),
}
