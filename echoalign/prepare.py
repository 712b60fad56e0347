"""Everything before the classifier: data, noise, modified images, features, similarities, selections, and what follows
what.

What takes long lies under --cache by a fingerprint of what it depends on (cache.py), so that runs of other methods on
the same setting share it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lab import runs
from lab.runs import HERE, UserError

import numpy as np
import torch
from torch import Tensor

import echomod
import echoselect
import features
import noise
import readers
from baselines import selection
from baselines.semi import clean_probability, scaled
from cache import alone, fingerprint, kept
from generator import shards
from generator.build import build
from methods import WarmUp
from readers import Part
from trainer import Learner, Task, fit


class Prepared:
    """One seed of a setting. `s`: Settings of settings.py. What is not asked for is not made."""

    def __init__(self, s, seed: int, device: torch.device, show: bool = True):
        self.s, self.seed, self.device, self.show = s, seed, device, show
        self.folder = runs.data_dir(s.data_dir)
        self.cache = Path(s.cache).expanduser() if s.cache else HERE / "data" / "cache"
        limits = {"pretrain": s.pretrain, "train_limit": s.train_limit}
        self.data = readers.load(s.dataset, self.folder, download=s.download, seed=seed, **limits)
        d = self.data
        if len(d.train) < 2:
            raise UserError(f"{d.kind.title}: {len(d.train)} training images are too few; lower --pretrain")
        self.noisy = noise.make(
            kind=s.noise,
            rho=s.rate,
            seed=seed,
            dataset=s.dataset,
            variant=d.variant,
            x=d.train.x.numpy(),
            y=d.train.y.numpy(),
            index=None if d.train.index is None else d.train.index.numpy(),
            classes=d.kind.classes,
            folder=self.folder,
            cache=self.cache,
            scale=s.noise_scale,
        )
        self.y = torch.from_numpy(self.noisy.y)
        self.right = self.y == d.train.y
        n = len(self.y)
        rng = np.random.RandomState(seed)
        part = np.sort(rng.choice(n, n - int(round(n * s.val_fraction)), replace=False))
        self.train = torch.zeros(n, dtype=torch.bool)
        self.train[torch.from_numpy(part)] = True

    # ---------------------------------------------------------------------------------------------------------- EchoMod

    @functools.cached_property
    def generator(self) -> echomod.Generator:
        where = {"cache": self.cache, "local": self.local}
        return build(self.s, self.data, self.seed, self.device, show=self.show, **where)

    def local(self, name: str, end: str = "") -> str:
        """<data folder>/weights/<last part of the name> when it is there, else the name itself."""
        place = self.folder / "weights" / (name.split("/")[-1] + end)
        return str(place) if place.exists() else name

    def modify(self, rank: int = 0, world: int = 1) -> shards.Modified | None:
        told = shards.fingerprint(self.generator, self.data.sha256, self.noisy.sha256, self.seed)
        told |= {"limit": self.s.train_limit, "pretrain": self.s.pretrain, "batch": self.s.edit.batch}
        folder = self.cache / "modified" / fingerprint({**told, "shard": self.s.edit.shard})
        sizes = {"shard": self.s.edit.shard, "batch": self.s.edit.batch, "show": self.show}
        with alone(folder) if world == 1 else contextlib.nullcontext():
            return shards.modify(
                *(self.generator, self.data.train.x, self.y, self.seed, folder, told),
                **sizes,
                rank=rank,
                world=world,
            )

    @functools.cached_property
    def modified(self) -> shards.Modified:
        return self.modify()

    # ------------------------------------------------------------------------------------------------ what was learnt

    def _learnt(self, name: str, told: dict, make: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a training gives, under cache/<name>/<fingerprint>."""
        s = self.s
        keys = ("dataset", "model", "lr", "weight_decay", "batch", "precision", "train_limit", "pretrain")
        told = {**told, **{k: getattr(s, k) for k in keys}, "seed": self.seed, "data": self.data.sha256}
        return kept(self.cache / name / fingerprint(told), make)

    @functools.cached_property
    def pretrained(self) -> tuple[Learner, float]:
        """A classifier trained on the clean images `pre` alone, and its test accuracy. Few images are shown more often,
        so that it takes about as many steps as a classifier of the noisy ones: it is a baseline too."""
        d, s = self.data, self.s
        if not len(d.pre):
            raise UserError("this needs clean images for pretraining: give --pretrain")
        task = Task(self.seen("pre"), d.pre.y, self.test, d.kind)

        times = max(1, len(d.train) // len(d.pre))
        more = {"epochs": times * s.epochs, "milestones": tuple(times * m for m in s.milestones)}
        more["eval_every"] = more["epochs"]  # nobody reads its curve

        def make(checkpoint: Path) -> dict:
            learner = Learner(replace(s, **more, eval_last=1), task, self.seed, self.device)
            fit(learner, checkpoint, show=self.show, label="pretraining classifier")
            return learner.plain[0].state_dict()

        told = {"epochs": more["epochs"], "milestones": list(more["milestones"])}
        state = self._learnt("pretrained", told, make)
        learner = Learner(replace(s, compile=False), task, self.seed, self.device)
        learner.plain[0].load_state_dict(state)
        return learner, learner.accuracy(self.test)

    @functools.cached_property
    def warm_losses(self) -> dict[str, Tensor]:
        """mean [n] and last [n] loss of every image over the warm-up of a fresh classifier on the noisy originals."""
        d, s = self.data, self.s

        def make(checkpoint: Path) -> dict:
            x = self.seen("train")
            kind = type("WarmUp", (WarmUp,), {"every": x, "labels": self.y})
            learner = kind(s, Task(x[self.train], self.y[self.train], self.test, d.kind), self.seed, self.device)
            fit(learner, checkpoint, show=self.show, label="small-loss warm-up")
            return {"mean": learner.buffers["sum"] / s.small_loss_epochs, "last": learner.buffers["last"]}

        told = {"labels": self.noisy.sha256, "epochs": s.small_loss_epochs, "val": s.val_fraction}
        return self._learnt("warmup", told, make)

    # --------------------------------------------------------------------------------------------------------- features

    @functools.cached_property
    def extractor(self):
        s, d = self.s, self.data
        if s.features == "clip":
            return features.Clip(
                s.clip.model, self.local(s.clip.weights, ".safetensors"), self.device, download=s.download
            )
        if s.features == "lite0":
            return features.Lite0(self.device)
        if not len(d.pre):
            raise UserError(f"--features {s.features} is fitted to clean images: give --pretrain, or use lite0 or clip")
        if s.features == "pca":
            return features.Pca(d.pre.x, s.pca_width, self.seed)
        return features.Penultimate(self.pretrained[0].plain[0], d.size, self.device)

    @functools.cached_property
    def lite0(self) -> features.Lite0:
        return self.extractor if self.s.features == "lite0" else features.Lite0(self.device)

    def _features(self, what: str, told: dict, images: Callable[[], Tensor], by=None) -> Tensor:
        """Of `images` by the extractor, or another; kept where a network of other people makes them."""
        s = self.s
        if by is None and s.features not in features.READY:  # quick, and clean images they are fitted to differ by seed
            return self.extractor(images())
        by = by or self.extractor
        told = {**told, **by.about(), "what": what, "limit": 0, "pretrain": 0, "seed": 0}
        if s.dataset in readers.WHEEL or what != "test" and (s.pretrain or s.train_limit):  # the images are drawn
            told |= {"limit": s.train_limit, "pretrain": s.pretrain, "seed": self.seed}
        made = kept(self.cache / "features" / fingerprint(told), lambda _: {"f": by(images())})
        return made["f"]

    @functools.cached_property
    def original_features(self) -> Tensor:
        """They do not depend on labels: those of networks that are not fitted here are kept for every noise setting."""
        return self._features("original", {"data": self.data.sha256}, lambda: self.data.train.x)

    @functools.cached_property
    def modified_features(self) -> Tensor:
        """Of the images at the generator's resolution (released code), or at the data set's."""
        m = self.modified
        size = self.s.similarity_size
        told = {"folder": m.folder.name, "size": size}
        return self._features("modified", told, lambda: m.full if size == "full" else m.small)

    def seen(self, what: str) -> Tensor:
        """What a classifier reads of the train, test, pre or modified images: the images uint8, or for --model head
        their features."""
        d, head = self.data, self.s.model == "head"
        if what == "train":
            return self.original_features if head else d.train.x
        if what == "modified":
            return self.modified_features if head else self.modified.small
        part = {"test": d.test, "pre": d.pre}[what]
        return self._features(what, {"data": d.sha256}, lambda: part.x) if head else part.x

    @functools.cached_property
    def test(self) -> Part:
        return Part(self.seen("test"), self.data.test.y)

    @functools.cached_property
    def similarity(self) -> Tensor:
        s = echoselect.similarity(self.original_features, self.modified_features)
        return torch.where(self.modified.ok, s, torch.nan)

    # -------------------------------------------------------------------------------------------------------- selection

    @functools.cached_property
    def rule(self) -> str:
        """similarity, or small-loss for symmetric noise as in the released code."""
        auto = "small-loss" if self.s.noise == "symmetric" else "similarity"
        return auto if self.s.select == "auto" else self.s.select

    @functools.cached_property
    def tau(self) -> float:
        given = self.s.threshold
        if given in ("gmm", "otsu"):
            try:
                return echoselect.automatic_threshold(self.similarity, given)
            except ValueError as error:  # all similarities are equal
                raise UserError(f"--{error}") from None
        return float(given)

    @functools.cached_property
    def selected(self) -> Tensor:
        if self.rule == "similarity":
            return echoselect.by_threshold(self.similarity, self.tau)
        return self.by_small_loss

    @functools.cached_property
    def by_small_loss(self) -> Tensor:
        """On the training and the held-out part each by itself."""
        ratio = self.s.small_loss_ratio
        ratio = echoselect.small_loss_ratio(self.s.rate if self.s.noise != "none" else 0.0) if ratio < 0 else ratio
        keep = torch.zeros(len(self.y), dtype=torch.bool)
        for part in (self.train, ~self.train):
            keep[part] = echoselect.by_small_loss(self.warm_losses["mean"][part], self.y[part], ratio)
        return keep

    @functools.cached_property
    def prior(self) -> Tensor:
        """Posteriors [n, C] of what knows no noisy label: CLIP zero-shot, ImageNet's classes, else the pretrained
        classifier."""
        if self.s.features == "clip":
            return self.extractor.zero_shot(self.original_features, readers.names(self.s.dataset))
        if self.s.features == "lite0":
            return self.extractor.grouped(self.original_features, tuple(readers.IMAGENET10.values()))
        return torch.softmax(self.pretrained[0].predict(self.seen("train")), 1).cpu()

    @functools.cached_property
    def out_of_sample(self) -> Tensor:
        """Posteriors [n, C] of logistic regressions on the features, five-fold, fitted to the noisy labels."""
        return selection.out_of_sample(self.original_features, self.y, self.data.kind.classes, self.seed)

    def scores(self, only: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, score [n], decision [n] or None) of every selector, higher is more surely right."""
        y, s = self.y, self.s

        def wanted(name: str) -> bool:
            return not only or name in only

        if wanted("EchoSelect") and s.generator != "none":
            mine = self.selected if self.rule == "similarity" else None
            yield "EchoSelect", self.similarity, mine
        if wanted("small-loss"):
            yield "small-loss", -self.warm_losses["mean"].double(), self.by_small_loss
        if wanted("GMM on loss"):
            p = clean_probability(scaled(self.warm_losses["last"]))
            yield "GMM on loss", -self.warm_losses["last"].double(), p > 0.5
        if wanted("kNN agreement"):
            value = selection.knn_agreement(self.original_features, y)
            yield "kNN agreement", value, value > 0.5
        if wanted("cleanlab"):
            yield "cleanlab", *selection.cleanlab(self.out_of_sample, y)
        if (
            s.features == "lite0"
            and s.dataset != "cifar10"
            or s.features not in features.READY
            and not len(self.data.pre)
        ):
            return
        if wanted("prior"):
            p = selection.label_probability(self.prior, y)
            yield self.prior_name, p, self.prior.argmax(1) == y
        if wanted("CLIPCleaner"):
            fitted = selection.logistic(self.original_features, y)
            yield "CLIPCleaner", *selection.clipcleaner(self.prior, fitted, y)

    @property
    def prior_name(self) -> str:
        return {"clip": "CLIP zero-shot", "lite0": "ImageNet's classes"}.get(self.s.features, "pretrained classifier")

    # -------------------------------------------------------------------------------------------------- about the edits

    def judge(self, images: Tensor, own: bool) -> Tensor:
        """Label [n] that an independent judge sees: nearest neighbour among truly labelled training and test images,
        which contain none of the generator's; own: `images` are the originals, whose own row is left out. With
        --judge lite0 a regression on EfficientNet-Lite0's features of the test images and their true labels, which
        neither generator nor classifier has seen; with --judge clip zero-shot CLIP."""
        d = self.data
        if self.s.judge == "lite0":
            known = self._features("test", {"data": d.sha256}, lambda: d.test.x, self.lite0)
            return selection.fitted(known, d.test.y, self.lite0(images), d.kind.classes).argmax(1)
        if self.s.judge == "clip":
            words = readers.names(self.s.dataset)
            clip = self.extractor if self.s.features == "clip" else None
            if clip is None:
                raise UserError("--judge clip needs --features clip")
            return clip.zero_shot(clip(images), words).argmax(1)
        bank, labels = torch.cat([d.train.x, d.test.x]), torch.cat([d.train.y, d.test.y])
        return features.nearest(bank, labels, images, torch.arange(len(d.train)) if own else None)

    @functools.cached_property
    def shown(self) -> Tensor:
        """Label [n] that the judge sees in each modified image."""
        return self.judge(self.modified.small, False)

    def edits(self) -> dict[str, float]:
        """What is reported of the modified images; per cent, except similarities, SSIM and Frechet distances."""
        m, d, out = self.modified, self.data, {}
        s = self.similarity
        out["edit_failed"] = int((~m.ok).sum())
        seen, before = self.shown == self.y, self.judge(d.train.x, True) == self.y
        for name, mask in (("wrong", ~self.right), ("right", self.right)):
            if mask.any():
                out[f"agreement_{name}"] = 100 * float(seen[mask].double().mean())
                out[f"original_agreement_{name}"] = 100 * float(before[mask].double().mean())
                out[f"similarity_{name}"] = float(s[mask].nanmean())
        out["edge_ssim"] = features.edge_ssim(d.train.x, m.small)
        test = self.extractor(d.test.x).numpy()
        old, new = self.original_features.numpy(), self.modified_features.numpy()
        fine = np.isfinite(new).all(1) & m.ok.numpy()
        if fine.sum() > 1 and len(test) > 1:
            kept = self.selected.numpy()
            out["frechet_modified_test"] = echoselect.frechet(new[fine], test)
            out["frechet_original_test"] = echoselect.frechet(old, test)
            out["frechet_mixed_test"] = echoselect.frechet(np.concatenate([old[kept], new[fine]]), test)
            out["frechet_modified_original"] = echoselect.frechet(new[fine], old)
        return out

    def check(self) -> None:
        """The generator's own check: it must neither ignore the label nor return the instance."""
        if bool(self.right.all()):
            return
        wrong = ~self.right
        agreement = float((self.shown == self.y)[wrong].double().mean())
        shards.check(agreement, float(self.similarity[wrong].nanmean()), self.s.check)

    def part(self, mask: Tensor) -> Part:
        """Originals of the training part with their noisy labels."""
        use = mask & self.train
        return Part(self.seen("train")[use], self.y[use])
