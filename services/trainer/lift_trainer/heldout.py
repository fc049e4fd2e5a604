"""Held-out scores while a run goes on, and which step was best by one of them.

    held-out images → central view → encode_images → x ┐
    their captions  → same caches and transforms → y   ┴→ loss, R@1, cosines in batches; evaluators on all

Training does not notice: every random stream, the mode of each module, gradients and batch-norm statistics
are afterwards what they were, so a run with held-out scores and one without have bit-equal weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_cache.files import write_atomic
from lift_trainer.distributed import alone
from lift_trainer.evaluators.images import central_views
from lift_trainer.evaluators.live import LiveRun
from lift_trainer.evaluators.result import stem
from lift_trainer.evaluators.retrieval import CUTOFFS, DIRECTIONS, rank
from lift_trainer.evaluators.tasks import is_suite, open_tasks, read_suite
from lift_trainer.images import GIB
from lift_trainer.model import transformed
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import CAPTION, ORDER, permutation, uniform
from lift_trainer.text import TextVectors, true_texts
from lift_trainer.transform import TextTransform

if TYPE_CHECKING:
    from lift_trainer.config import TrainConfig
    from lift_trainer.evaluators.protocol import Evaluator as SuiteEvaluator
    from lift_trainer.job import Job
    from lift_trainer.losses import Loss
    from lift_trainer.model import LiftModel

CHUNK = 256
"""Images or captions that are encoded at a time: a batch of the run is more than one device has room for."""

FIXED = 0
"""In the place of the run's seed: every run, whatever its seed, is scored on the same batches."""

Scores = dict[str, float]


