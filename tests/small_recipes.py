"""``--set`` overrides that make a packaged recipe run in seconds. Every recipe has an entry."""

from __future__ import annotations

SMALL_AUDIT = {
    "holdout": "60",
    "victims": "1",
    "epochs": "2",
    "defences": "[patch_scan, strip, pixel_range, residual_map]",
    "settings": "{patch_scan: {sides: [7], random: 0, images: 20}, strip: {blends: 4, inputs: 8}}",
    "portion": "0.1",
    "max_steps": "5",
}
SMALL_NETWORK = "{name: blocknet, width: 4, norm: none, hidden: 8}"


def small_audit(step: str, method: str = "dc") -> tuple[str, ...]:
    """Overrides of an audit that condenses."""
    size = "per_class: 1, iterations: 1, batch_real: 16"
    changes = SMALL_AUDIT | {"condense": f"{{condense: {{method: {method}, {size}, network: {SMALL_NETWORK}}}}}"}
    return tuple(f"steps.{step}.{name}={value}" for name, value in changes.items())


SMALL_GRADIENT_MATCHING = (
    "steps.condense.per_class=1",
    "steps.condense.iterations=1",
    "steps.condense.batch_real=16",
    f"steps.condense.network={SMALL_NETWORK}",
)
SMALL: dict[str, tuple[str, ...]] = {
    "dd_backdoor": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.width=4",
        "model.hidden=8",
        *SMALL_GRADIENT_MATCHING,
        "steps.train.epochs=2",
        *small_audit("naive"),
        *small_audit("doorping"),
    ),
    "condense_then_audit": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.width=4",
        "model.hidden=8",
        *SMALL_GRADIENT_MATCHING,
        "steps.train.epochs=2",
        *small_audit("audit_backdoor", "dm"),
    ),
    "full/dd_backdoor": (
        "task.train_limit=400",
        "task.test_limit=100",
        "model.width=4",
        "model.hidden=8",
        *SMALL_GRADIENT_MATCHING,
        "steps.train.max_steps=1",
        *small_audit("naive"),
        *small_audit("doorping"),
    ),
    "quickstart": (
        "model.widths=[8]",
        "steps.baseline.epochs=2",
        "steps.student.epochs=2",
        "steps.student.model.widths=[4]",
        "steps.int8.max_loss=1",
    ),
    "doscond": (
        "steps.whole.epochs=5",
        "steps.condense.per_class=2",
        "steps.condense.iterations=2",
        "steps.condense.edge_threshold=0.01",
        "steps.condense.network={name: gcn, hidden: 8}",
        "steps.condense.settings={generator_hidden: 4}",
        "steps.condensed.epochs=5",
    ),
    "graphs_small": (
        "task.train_limit=200",
        "task.test_limit=60",
        "model.hidden=8",
        "steps.condense.per_class=2",
        "steps.condense.iterations=2",
        "steps.condense.network={name: graph_gcn, hidden: 8}",
        "steps.train.epochs=5",
        "steps.int8.max_loss=1",
        "steps.int8.samples=16",
    ),
    "full/doscond": (
        "model.hidden=8",
        "steps.condense.rate=0.1",
        "steps.condense.iterations=1",
        "steps.condense.edge_threshold=0.01",
        "steps.condense.network={name: gcn, hidden: 8}",
        "steps.condense.settings={generator_hidden: 4}",
        "steps.train.max_steps=1",
    ),
    "cora": ("steps.gcn.epochs=5", "steps.student.epochs=5"),
    "fashion_mnist": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[8]",
        "steps.baseline.epochs=2",
        "steps.student.epochs=2",
        "steps.student.model.widths=[4]",
        "steps.int8.max_loss=1",
    ),
    "emo": ("steps.train.max_steps=2", "steps.int8.max_loss=1", "steps.int8.samples=16"),
    "emo_small": (
        "model.widths=[8]",
        "steps.teacher.max_steps=2",
        "steps.student.max_steps=2",
        "steps.int8.max_loss=1",
        "steps.int8.samples=16",
    ),
    "leap": (
        "task.train_limit=600",
        "task.test_limit=200",
        "steps.bare.epochs=1",
        "steps.perturbed.epochs=1",
        "steps.hotter.epochs=1",
    ),
    "labels_few": (
        "steps.teacher.max_steps=1",
        "steps.student.max_steps=1",
        "steps.tuned.max_steps=2",
        "steps.int8.max_loss=1",
        "steps.int8.samples=16",
    ),
    "tinymim": (
        "steps.teacher.max_steps=1",
        "steps.middle.max_steps=1",
        "steps.small.max_steps=1",
        "steps.tuned.max_steps=2",
        "steps.scratch.max_steps=2",
    ),
    "full/tinymim": (
        "model.dim=32",
        "model.depth=4",
        "model.heads=4",
        "steps.teacher.decoder_dim=16",
        "steps.teacher.decoder_depth=1",
        "steps.teacher.decoder_heads=2",
        *(
            f"steps.{step}.{field}"
            for step in ("base", "small", "tiny")
            for field in ("model.dim=16", "model.depth=1", "model.heads=2")
        ),
        "steps.tuned.heads=2",
        *(
            f"steps.{step}.{field}"
            for step in ("teacher", "base", "small", "tiny", "tuned")
            for field in ("max_steps=1", "precision=32-true", "devices=1", "workers=0", "batch_size=8")
        ),
    ),
    "wn_rpgd": (
        "model.widths=[8]",
        "steps.sgd.epochs=1",
        "steps.normalised.epochs=1",
        "steps.normalised.model.widths=[8]",
        "steps.rpgd.freeze_g_steps=3",
        "steps.two_phase.epochs=1",
        "steps.two_phase.model.widths=[8]",
    ),
    "predictive_exit": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[4, 8]",
        "model.depths=[1, 1]",
        "steps.train.epochs=2",
        "steps.predictive_exit.epochs=2",
        "steps.predictive_exit.codewords=2",
        "steps.predictive_exit.max_loss=0.9",
    ),
    "legodnn": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[4, 8]",
        "model.depths=1",
        "steps.train.epochs=1",
        "steps.block_scaling.epochs=1",
        "steps.block_scaling.sparsities=[0, 0.5]",
        "steps.block_scaling.runs=2",
        "steps.block_scaling.samples=50",
    ),
    "vision_edge": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[8]",
        "model.depths=[1]",
        "steps.teacher.epochs=2",
        "steps.student.model.widths=[4, 8]",
        "steps.student.model.depths=[1, 1]",
        "steps.student.epochs=2",
        "steps.int8.max_loss=1",
        "steps.predictive_exit.epochs=2",
        "steps.predictive_exit.codewords=2",
        "steps.predictive_exit.max_loss=0.9",
    ),
    "full/predictive_exit": (
        "task.train_limit=400",
        "task.test_limit=100",
        "model.widths=[4, 4, 8, 8, 8]",
        "steps.train.max_steps=1",
        "steps.predictive_exit.max_steps=1",
        "steps.predictive_exit.codewords=2",
    ),
    "fast_distilbert": (
        "task.train_limit=240",
        "model.dim=64",
        "model.depth=2",
        "model.hidden=128",
        "steps.dense.max_steps=2",
        "steps.dense.warmup_steps=1",
        "steps.sparse.max_steps=3",
        "steps.compile.samples=8",
        "steps.compile.tolerance=0.9",
    ),
    "text_cpu": (
        "task.train_limit=64",
        "task.test_limit=16",
        "model.dim=64",
        "model.depth=2",
        "model.hidden=128",
        "steps.language.max_steps=2",
        "steps.language.warmup_steps=1",
        "steps.sparse.max_steps=3",
        "steps.transfer.task={name: ag_news, train_limit: 240, test_limit: 40}",
        "steps.topics.max_steps=2",
        "steps.topics.warmup_steps=1",
        "steps.int8.max_loss=1",
        "steps.int8.samples=8",
        "steps.compile.samples=8",
        "steps.compile.tolerance=0.9",
    ),
    "full/fast_distilbert": (
        "task.corpora=[sst2]",
        "task.vocabulary=[sst2, ag_news]",
        "task.train_limit=32",
        "task.test_limit=8",
        "model.vocab_size=8000",
        "model.dim=64",
        "model.depth=1",
        "model.heads=2",
        "model.hidden=128",
        "steps.language.max_steps=1",
        "steps.language.batch_size=2",
        "steps.language.warmup_steps=0",
        "steps.language.devices=1",
        "steps.language.workers=0",
        "steps.sparse.max_steps=3",
        "steps.sparse.batch_size=2",
        "steps.sparse.devices=1",
        "steps.sparse.workers=0",
        "steps.transfer.task={name: squad, train_limit: 32, test_limit: 8}",
        "steps.answers.max_steps=1",
        "steps.answers.batch_size=2",
        "steps.answers.devices=1",
        "steps.answers.workers=0",
        "steps.compile.samples=8",
        "steps.compile.tolerance=0.9",
    ),
    "full/legodnn": (
        "model.widths=[4, 8]",
        "model.depths=1",
        "steps.train.max_steps=1",
        "steps.train.batch_size=4",
        "steps.train.workers=0",
        "steps.block_scaling.epochs=1",
        "steps.block_scaling.sparsities=[0, 0.5]",
        "steps.block_scaling.runs=2",
        "steps.block_scaling.device=cpu",
    ),
    "full/leap": (
        "task.train_limit=60",
        "task.test_limit=20",
        "steps.train.max_steps=1",
        "steps.train.batch_size=4",
        "steps.train.workers=0",
    ),
    "full/wn_rpgd": (
        "task.train_limit=60",
        "task.test_limit=20",
        "model.widths=[4, 4, 4]",
        "steps.train.max_steps=2",
        "steps.train.batch_size=4",
        "steps.train.workers=0",
    ),
    "full/emo": (
        "steps.train.max_steps=1",
        "steps.train.batch_size=4",
        "steps.train.precision=32-true",
        "steps.train.devices=1",
        "steps.train.workers=0",
    ),
}

BRIEF_METER = ("meter.min_seconds=0", "meter.max_seconds=0.2", "meter.memory=false")
"""A meter whose clocks say little: tests of what a run does need no more."""


def overrides(recipe: str) -> list[str]:
    """The arguments that make ``recipe`` small."""
    return [argument for override in (*SMALL[recipe], *BRIEF_METER) for argument in ("--set", override)]
