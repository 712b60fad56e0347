"""What each table of the paper evaluates: ID sets, OOD sets, prompt task, number of names; and how it is run."""

from dataclasses import dataclass, replace
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from accelerate import PartialState

import backbones
import data
import evaluation
import metrics
import scores
from names import reading
from scores import normalise, reduce

FAR = ("inaturalist", "sun", "places", "texture")
CORRUPTIONS = {
    "table14": ("noise", ("gaussian_noise", "shot_noise", "impulse_noise")),
    "table15": ("blur", ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")),
    "table16": ("weather", ("snow", "frost", "fog", "brightness")),
    "table17": ("digital", ("contrast", "elastic_transform", "pixelate", "jpeg_compression")),
    "table18": ("extra", ("speckle_noise", "gaussian_blur", "spatter", "saturate")),
}


@dataclass(frozen=True)
class Case:
    """One ID set against its OOD sets."""

    id: str
    oods: tuple[str, ...]
    task: str  # which prompt made the names
    n: tuple[int, ...]  # numbers of names (near: for each ID class)
    setting: str  # format string of the record's setting
    betas: tuple[float, ...] = ()
    variants: tuple[str, ...] = ("resemble",)
    scores: bool = False
    general: bool = False  # the far prompt on another task (Table 25)
    average: str = ""  # group whose cases are averaged into a row of its own
    mean_only: bool = False  # only that row is printed (Fig. 7)


def _far(ids, setting: str, n=(500,), betas=(), average: str = "") -> list[Case]:
    return [Case(i, FAR, "far", n, setting, betas, average=average) for i in ids]


NEAR_L = "model={model}, l per ID class={n}, beta={beta}"  # Fig. 7b


def _near(n=(3,), betas=(), setting="model={model}, l={n} per ID class, beta={beta}") -> list[Case]:
    pairs = (("imagenet10", ("imagenet20",)), ("imagenet20", ("imagenet10",)))
    return [Case(i, o, "near", n, setting, betas, average="Average") for i, o in pairs]


def _fine(n=(500,), betas=(), setting="model={model}, L={n}, beta={beta}") -> list[Case]:
    return [Case(i, (f"{i}-ood",), "fine", n, setting, betas, average="Average") for i in data.HALVES]


def _ablation(setting: str, **more) -> list[Case]:
    a = Case("imagenet1k", ("texture",), "far", (500,), setting, average="Average")
    cases = [a, replace(a, oods=("ninco",), task="near", n=(3,))]
    cases += [Case("food50", ("food50-ood",), "fine", (500,), setting, average="Average")]
    return [replace(c, **more) for c in cases]


PAPER_LLM = "gpt-3.5-turbo-16k"
LLMS = {  # Table 24: how the published files name a model -> how the table does
    **{PAPER_LLM: "GPT-3.5-turbo-16k", "gpt-4-0125-preview": "GPT-4", "Claude-3-Haiku": "Claude-3-Haiku"},
    **{"Gemini-Pro": "Gemini-Pro", "Mixtral-8x7B-Chat": "Mixtral-8x7B-Chat"},
}
WITH_TRUTH = ("table1", "table2", "table3", "table4", "figure1", "own")  # where the paper prints Ground Truth
PLAIN, SWEEP = "model={model}, L={n}, beta={beta}", "model={model}, L={n}{x}, beta={beta}"
GRID, BETAS = (100, 300, 500), evaluation.BETAS
TABLES: dict[str, list[Case]] = {
    "table1": _far(("cub200", "cars196", "food101", "pet37"), PLAIN, average="Average of 4 ID sets"),
    "table2": _far(("imagenet1k",), PLAIN),
    "table3": _near(),
    "table4": _fine(),
    "table5": _far(("cub200", "cars196"), SWEEP, GRID, BETAS, "Average of CUB-200-2011 and Stanford-Cars"),
    "table6": _far(("food101", "pet37"), SWEEP, GRID, BETAS, "Average of Food-101 and Oxford-IIIT Pet"),
    "table7": _far(("imagenet1k",), SWEEP, GRID, BETAS),
    "table8": _near((1, 3, 10), BETAS, SWEEP),
    "table9": _fine(GRID, BETAS, SWEEP),
    "table10": _far(("imagenet1k",), PLAIN),
    "table11": [
        Case(
            i,
            ("svhn", "lsun", "texture", "places"),
            "near",
            (3,),
            "model={model}, beta={beta}, prompt type and L not stated",
            average="Average of CIFAR-10 and CIFAR-100",
        )
        for i in ("cifar10", "cifar100")
    ],  # fmt: skip
    "table12": [
        Case("imagenet1k", ("ssb_hard", "ninco"), "near", (3,), "model={model}, l={n} per ID class, beta={beta}")
    ],
    "table13": _far(("sketch",), PLAIN),
    **{
        table: _far(
            [f"imagenet-c-{k}" for k in kinds],
            PLAIN + f", ImageNet-C {group} severity 1",
            average=f"ImageNet-C {group} average",
        )
        for table, (group, kinds) in CORRUPTIONS.items()
    },  # fmt: skip
    "table19": _far(("imagenet1k",), "model={model}, 5-prompt ensemble, L={n}, beta={beta}"),
    "table20": _far(("imagenet1k",), "model={model}, single prompt, L={n}, beta={beta}"),
    "table21": _far(("imagenet1k",), PLAIN),
    "table22": _ablation("score function ablation, model={model}", scores=True),
    "table23": _ablation("LLM prompt ablation, model={model}", variants=("irrelevant", "dissimilar", "resemble")),
    "table24": _ablation("LLM ablation, model={model}"),
    "table25": [
        replace(c, setting="model={model}, far prompt used for every task", general=True, average="")
        for c in [*_near(), *_fine()]
    ],
    # Fig. 7: the number of names; only averages over the ID sets are printed, L = 0 is MCM.
    "figure7a": [
        replace(c, mean_only=True)
        for c in _far(("cub200", "cars196", "food101", "pet37"), PLAIN, GRID, average="Average of 4 far ID sets")
    ],
    "figure7b": [replace(c, mean_only=True, average="Average of near tasks") for c in _near((1, 3, 10), (), NEAR_L)],
    "figure7c": [replace(c, mean_only=True, average="Average of fine-grained tasks") for c in _fine(GRID)],
    "figure1": [Case("cub200", ("places",), "far", (500,), "model={model}")],
}


def title(id: str, ood: str) -> str:
    """The data set of a record, as paper.csv names it."""
    if id == "imagenet10" or id == "imagenet20":
        return f"{data.TITLES[id]} (ID) vs {data.TITLES[ood]} (OOD)" if ood else "Average"
    halves = {
        **{"cub100": "CUB-100 vs CUB-100(OOD)", "cars98": "Stanford-Cars-98 vs Stanford-Cars-98(OOD)"},
        **{"food50": "Food-50 vs Food-51", "pet18": "Oxford-Pet-18 vs Oxford-Pet-19"},
    }
    if id in halves:
        return halves[id]
    name = (
        f"ImageNet-C {id.removeprefix('imagenet-c-')}"
        if id.startswith("imagenet-c-")
        else data.TITLES.get(id, Path(id).name)
    )
    return f"{name} vs {data.TITLES.get(ood, Path(ood).name) if ood else 'average of its OOD sets'}"


def names_file(s, case: Case, variant: str, n: int, seed: int) -> Path:
    """Where the envisioned names of a case lie."""
    base = "imagenet1k" if case.id == "sketch" or case.id.startswith("imagenet-c-") else Path(case.id).name
    task = "far" if case.general else case.task
    if s.labels == "own":
        return runs.HERE / "envisioned" / f"{base}-{task}{'' if variant == 'resemble' else '-' + variant}.json"
    if s.labels == "released":
        ids = {"cub200": "bird200", "cars196": "car196", "imagenet1k": "ImageNet", "imagenet10": "ImageNet10"}
        ids |= {
            "imagenet20": "ImageNet20",
            "cub100": "cub100_ID",
            "cars98": "car98_ID",
            "food50": "food50_ID",
            "pet18": "pet18_ID",
        }
        folder = "general" if case.general else {"fine": "fine_grained"}.get(case.task, case.task)
        folder += "" if variant == "resemble" else f"_{variant}"
        return (
            runs.data_dir(s.data_dir)
            / "eoe"
            / "envisioned_classes"
            / f"{folder}_{n}"
            / f"{ids.get(base, base)}_{s.llm}_{seed}.json"
        )
    return Path(s.labels)


def envisioned(s, case: Case, ids: list[str], variant: str, n: int, seed: int) -> list[str]:
    """Cleaned names of a case, by the task whose prompt made them (Table 25: far); `ids`: the ID names."""
    path = names_file(s, case, variant, n, seed)
    if not path.is_file():
        origin = {"own": "make it with envision.py", "released": "it is in the official repository tmlr-group/EOE"}
        more = f"; {origin[s.labels]}, or choose another --labels" if s.labels in origin else ""
        raise UserError(f"no envisioned names in {path}{more}")
    found = reading.read_names(path)
    task = "far" if case.general else case.task
    names = found.take(task, n) if s.labels != "released" else found.take(task, 10**9)
    return reading.clean(names, ids, task, variant).names


def threshold(s, case: Case) -> float:
    """Highest cosine that an envisioned prompt may have with an ID prompt (Sec. 4.2: ImageNet-20, near)."""
    return s.max_similarity or (0.85 if case.id == "imagenet20" and case.task == "near" and not case.general else 1.0)


def cases(s) -> list[Case]:
    if s.table in TABLES:
        return TABLES[s.table]
    if s.table != "own":
        raise UserError(f"no table {s.table}; use one of {', '.join(TABLES)}")
    return [Case(s.id, s.ood, s.task, (s.n or (3 if s.task == "near" else 500),), "L={n}, beta={beta}")]


def ood_truth(ood: str, sets: dict) -> list[str]:
    """Names of the real OOD classes, where there are any."""
    return data.ood_names(ood) or sets[ood].names


def clipn(s, case: Case, images: torch.Tensor, outside: torch.Tensor, ids: list[str]) -> list[tuple[str, dict]]:
    """Both scores of CLIPN from the text features `yes` and `no` [K, d] of its two encoders, in the order of the ID
    names; the image features are those of --backbone, so --weights must be CLIPN's own image encoder."""
    path = Path(s.clipn)
    path = path / f"{Path(case.id).name}.safetensors" if path.is_dir() else path
    tensors, _ = runs.read_weights(path)
    shape = (len(ids), images.shape[1])
    for name in ("yes", "no"):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(f"{path}: `{name}` is {found or 'missing'}, wanted are {shape[0]} ID names x {shape[1]}")
    yes, no = (normalise(tensors[k]).to(images.device) for k in ("yes", "no"))
    inside, out = (scores.clipn(x, yes, no) for x in (images, outside))
    names = ("CLIPN(competing-to-win)", "CLIPN(agreeing-to-differ)")
    return [
        (name, {**metrics.measure(a.cpu(), b.cpu()), "labels": 0, "hits": 0})
        for name, a, b in zip(names, inside, out, strict=True)
    ]


BASELINES = ("MCM", "Energy", "MaxLogit", "Ground Truth")  # rows in which no envisioned name takes part


def is_row(s, c: Case, n: int, method: str, beta: str) -> bool:
    """Whether the paper has a row for a method with n names; `beta` names a weight of the sweep, or is empty."""
    if method not in BASELINES:
        return bool(beta) or not c.betas
    if s.table == "table24" and s.llm != PAPER_LLM:
        return False  # the same under every language model: once is enough
    alone = c.mean_only or c.betas  # a sweep, and a mean over it, begins with MCM as L = 0
    return not alone or (method == "MCM" and n == c.n[0])


def setting(c: Case, model: str, method: str, n: int, beta: str, default: float) -> str:
    """The setting of a row, as paper.csv spells it."""
    b = float(beta.removeprefix("beta=")) if beta else default
    shown = f"{b:.2f}" if c.betas and b else f"{b:g}"
    fields = {"model": model, "n": n, "beta": shown, "x": "xK" if c.task == "near" else ""}
    if method == "MCM" and c.betas:
        fields |= {"n": 0, "beta": "0", "x": ""}
    elif method == "MCM" and c.mean_only:
        fields |= {"n": 0}
    return c.setting.format(**fields)


class Scorer:
    """A table under one run of the language model: its image sets, their features, and its prompts."""

    def __init__(self, s, seed: int, device):
        root = runs.data_dir(s.data_dir)
        self.s, self.seed, self.device, self.cases = s, seed, device, cases(s)
        names = [name for c in self.cases for name in (c.id, *c.oods)]
        self.sets = {name: data.load(name, root, s.download) for name in dict.fromkeys(names)}
        backbone = backbones.load(s.backbone, device, s.weights, root, s.download, s.bf16)
        self.model, self.cached = backbone.known.title, backbones.CachedTexts(backbone)
        self.templates = evaluation.ENSEMBLE if s.ensemble or s.table == "table19" else (evaluation.TEMPLATE,)
        found = {k: backbones.image_features(backbone, v, s.batch, s.workers) for k, v in self.sets.items()}
        self.features = {k: v.to(device) for k, v in found.items()}

    def text(self, names: list[str]) -> torch.Tensor:
        return evaluation.text_features(self.cached, names, self.templates).to(self.device)

    def ids(self, c: Case) -> list[str]:
        return self.sets[c.id].names or data.id_names(c.id)

    def labels(self, c: Case, n: int) -> list[evaluation.Labels]:
        """The sets of envisioned names that a case with n names compares."""
        s, ids, out = self.s, self.ids(c), []
        asked = [(v, c, n) for v in c.variants]
        if c.general:  # Table 25 sets the far prompt beside the task's own, at that task's own number of names
            asked = [("resemble", replace(c, general=False), n), ("resemble", c, 500)]
        for variant, of, count in asked:
            names = envisioned(s, of, ids, variant, count, self.seed)
            names, text = evaluation.drop_similar(names, self.text(names), self.text(ids), threshold(s, of))
            if not names:
                file = names_file(s, of, variant, count, self.seed)
                raise UserError(f"cleaning leaves no envisioned name for {c.id} ({file})")
            method = "EOE" if len(c.variants) == 1 else f"EOE(prompt={variant})"
            method = "EOE(far prompt)" if of.general else method
            method = f"EOE(llm={LLMS[s.llm]})" if s.table == "table24" and s.labels == "released" else method
            out.append(evaluation.Labels("S_EOE" if c.scores else method, names, text, c.scores, c.betas))
        return out

    def results(self, c: Case, n: int, labels: list[evaluation.Labels]) -> list["Result"]:
        """Every row of a case with n names, against each of its OOD sets."""
        s, out, ids = self.s, [], self.text(self.ids(c))
        last = n == c.n[-1]
        for ood in c.oods:
            images, outside, truth = self.features[c.id], self.features[ood], ood_truth(ood, self.sets)
            real = truth if last and s.table in WITH_TRUTH else []
            sets = labels + [evaluation.Labels("Ground Truth", real, self.text(real))] * bool(real)
            for _, method, beta, m in evaluation.rows(images, {ood: outside}, ids, sets, s.beta, truth):
                if is_row(s, c, n, method, beta):
                    name = "Closed-set (MCM)" if s.table == "figure1" and method == "MCM" else method
                    out.append((c, ood, name, setting(c, self.model, method, n, beta, s.beta), m))
            for method, m in clipn(s, c, images, outside, self.ids(c)) if s.clipn and last else ():
                out.append((c, ood, method, setting(c, self.model, method, n, "", s.beta), m))
        return out

    def dump(self, c: Case, labels: evaluation.Labels, folder: Path) -> None:
        """A line an image of the first OOD set."""
        ids, ood = self.ids(c), c.oods[0]
        stats = [reduce(self.features[k], self.text(ids), labels.text) for k in (c.id, ood)]
        cut = metrics.threshold95(evaluation.score(stats[0], "EOE", self.s.beta))
        place = folder / f"scores-{Path(c.id).name}-{Path(ood).name}.csv"
        images = [x if isinstance(x, Path) else i for i, x in enumerate(self.sets[ood].items)]
        evaluation.write_scores(place, images, stats[1], ids, labels.names, self.s.beta, cut)


Result = tuple[Case, str, str, str, dict]  # case, OOD set, method, setting, metrics


def run_table(s, run: runs.Run, seed: int, device) -> None:
    """Records of one table and one run of the language model."""
    if s.table == "table24" and s.labels == "released" and s.llm not in LLMS:
        raise UserError(f"Table 24 has no row for --llm {s.llm}; use one of {', '.join(LLMS)}")
    scorer = Scorer(s, seed, device)
    if not PartialState().is_main_process:
        return
    found: list[Result] = []
    for c in scorer.cases:
        for n in c.n:
            labels = scorer.labels(c, n)
            found += scorer.results(c, n, labels)
            if s.dump and not c.betas:
                scorer.dump(c, labels[0], run.folder(seed))
    _write(s, run, seed, device, found, scorer.sets)


def averages(c: Case, ood: str) -> list[str]:
    """Rows that a number goes into beside its own: the mean over the OOD sets, over the ID sets, over both."""
    if c.mean_only:
        return [c.average]
    many = len(c.oods) > 1
    out = [title(c.id, "")] if many else []
    if c.average:
        out.append(f"{c.average} vs {data.TITLES[ood]}" if many else c.average)
        out += [f"{c.average} vs average of its OOD sets"] if many else []
    return out


def _write(s, run, seed: int, device, results, sets) -> None:
    """A record for each number, for the mean over the OOD sets of an ID set, and for the mean over ID sets."""
    # The printed numbers belong to the published names of GPT-3.5 and to weights of the printed size; with any others
    # the records stand in a table of their own.
    printed = s.labels == "released" and (s.llm == PAPER_LLM or s.table == "table24")
    table = s.table if printed or s.table == "own" else f"own-{s.table}"
    groups: dict[tuple[str, str, str], list[tuple[Case, dict]]] = {}
    whole: dict[str, int] = {}  # parts that an average row must have: one over fewer sets is no average of the table
    for c in cases(s):
        for ood in c.oods:
            for row in averages(c, ood):
                whole[row] = whole.get(row, 0) + 1
    for c, ood, method, setting, m in results:
        if not c.mean_only:
            groups.setdefault((title(c.id, ood), method, setting), []).append((c, m))
        for row in averages(c, ood):
            groups.setdefault((row, method, setting), []).append((c, m))
    groups = {k: v for k, v in groups.items() if k[0] not in whole or len(v) == whole[k[0]]}
    for number, ((dataset, method, setting), found) in enumerate(groups.items()):
        mean = {k: float(torch.tensor([m[k] for _, m in found], dtype=torch.float64).mean()) for k in found[0][1]}
        ids = sorted({c.id for c, _ in found})
        data_part = {
            **{
                "name": dataset,
                "sha256": "+".join(sets[i].sha256[:12] for i in ids),
                "n": sum(len(sets[i]) for i in ids),
            },
            "variant": next((sets[i].variant for i in ids if sets[i].variant != "paper"), "paper"),
        }
        where = {"table": table, "dataset": dataset, "setting": setting, "method": method, "scale": s.scale}
        seconds = run.seconds() if number == 0 else 0.0
        run.record(
            seed, seconds=seconds, data=data_part, metrics=mean, where=where, device=device, suffix=f"-{number:04d}"
        )
