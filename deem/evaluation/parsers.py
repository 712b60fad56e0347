"""How short answers are read and scored: yes/no (POPE, RobustVQA), choices and pairs (MMVP).

Equations are counts: with positive = "yes", precision TP/(TP+FP), recall TP/(TP+FN), F1 their harmonic mean (0 where a
denominator is 0), yes ratio the share of answers read as "yes". All in per cent.
"""

from collections.abc import Sequence

from lab.runs import UserError

# --------------------------------------------------------------------------------------------------------------- yes/no


def extract_answer(text: str) -> str:
    """The released code's reading of a short answer: quotes dropped, cut at the first newline, full stop, comma and
    exclamation mark, lower case; then what stands after "is ", "are ", "a ", "an ", "the " (first to second occurrence,
    inside words as well) and before " of", " or ", " and "."""
    said = text.replace('"', "").strip()
    for mark in ("\n", ".", ",", "!"):
        said = said.split(mark, 1)[0]
    said = said.lower()
    for lead in ("is ", "are ", "a ", "an ", "the "):
        if lead in said:
            said = said.split(lead)[1]
    for tail in (" of", " or ", " and "):
        said = said.split(tail, 1)[0]
    return said.strip()


def name_answer(text: str) -> str:
    """`extract_answer` without colons and square brackets: what the released code compares with a label."""
    said = extract_answer(text)
    for mark in ":[]\n\t":
        said = said.replace(mark, " ")
    return said.strip()


def parse_answer(text: str) -> str:
    """Yes, no (in small letters), or "" for an answer that is neither after `name_answer`; it counts as wrong."""
    said = name_answer(text)
    return said if said in ("yes", "no") else ""


def parse_pope(text: str) -> str:
    """The POPE authors' reading: first sentence, commas dropped, split at blanks; "no" if No, no or not is among the
    words, else "yes". An empty answer is "yes"."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & {*words} else "yes"


def parse_strict(text: str) -> str:
    """lmms-eval's reading: the whole answer in lower case is yes or no."""
    said = text.lower().strip()
    return said if said in ("yes", "no") else ""


PARSERS = {"deem": parse_answer, "pope": parse_pope, "strict": parse_strict}


def binary_scores(said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Scores in per cent of answers "yes", "no" or "" (unparsed: wrong, and neither a yes nor a no)."""
    if len(said) != len(labels) or not labels:
        raise UserError(f"{len(said)} answers for {len(labels)} labels")
    n, yes = len(labels), sum(a == "yes" for a in said)
    hit = sum(a == label == "yes" for a, label in zip(said, labels, strict=True))
    right = sum(a == label for a, label in zip(said, labels, strict=True))
    positive = sum(label == "yes" for label in labels)
    precision, recall = hit / yes if yes else 0.0, hit / positive if positive else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    shares = {"accuracy": right / n, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes / n}
    return {k: 100 * v for k, v in shares.items()} | {"unparsed": 100 * sum(a == "" for a in said) / n}


def score_yes_no(records: Sequence[dict], parser: str = "deem") -> dict[str, float]:
    """Accuracy, precision, recall, F1, yes ratio and unparsed share, by `parser`; the same by the POPE authors' reading
    as `pope_*`. Records need `answer` (what the model said) and `label`."""
    if parser not in PARSERS:
        raise UserError(f"parser {parser} is unknown; use one of {', '.join(PARSERS)}")
    if not records:
        raise UserError("no answered question to score")
    labels = [r["label"] for r in records]
    main = binary_scores([PARSERS[parser](r["answer"]) for r in records], labels)
    theirs = binary_scores([parse_pope(r["answer"]) for r in records], labels)
    return {**main, **{f"pope_{k}": v for k, v in theirs.items() if k != "unparsed"}, "n": len(records)}


# ---------------------------------------------------------------------------------------------------- choices and pairs


def parse_choice(answer: str, choices: Sequence[tuple[str, str]]) -> str:
    """The mark of the chosen option ('' when none is recognised): "(a)", "a", "a) ...", or the option's text."""
    said = answer.strip().lower()
    first = said.split("\n")[0].rstrip(".!,").strip()
    for mark, _ in choices:
        letter = mark[1].lower()
        if first in (mark.lower(), letter, f"{letter})") or first.startswith(
            (mark.lower(), f"{letter})", f"{letter}.")
        ):
            return mark
    for mark, text in choices:
        if first == text.lower():
            return mark
    return ""


def score_pairs(records: Sequence[dict]) -> dict[str, float]:
    """Pair accuracy (both right), share of single questions right; records need `pair` and `right`."""
    if not records:
        raise UserError("no answered question to score")
    pairs: dict[str, list[bool]] = {}
    for r in records:
        pairs.setdefault(r["pair"], []).append(bool(r["right"]))
    odd = [k for k, v in pairs.items() if len(v) != 2]
    if odd:
        raise UserError(f"pair {odd[0]} has {len(pairs[odd[0]])} answers instead of 2")
    single = [x for v in pairs.values() for x in v]
    return {
        "accuracy": 100 * sum(all(v) for v in pairs.values()) / len(pairs),
        "single_accuracy": 100 * sum(single) / len(single),
        "n": len(pairs),
    }