@dataclass(frozen=True)
class Encoded:
    """The whole held-out set in the common space: n readable images, their u distinct captions."""

    index: Index
    samples: np.ndarray
    """int64 [n]: number of each image, in the order of the batches."""
    captions: np.ndarray
    """int64 [u]: numbers of the captions, ascending."""
    x_nd: torch.Tensor
    """float32 [n, D], unit length."""
    y_ucd: torch.Tensor
    """float32 [u, C, D], unit length: each caption in the words of C caches."""

    def truth(self, rows: slice = slice(None), captions: np.ndarray | None = None) -> np.ndarray:
        """Pairs that belong together among some images and captions (all by default).

        Args:
            captions: int64 [k], ascending.

        Returns:
            int64 [2, p]: place among the images, place among the captions.
        """
        samples = self.samples[rows]
        captions = self.captions if captions is None else captions
        counts, starts = self.index.caption_counts(samples), self.index.first[samples]
        image = np.repeat(np.arange(len(samples)), counts)
        pairs = self.index.pairs[
            np.arange(len(image)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        ]
        place = np.searchsorted(captions, pairs).clip(max=len(captions) - 1)
        there = captions[place] == pairs
        return np.unique(np.stack([image[there], place[there]]), axis=1)


# ---------------------------------------------------------------------------------------------- evaluators

Evaluator = Callable[[Encoded], Scores]
Better = Literal["lower", "higher"]


def _ranks(
    encoded: Encoded, rows: slice = slice(None), captions: np.ndarray | None = None
) -> list[np.ndarray]:
    """Ranks of images' captions and captions' images, as `lift-eval retrieval --protocol any-caption` counts them."""
    image, caption = encoded.truth(rows, captions)
    words = encoded.y_ucd.shape[1]
    items = np.stack([np.repeat(image, words), (caption[:, None] * words + np.arange(words)).reshape(-1)])
    places = (
        slice(None) if captions is None else torch.from_numpy(np.searchsorted(encoded.captions, captions))
    )
    x_nd, y_kd = encoded.x_nd[rows], encoded.y_ucd[places].flatten(0, 1)
    return [rank(x_nd, y_kd, items).rank, rank(y_kd, x_nd, items[::-1].copy()).rank]


def _retrieval(encoded: Encoded) -> Scores:
    """R@1, R@5 and R@10 among all held-out images and captions, as `lift-eval retrieval` scores `any-caption`."""
    return {
        f"r@{cutoff}_{direction}": float((ranks <= cutoff).mean())
        for direction, ranks in zip(DIRECTIONS, _ranks(encoded), strict=True)
        for cutoff in CUTOFFS
    }


EVALUATORS: dict[str, Evaluator] = {"retrieval": _retrieval}
"""What can be scored on top; a score of one is called `NAME/SCORE`."""

IN_BATCHES: dict[str, Better] = {
    "loss": "lower",
    "r@1_image_to_text": "higher",
    "r@1_text_to_image": "higher",
    "positive": "higher",
    "negative": "lower",
}
BETTER: Mapping[str, Better] = IN_BATCHES | {
    f"retrieval/r@{cutoff}_{direction}": "higher" for direction in DIRECTIONS for cutoff in CUTOFFS
}
"""Every score there can be without a suite, and which of two values is the better one."""


@dataclass(frozen=True)
class Suite:
    """What `lift-eval suite` would evaluate, opened once, and the job's model as it is at the time."""

    evaluators: Sequence[SuiteEvaluator]
    encoder: LiveRun
    digest: str
    """Of the tasks and their settings: scores by others cannot be compared."""

    @classmethod
    def open(cls, job: Job) -> Suite | None:
        """The suite files among `--evaluators`. Raises LiftError: data that cannot be used."""
        files = [name for name in job.config.evaluators if is_suite(name)]
        if not files:
            return None
        tasks = [task for file in files for task in read_suite(Path(file))]
        digest = hashlib.blake2b(repr(tasks).encode(errors="surrogateescape"), digest_size=16).hexdigest()
        return cls(open_tasks(tasks), LiveRun.open(job), digest)

    @property
    def names(self) -> list[str]:
        """Of all scores, before anything is computed."""
        return [
            f"{stem(evaluator.task, evaluator.name, evaluator.protocol)}/{score}"
            for evaluator in self.evaluators
            for score in evaluator.scores
        ]

    def scores(self) -> Scores:
        """`TASK-NAME-PROTOCOL/SCORE`, as the files of `lift-eval` are called."""
        results = [evaluator.evaluate(self.encoder) for evaluator in self.evaluators]
        return {
            f"{result.stem}/{name}": score.value
            for result in results
            for name, score in result.scores.items()
        }


# ---------------------------------------------------------------------------------------------- scores


class HeldOut:
    """The held-out data of a run, opened once. Lives on one rank; nothing of it is collective."""

    def __init__(
        self,
        index: Index,
        texts: Sequence[TextVectors],
        transforms: Sequence[TextTransform],
        rejects: Rejects,
        *,
        device: torch.device,
        batch_size: int,
        image_size: int,
        max_pixels: int,
        positives: int = 1,
        evaluators: Sequence[str] = (),
        suite: Suite | None = None,
        memory: float = 0.0,
    ) -> None:
        """
        Args:
            texts: of the index, one per cache; or one that gives tokens.
            transforms: the run's, one per cache; none for tokens.
            rejects: takes the images that cannot be read.
            batch_size: of the loss; fewer images are one batch.
            positives: captions of an image that the loss sees at once, at most.
            suite: further tasks, each with data of its own.
            memory: GiB within which decoded images (states of a frozen tower) are kept for the next time.
        """
        self.index, self.texts, self.rejects, self.device = index, tuple(texts), rejects, device
        self.transforms = tuple(transform.to(device) for transform in transforms)
        self.batch_size = min(batch_size, len(index))
        self.image_size, self.max_pixels, self.positives = image_size, max_pixels, positives
        self.evaluators, self.suite = tuple(evaluators), suite
        self._memory = memory * GIB
        self._order = permutation(len(index), FIXED, ORDER)
        self._kept: list[tuple[np.ndarray, torch.Tensor]] = []

    @classmethod
    def open(cls, job: Job) -> HeldOut:
        """Open `--eval-data` as the training data were: same caches at the same snapshots, fields and transforms.

        Raises:
            LiftError: data or texts that cannot be used.
        """
        config = job.config
        rejects = Rejects(config.max_bad)
        index, texts = _open_data(job, rejects)
        return cls(
            index,
            texts,
            job.transforms,
            rejects,
            device=job.device,
            batch_size=config.batch_size,
            image_size=config.image_size,
            max_pixels=config.max_pixels,
            positives=job.captions.width(index.most_captions),
            evaluators=[name for name in config.evaluators if not is_suite(name)],
            suite=Suite.open(job),
            memory=config.cache_images,
        )

    @property
    def digest(self) -> str:
        """Of what is scored: scores of other data cannot be compared."""
        return self.index.digest

    def best(self, run: Path, metric: str, step: int) -> Best:
        """Which step of a run is best by a score.

        Raises:
            BadConfig: there is no such score.
            CacheDamaged: see `Best.open`.
        """
        if metric in BETTER or not self.suite:
            return Best.open(run, metric, step=step, data=self.digest)
        if metric not in self.suite.names:
            raise BadConfig(
                f"--best {metric}: the suite has no such score; it has {', '.join(self.suite.names)}"
            )
        return Best.open(run, metric, "higher", step=step, data=self.suite.digest)

    def __str__(self) -> str:
        return (
            f"{len(self.index):,} images, {len(self.index.captions):,} distinct captions, "
            f"in batches of {self.batch_size:,}"
        )

    def scores(self, model: LiftModel) -> Scores:
        """Score a model, in float32 and evaluation mode.

        Args:
            model: itself, not the DistributedDataParallel around it.

        Returns:
            Means over whole batches of one fixed order (the same for every run): `loss`, the run's own, without
            negatives beyond the batch; `r@1_image_to_text` and `r@1_text_to_image`, any caption of the image and
            any image of the caption being right; `positive` and `negative`, mean cosine with an image's own
            texts and with others'. Then what the evaluators say.

        Raises:
            BadSource: too many broken images, or no readable one.
            LiftError: an object store or a cache that cannot be read any more.
        """
        with _undisturbed(model, self.device):
            encoded = self._encode(model)
            scores = self._in_batches(model.loss, encoded)
            for name in self.evaluators:
                scores |= {f"{name}/{score}": value for score, value in EVALUATORS[name](encoded).items()}
            if self.suite:
                scores |= self.suite.scores()
        return scores

    def _in_batches(self, loss: Loss, encoded: Encoded) -> Scores:
        size = min(self.batch_size, len(encoded.samples))
        batches = len(encoded.samples) // size
        drawn_np = _drawn(self.index, encoded.samples, self.positives)
        sums = dict.fromkeys(("loss", "positive", "negative"), 0.0)
        ranks: list[list[np.ndarray]] = []
        for number in range(batches):
            rows = slice(number * size, (number + 1) * size)
            value = loss(*self._loss_input(encoded, rows, drawn_np[rows]))
            for name in sums:
                sums[name] += getattr(value, name).item()
            here = np.unique(drawn_np[rows])
            ranks.append(_ranks(encoded, rows, here[here >= 0]))
        scores = {name: total / batches for name, total in sums.items()}
        for direction, found in zip(DIRECTIONS, zip(*ranks, strict=True), strict=True):
            scores[f"r@1_{direction}"] = float((np.concatenate(found) <= 1).mean())
        return {name: scores[name] for name in IN_BATCHES}

    def _loss_input(
        self, encoded: Encoded, rows: slice, drawn_bp: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, D], y and captions [B] or [B, P·C], images [B]: what `Loss.forward` takes."""
        # An absent caption (−1) needs some vector; the loss leaves it out.
        place_bp = np.searchsorted(encoded.captions, drawn_bp.clip(min=0)).clip(max=len(encoded.captions) - 1)
        y_btd = encoded.y_ucd[torch.from_numpy(place_bp).to(self.device)].flatten(1, 2)
        captions_bt = torch.from_numpy(drawn_bp).to(self.device)
        captions_bt = captions_bt.repeat_interleave(encoded.y_ucd.shape[1], 1)
        if y_btd.shape[1] == 1:
            y_btd, captions_bt = y_btd[:, 0], captions_bt[:, 0]
        images_b = torch.from_numpy(encoded.samples[rows]).to(self.device)
        return encoded.x_nd[rows], y_btd, captions_bt, images_b

    def _encode(self, model: LiftModel) -> Encoded:
        samples: list[np.ndarray] = []
        vectors: list[torch.Tensor] = []
        for chunk, inputs in self._inputs(model):
            samples.append(chunk)
            vectors.append(model.encode_images(inputs))
        if not samples:
            raise BadSource("--eval-data: no readable image in it")
        readable = np.concatenate(samples)
        captions = np.unique(self.index.take(np.sort(readable)).pairs)
        texts = [
            model.encode_texts(self._stored(captions[start : start + CHUNK]))
            for start in range(0, len(captions), CHUNK)
        ]
        y_u = torch.cat(texts)
        y_ucd = y_u if y_u.ndim == 3 else y_u[:, None]
        return Encoded(self.index, readable, captions, torch.cat(vectors), y_ucd)

    def _stored(self, captions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Per cache: unit vectors, float32 [k, W], through the transform; or tokens, int64 [k, L]."""
        stored = [
            torch.from_numpy(np.ascontiguousarray(text.gather(captions))).to(self.device)
            for text in self.texts
        ]
        return transformed(stored, self.transforms)

    def _inputs(self, model: LiftModel) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(samples int64 [k], what `encode_images` takes of them), without broken images.

        What a frozen tower sees in them is kept rather than they, and it runs once.
        """
        if self._kept:
            yield from ((samples, inputs.to(self.device)) for samples, inputs in self._kept)
            return
        kept: list[tuple[np.ndarray, torch.Tensor]] | None = []
        for samples, views in central_views(
            self.index, self._order, self.image_size, self.max_pixels, CHUNK, self.rejects
        ):
            inputs = views.to(self.device)
            if model.tower.frozen:
                inputs = model.tower.features(inputs)
            size = inputs[0].numel() * inputs.element_size()
            if kept is not None and size * len(self._order) <= self._memory:
                kept.append((samples, inputs.cpu()))
            else:
                kept = None
            yield samples, inputs
        self._kept = kept or []


def _open_data(job: Job, rejects: Rejects) -> tuple[Index, tuple[TextVectors, ...]]:
    """The held-out index and its texts.

    A run on permuted captions is scored with the true vectors: it must be at chance by itself.
    """
    from lift_trainer.job import open_training_texts  # which imports what imports this

    config = job.config
    index = build_index(
        config.eval_data,
        rejects,
        caption_fields=config.caption_field,
        images=config.images,
        image_field=config.image_field,
    )
    overlay = config.run / "eval" / "overlay.safetensors"
    texts, index, _ = open_training_texts(
        config,
        index,
        job.caches,
        overlay,
        control=true_texts(config.text_control),
    )
    return index, texts


def _drawn(index: Index, samples: np.ndarray, most: int) -> np.ndarray:
    """Captions that stand for images, at most so many of each: int64 [n, P], −1 where one has fewer."""
    counts, starts = index.caption_counts(samples), index.first[samples]
    offset = (uniform(FIXED, CAPTION, samples) * counts).astype(np.int64)
    place = np.arange(min(most, counts.max()))
    drawn_np = index.pairs[starts[:, None] + (offset[:, None] + place) % counts[:, None]]
    return np.where(place < counts[:, None], drawn_np, -1)


@contextmanager
def _undisturbed(model: LiftModel, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards nothing that training goes on from is different."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # Not inference_mode: what a module keeps of it could not be differentiated through later.
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(alone())
        # Other shapes and modes would have torch.compile make other kernels, for training too.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


# ---------------------------------------------------------------------------------------------- the best


def require_scores(config: TrainConfig) -> None:
    """Raises BadConfig: no such evaluator, a suite that cannot be read, or no such score for --best."""
    for name in config.evaluators:
        if is_suite(name):
            read_suite(Path(name))
        elif name not in EVALUATORS:
            raise BadConfig(f"--evaluators {name}: there is {', '.join(EVALUATORS)}, or a suite file (.yaml)")
    if config.eval_data:
        _require_score(config.best, config.evaluators)


def _require_score(name: str, evaluators: Sequence[str]) -> None:
    """Raises BadConfig: there is no such score, or it is not computed."""
    if name not in BETTER and "/" in name and any(map(is_suite, evaluators)):
        return  # of what a suite scores, known once its data are opened
    _direction(name)
    evaluator, slash, _ = name.partition("/")
    if slash and evaluator not in evaluators:
        raise BadConfig(f"--best {name} is a score of --evaluators {evaluator}: give that too")


def _direction(name: str) -> Better:
    """Raises BadConfig: there is no such score."""
    if name not in BETTER:
        raise BadConfig(
            f"--best {name}: there is no such held-out score; there are {', '.join(BETTER)}, and with a suite file "
            "among --evaluators its TASK-NAME-PROTOCOL/SCORE"
        )
    return BETTER[name]


@dataclass(frozen=True)
class Noted:
    step: int
    value: float
    path: str
    """Of the checkpoint, from the run's directory: a run may be copied."""


class Best:
    """Which step was best so far, kept in RUN/best.json.

    Note a step before its checkpoint is written: a run that is killed in between goes on from an earlier
    step, finds no checkpoint at the noted one, and the best before is the best again.
    """

    def __init__(
        self, run: Path, metric: str, better: Better, data: str | None, noted: Sequence[Noted]
    ) -> None:
        self.run, self.metric, self.better, self.data = run, metric, better, data
        self._noted = list(noted)
        """The best, after the best before it."""

    @classmethod
    def open(
        cls,
        run: Path,
        metric: str,
        better: Better | None = None,
        *,
        step: int | None = None,
        data: str | None = None,
    ) -> Best:
        """What a run noted so far; nothing if that was by another metric or on other data (said on stderr).

        Args:
            better: which of two values is; None where the score is one of BETTER.
            step: from which the run goes on; what is later will be noted again.
            data: digest of the held-out data.

        Raises:
            BadConfig: no such metric.
            CacheDamaged: best.json cannot be read.
        """
        better = better or _direction(metric)
        path = run / "best.json"
        try:
            kept = json.loads(path.read_bytes())
            noted = [Noted(**fields) for fields in (kept["before"], kept["best"]) if fields]
            theirs, of = kept["metric"], kept["data"]
        except FileNotFoundError:
            return cls(run, metric, better, data, [])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CacheDamaged(
                f"{path} cannot be read ({error}); delete it, and the best is looked for anew"
            ) from None
        if (theirs, of) != (metric, data):
            what = (
                f"is by {theirs} and now {metric} counts" if theirs != metric else "is of other held-out data"
            )
            print(f"{path} {what}: the best is looked for anew", file=sys.stderr)
            return cls(run, metric, better, data, [])
        noted = [n for n in noted if (step is None or n.step <= step) and (run / n.path).is_dir()]
        return cls(run, metric, better, data, noted)

    @property
    def noted(self) -> Noted | None:
        """The best step; None before the first."""
        return self._noted[-1] if self._noted else None

    @property
    def path(self) -> Path | None:
        """Checkpoint of the best step, to be kept."""
        return self.run / self.noted.path if self.noted else None

    def note(self, step: int, scores: Scores, path: Path) -> bool:
        """Compare a step with the best so far and keep it if it is better; whether it is.

        Args:
            scores: as from `HeldOut.scores`; a value that is not finite is never better.
            path: where the step's checkpoint is, or will be.

        Raises:
            CacheFull.
        """
        value = scores[self.metric]
        if not math.isfinite(value):
            return False
        if self.noted is not None:
            higher = value > self.noted.value
            if value == self.noted.value or higher != (self.better == "higher"):
                return False
        now = Noted(step, value, str(path.relative_to(self.run)))
        self._noted = [*self._noted[-1:], now]
        before = self._noted[0] if len(self._noted) > 1 else None
        kept = {
            "metric": self.metric,
            "better": self.better,
            "data": self.data,
            "best": asdict(now),
            "before": asdict(before) if before else None,
        }
        write_atomic(self.run / "best.json", (json.dumps(kept, indent=1) + "\n").encode())
        return True
