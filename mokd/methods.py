"""Every row of the tables by a name: `mokd`, `url`, `ncc`, ...; settings follow a colon: `mokd:gamma=0,bandwidth=none`.

What the released code chooses by the name of the data set (learning rate, weight decay, gamma) is `published`.
"""

import dataclasses
import re
import time

from lab.runs import UserError

import torch
from torch import Tensor

import heads
import mokd
import sets

LABELS = {
    **{"ncc": "NCC", "url": "URL", "mokd": "MOKD", "ssl-hsic": "SSL-HSIC", "protonet": "ProtoNet (frozen)"},
    **{"fp-maml": "FP-MAML (frozen)", "linear": "linear layer", "cosine": "cosine layer"},
    **{"tsa": "TSA", "finetune": "Finetune (all weights)"},
}
THROUGH = ("tsa", "finetune")  # adapt the backbone: pictures instead of features, one task at a time
# Settings a method takes after the colon, and their defaults where nothing is published.
TAKES = {
    "ncc": {},
    "url": {"lr": -1.0, "weight_decay": 0.0},
    "mokd": {f.name: f.default for f in dataclasses.fields(mokd.Options)},
    "ssl-hsic": {"lr": -1.0, "weight_decay": -1.0, "gamma": 3.0, "scale": 1.0},
    "protonet": {},
    "fp-maml": {"lr": 0.01, "steps": 10},
    "linear": {"lr": 0.01, "steps": 100},
    "cosine": {"lr": 0.01, "steps": 40},
    "tsa": {"steps": 40},
    "finetune": {"lr": 1e-3, "steps": 20},
}
CHOICES = {
    **{"kernel": ("rbf", "imq", "linear", "cosine"), "estimator": ("unbiased", "biased")},
    **{"bandwidth": ("grid", "gradient", "none"), "zz": ("shared", "searched")},
}
GAMMA_ONE = ("omniglot", "aircraft", "cu_birds", "quickdraw", "mnist", "drawn", "mnist5k", "digits")


def published(name: str, law: str) -> dict[str, float]:
    """lr, weight decay and gamma of MOKD for a test domain. Small domains take what their relative has: drawn
    characters Omniglot's, both sets of digits MNIST's, photographs CIFAR-10's."""
    return {
        "lr": 1.0 if name in ("traffic_sign", "mnist", "mnist5k", "digits") else 0.25,
        "weight_decay": 0.25 if name in (*sets.TRAINING, "drawn") else 0.0,
        "gamma": {"1shot": 0.0, "5shot": 1.0}.get(law, 1.0 if name in GAMMA_ONE else 3.0),
    }


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with the settings that were given for it."""

    kind: str
    given: tuple[tuple[str, object], ...] = ()

    @property
    def label(self) -> str:
        if self.kind == "mokd" and self.given == (("bandwidth", "none"),):
            return "MOKD(no TPM)"
        return LABELS[self.kind] + (f"({','.join(f'{k}={_show(v)}' for k, v in self.given)})" if self.given else "")


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(text: str) -> Method:
    """`mokd:gamma=0,bandwidth=none` -> Method. Raises UserError."""
    kind, _, rest = text.partition(":")
    if kind not in LABELS:
        raise UserError(f"no method {kind}; use one of {', '.join(LABELS)}")
    given = []
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in TAKES[kind]:
            takes = ", ".join(TAKES[kind]) or "no settings"
            raise UserError(f"--methods {text}: {kind} takes {takes}, not {key}")
        if key in CHOICES:
            if value not in CHOICES[key]:
                raise UserError(f"--methods {text}: {key} is one of {', '.join(CHOICES[key])}")
            given.append((key, value))
            continue
        if not re.fullmatch(r"\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+", value):
            raise UserError(f"--methods {text}: {key} is a number that is not negative, not '{value}'")
        if key == "steps" and not value.isdigit():
            raise UserError(f"--methods {text}: steps is a whole number")
        given.append((key, int(value) if key == "steps" else float(value)))
    return Method(kind, tuple(given))


def settings(m: Method, name: str, law: str, seen: bool, common: dict) -> dict:
    """Settings of a method on a domain: what was given for it, else for all (`common`), else published, else ours."""
    out = dict(TAKES[m.kind])
    if m.kind in ("mokd", "ssl-hsic"):
        known = published(name, law)
        out |= known if m.kind == "mokd" else {k: known[k] for k in ("lr", "weight_decay")}
    if m.kind == "url":
        out["lr"] = 0.1 if seen else 1.0
    if m.kind == "mokd":
        out |= common
    return out | dict(m.given)


@dataclasses.dataclass
class Answer:
    """What a method says to a batch of tasks: logits [B, Q, C], its head if it has one, and numbers, each [B]."""

    logits: Tensor
    theta: Tensor | None = None
    numbers: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def answer(m: Method, t: heads.Tasks, o: dict) -> Answer:
    """Run a method on frozen features."""
    if m.kind == "ncc":
        return Answer(heads.ncc(t))
    if m.kind == "protonet":
        return Answer(heads.protonet(t))
    if m.kind in ("fp-maml", "linear"):
        return Answer(heads.linear(t, "proto" if m.kind == "fp-maml" else "zero", o["steps"], o["lr"]))
    if m.kind == "cosine":
        return Answer(heads.cosine(t, o["steps"], o["lr"]))
    if m.kind == "mokd":
        found = mokd.solve(t.support, t.labels, mokd.Options(**o))
        numbers = {"scale": found.scale, "scale_zz": found.scale_zz, "power": found.power}
        numbers |= {"negative": found.negative, "degenerate": found.degenerate}
        return Answer(heads.ncc(t, found.theta), found.theta, numbers)
    theta = heads.url(t, **o) if m.kind == "url" else heads.ssl_hsic(t, **o)
    return Answer(heads.ncc(t, theta), theta)


def timed(m: Method, t: heads.Tasks, o: dict, device: torch.device) -> tuple[Answer, float]:
    """The answer and the seconds a task took."""
    began = time.perf_counter()
    out = answer(m, t, o)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out, (time.perf_counter() - began) / len(t.labels)
