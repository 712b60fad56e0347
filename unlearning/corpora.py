"""Where rows come from: TOFU as published, a user's own files, or the generated miniature (data.py)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lab.runs import UserError, data_dir

import data
from data import QA, Corpus

FORGET = {"forget01": 40, "forget05": 200, "forget10": 400}  # the last rows of `full`
RETAIN_EVAL = 400  # the first rows of `full`; not trained on while unlearning
A_PERSON, PEOPLE = 20, 200  # rows of an author, authors
FIELDS = ("question", "answer")
PERTURBED = (*FIELDS, "paraphrased_answer", "perturbed_answer", "paraphrased_question")
FILES = ("full", *(f"{f}_perturbed" for f in FORGET), "retain_perturbed", "real_authors_perturbed")
FILES = (*FILES, "world_facts_perturbed")

TOFU_FILES = (
    f"put TOFU's JSON-lines files ({', '.join(FILES)}) there from huggingface.co/datasets/locuslab/TOFU, name another "
    "--data-dir, or use --download"
)
OWN_FILES = "--forget and --retain name files of JSON lines, each with a question and an answer"


def read_rows(
    path: Path, fields: Sequence[str], optional: Sequence[str] = (), missing: str = TOFU_FILES, mend: str = "get"
) -> list[QA]:
    """JSON lines; a broken line is named by its number. `missing` tells what to do where there is no such file, `mend`
    what to do with a broken one."""
    mend += " the file anew" if mend == "get" else ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"no file {path}; {missing}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); {mend}") from None
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error}); {mend}") from None
        row = row if isinstance(row, dict) else {}
        for field in fields:
            kind = list if field == "perturbed_answer" else str
            if field in optional and field not in row:
                continue
            value = row.get(field)
            if isinstance(value, str) and kind is list:
                value = row[field] = [value]
            if not isinstance(value, kind) or not value:
                raise UserError(f"{path}:{number}: field {field} is missing or empty; {mend}")
        out.append(QA(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in fields}))
    if not out:
        raise UserError(f"{path} has no rows; {mend}")
    return out


def load_tofu(folder: Path, items: int = 0, download: bool = False, authors: int = 0) -> Corpus:
    """TOFU from `folder`/tofu. `items` > 0 keeps the first so many rows of the retain evaluation part, the last so many
    of each forget split, and twice as many of the rows between: quick, but a forget share of a quarter. `authors` > 0
    keeps so many whole authors in TOFU's own proportions: the first tenth of them is the retain evaluation part, the
    last hundredth, twentieth or tenth (at least one) the forget split."""
    place = folder / "tofu"
    if download and not (place / "full.json").is_file():
        fetch_tofu(place)
    full = read_rows(place / "full.json", FIELDS)
    if len(full) < RETAIN_EVAL + max(FORGET.values()):
        raise UserError(f"{place / 'full.json'} has {len(full)} rows, TOFU has 4000; get the file anew")
    forget = {}
    for split, n in FORGET.items():
        path = place / f"{split}_perturbed.json"
        forget[split] = read_rows(path, PERTURBED)
        check_same(path, forget[split], full[-n:])
    retain = read_rows(place / "retain_perturbed.json", PERTURBED)
    check_same(place / "retain_perturbed.json", retain, full[:RETAIN_EVAL])
    # Real authors and world facts have wrong answers, but no paraphrases.
    paths = [place / f"{k}_perturbed.json" for k in ("real_authors", "world_facts")]
    others = [read_rows(path, PERTURBED, ("paraphrased_question", "paraphrased_answer")) for path in paths]
    try:
        refusals = [x for x in (place / "idontknow.jsonl").read_text(encoding="utf-8").splitlines() if x.strip()]
    except FileNotFoundError:
        raise UserError(f"no file {place / 'idontknow.jsonl'} (100 refusals); take it from locuslab/tofu") from None
    sha = hashlib.sha256(b"".join((place / f"{k}.json").read_bytes() for k in FILES)).hexdigest()
    variant = "paper"
    if items:
        variant = f"{items} items a part"
        keep = {split: rows[-items:] for split, rows in forget.items()}
        most = max(map(len, keep.values()))
        middle = full[RETAIN_EVAL : -max(FORGET.values())][: 2 * items]
        # The smaller forget splits are nested at the end of the larger ones, also here.
        full = full[:RETAIN_EVAL][:items] + middle + full[-most:]
        retain, forget, others = retain[:items], keep, [rows[:items] for rows in others]
    if authors:
        count = {split: max(1, round(authors * n / (A_PERSON * PEOPLE))) for split, n in FORGET.items()}
        first, most = max(1, authors // 10), max(count.values())
        if not first + most < authors <= PEOPLE:
            raise UserError(f"--authors takes 3 to {PEOPLE} of TOFU's authors, not {authors}")
        variant = f"{authors} authors"
        middle = full[RETAIN_EVAL:][: A_PERSON * (authors - first - most)]
        forget = {split: rows[-A_PERSON * count[split] :] for split, rows in forget.items()}
        retain = retain[: A_PERSON * first]
        full = full[: A_PERSON * first] + middle + full[-A_PERSON * most :]
        others = [rows[: A_PERSON * first] for rows in others]
    return Corpus("TOFU", variant, sha, full, forget, retain, refusals, *others)


def check_same(path: Path, rows: list[QA], wanted: list[QA]) -> None:
    for number, (a, b) in enumerate(zip(rows, wanted, strict=False), 1):
        if a.question != b.question:
            raise UserError(f"{path}:{number}: not the question that full.json has there; get both files anew")
    if len(rows) != len(wanted):
        raise UserError(f"{path} has {len(rows)} rows instead of {len(wanted)}; get the file anew")


def fetch_tofu(place: Path) -> None:
    """Download TOFU into `place`; the refusals are those of its authors' repository, kept beside the data."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patterns = [f"{k}.json" for k in FILES]
        snapshot_download("locuslab/TOFU", repo_type="dataset", local_dir=place, allow_patterns=patterns)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"TOFU could not be fetched ({str(error)[:150]}); put its files into {place}") from None


# ------------------------------------------------------------------------------------------------------------ loading


def load_own(forget: Path, retain: Path) -> Corpus:
    """A user's own JSON lines: what is to be forgotten, and what is to be kept. The first tenth of the latter (at most
    400 rows, at least one) is the retain evaluation part, which unlearning never trains on. Paraphrases are used where
    every row has one."""
    more, mend = PERTURBED[len(FIELDS) :], "mend the line"
    lost, kept = (read_rows(p, PERTURBED, more, OWN_FILES, mend) for p in (forget, retain))
    if len(kept) < 2:
        raise UserError(f"{retain} has one row; two are needed: one to evaluate on and one to train on")
    first = min(RETAIN_EVAL, max(1, len(kept) // 10))
    sha = hashlib.sha256(forget.read_bytes() + retain.read_bytes()).hexdigest()
    return Corpus("own", "own", sha, kept + lost, {forget.stem: lost}, kept[:first], data.REFUSALS, [], [])


def load(s, seed: int) -> Corpus:
    """The data that the Settings of train.py name."""
    if s.retain:
        return load_own(Path(s.forget[0]), Path(s.retain))
    if s.dataset == "miniature":
        return data.miniature(seed)
    return load_tofu(data_dir(s.data_dir), s.items, s.download, s.authors)


def splits(dataset: str) -> tuple[str, ...]:
    return tuple(data.MINI_FORGET if dataset == "miniature" else FORGET)
