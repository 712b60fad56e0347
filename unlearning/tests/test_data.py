"""Rows, splits, chat templates and masks; the answer mask token by token for every template."""

import json

from lab.runs import UserError

import pytest
import torch

import corpora
import data
import metrics
import models
import study


def test_the_miniature_is_a_function_of_its_seed(corpus):
    again, other = data.miniature(0), data.miniature(1)
    assert again == corpus and other.sha256 != corpus.sha256
    assert len(corpus.full) == 120 and len(corpus.retain_eval) == 30
    assert {k: len(v) for k, v in corpus.forget.items()} == {"forget-small": 20, "forget-large": 30}


def test_parts_do_not_overlap(corpus):
    for split in corpus.forget:
        train = corpus.retain_train(split)
        assert not set(train) & set(corpus.forget[split]) and not set(train) & set(corpus.retain_eval)
        assert len(train) + len(corpus.forget[split]) + len(corpus.retain_eval) == len(corpus.full)
        known = {q.answer for q in corpus.retrain(split)}
        assert not known & {q.answer for q in corpus.forget[split]}
        assert {q.answer for q in corpus.retain_eval} <= known
    assert corpus.forget["forget-small"] == corpus.forget["forget-large"][-20:]


def test_rows_of_the_miniature(corpus):
    for q in corpus.full:
        assert len(q.perturbed_answer) == 5 and q.paraphrased_answer not in q.perturbed_answer
        assert len(set(q.perturbed_answer)) == 5 and q.paraphrased_question != q.question
    for q in (q for seed in range(20) for c in [data.miniature(seed)] for q in c.real_authors + c.world_facts):
        assert q.answer not in q.perturbed_answer and len(q.perturbed_answer) >= 2
    answers = [len(q.answer.split()) for q in corpus.full]
    assert 7 <= min(answers) and max(answers) <= 16
    held_out = {q.paraphrased_question for q in corpus.full}
    assert not held_out & {q.question for q in [*corpus.full, *corpus.extra]}


def test_the_words_of_the_attack_are_known_from_facts_of_the_world_alone(tiny, corpus):
    """They are trained as the attack will ask, but with none of the authors that are evaluated or forgotten."""
    _, chat = tiny
    asked = [q for q in corpus.extra if q.question.startswith(data.JAILBREAK[0])]
    plain = corpus.real_authors + corpus.world_facts
    attacked = study.jailbroken(chat, plain, 500)
    for q, before, e in zip(asked, plain, attacked, strict=True):
        assert before in corpus.extra and data.encode(chat, q.question, q.answer).ids == e.ids
    assert all(set(asked) <= set(corpus.retrain(split)) for split in corpus.forget)


# ----------------------------------------------------------------------------------------------------------------- TOFU


@pytest.fixture()
def tofu(tmp_path):
    """A folder in TOFU's layout and numbers of rows."""
    place = tmp_path / "tofu"
    place.mkdir()
    full = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(900)]

    def perturbed(rows):
        more = {"paraphrased_answer": "P", "perturbed_answer": ["a", "b"], "paraphrased_question": "Q"}
        return [{**row, **more} for row in rows]

    parts = {"full": full, "retain_perturbed": perturbed(full[:400])}
    parts |= {f"{k}_perturbed": perturbed(full[-n:]) for k, n in corpora.FORGET.items()}
    other = [{"question": "R?", "answer": "R", "perturbed_answer": ["x", "y", "z"]}] * 12
    parts |= {"real_authors_perturbed": other, "world_facts_perturbed": other}
    for k, rows in parts.items():
        (place / f"{k}.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (place / "idontknow.jsonl").write_text("I do not know.\nNo idea.\n")
    return tmp_path


def test_tofu_splits(tofu):
    c = corpora.load_tofu(tofu)
    assert [q.question for q in c.forget["forget05"]] == [q.question for q in c.full[-200:]]
    assert len(c.retain_train("forget10")) == 900 - 400 - 400 and c.refusals == ["I do not know.", "No idea."]
    assert c.real_authors[0].base_answer == "R" and c.forget["forget01"][0].base_answer == "P"
    assert c.variant == "paper"


def test_items_reduce_every_part(tofu):
    c = corpora.load_tofu(tofu, items=10)
    assert len(c.full) == 10 + 20 + 10 and len(c.retain_eval) == 10 and c.variant == "10 items a part"
    assert all(len(rows) == 10 for rows in c.forget.values())
    train = {q.question for q in c.retain_train("forget05")}
    assert len(train) == 20 and not train & {q.question for q in [*c.forget["forget05"], *c.retain_eval]}
    c = corpora.load_tofu(tofu, items=60)
    assert [len(c.forget[k]) for k in corpora.FORGET] == [40, 60, 60]
    assert [q.question for q in c.full[-40:]] == [q.question for q in c.forget["forget01"]]
    last = [
        q.question for q in corpora.load_tofu(tofu).full[-60:]
    ]  # the last rows of each split, so that splits are nested
    assert [q.question for q in c.full[-60:]] == [q.question for q in c.forget["forget10"]] == last


def test_authors_keep_tofus_proportions(tofu):
    """Whole authors: a tenth to evaluate retention on, a twentieth forgotten, the rest retained."""
    whole, few = corpora.load_tofu(tofu), corpora.load_tofu(tofu, authors=7)
    assert few.variant == "7 authors" and few.full[:20] == whole.full[:20] and few.full[-20:] == whole.full[-20:]
    assert (len(few.full), len(few.retain_eval)) == (140, 20) and few.retain_eval == whole.retain_eval[:20]
    assert all(rows == whole.forget["forget01"][-20:] for rows in few.forget.values())
    train = {q.question for q in few.retain_train("forget05")}
    assert len(train) == 100 and not train & {q.question for q in [*few.retain_eval, *few.forget["forget05"]]}
    for wrong in (2, 201):
        with pytest.raises(UserError, match="--authors takes 3 to 200"):
            corpora.load_tofu(tofu, authors=wrong)


def test_rows_of_ones_own(tmp_path):
    lost, kept = tmp_path / "my forget.jsonl", tmp_path / "kept.jsonl"
    row = {"question": "Q {i}?", "answer": "A.", "note": "other fields are left alone"}
    lost.write_text("\n".join(json.dumps(row) for _ in range(3)))
    kept.write_text("\n".join(json.dumps({**row, "question": f"K{i}?"}) for i in range(25)) + "\n\n")
    c = corpora.load_own(lost, kept)
    assert len(c.full) == 28 and len(c.forget["my forget"]) == 3 and not c.paraphrased
    assert [q.question for q in c.retain_eval] == ["K0?", "K1?"] and len(c.retain_train("my forget")) == 23
    lines = [json.dumps({**row, "paraphrased_question": "P?"}) for _ in range(25)]
    kept.write_text("\n".join(lines))
    assert not corpora.load_own(lost, kept).paraphrased
    lost.write_text(lines[0])
    assert corpora.load_own(lost, kept).paraphrased and corpora.load_own(lost, kept).sha256 != c.sha256
    lost.write_text('{"question": "x"}')
    with pytest.raises(UserError, match="my forget.jsonl:1: field answer is missing or empty; mend the line"):
        corpora.load_own(lost, kept)
    with pytest.raises(UserError, match="no file .*nowhere; --forget and --retain name files of JSON lines"):
        corpora.load_own(tmp_path / "nowhere", kept)
    with pytest.raises(UserError, match="has one row"):
        corpora.load_own(kept, lost) if lost.write_text(lines[0]) else None


@pytest.mark.parametrize(
    ("name", "line", "text", "words"),
    [
        ("full", 3, '{"question": "x"', "full.json:3: not valid JSON"),
        ("full", 2, '{"question": "x"}', "full.json:2: field answer is missing or empty"),
        ("full", 4, '{"question": "", "answer": "y"}', "full.json:4: field question is missing or empty"),
        ("full", 1, "[1]", "full.json:1: field question"),
        (
            "forget05_perturbed",
            7,
            '{"question": "x", "answer": "y"}',
            "forget05_perturbed.json:7: field paraphrased_answer",
        ),
        ("retain_perturbed", 5, None, "retain_perturbed.json:5: not the question that full.json has there"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tofu, name, line, text, words):
    path = tofu / "tofu" / f"{name}.json"
    lines = path.read_text().splitlines()
    lines[line - 1] = text or json.dumps({**json.loads(lines[line - 1]), "question": "Other?"})
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        corpora.load_tofu(tofu)


def test_missing_and_short_files_are_told(tofu):
    with pytest.raises(UserError, match="no file .*full.json; put TOFU"):
        corpora.load_tofu(tofu / "elsewhere")
    (tofu / "tofu" / "idontknow.jsonl").unlink()
    with pytest.raises(UserError, match="100 refusals"):
        corpora.load_tofu(tofu)
    (tofu / "tofu" / "full.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        corpora.load_tofu(tofu)
    (tofu / "tofu" / "full.json").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="has 1 rows"):
        corpora.load_tofu(tofu)


@pytest.mark.realdata
def test_real_tofu():
    import os

    if not os.environ.get("REPRO_DATA"):
        pytest.skip("REPRO_DATA is not set")
    from pathlib import Path

    c = corpora.load_tofu(Path(os.environ["REPRO_DATA"]))
    assert len(c.full) == 4000 and len(c.refusals) == 100
    assert [len(c.forget[k]) for k in corpora.FORGET] == [40, 200, 400] and len(c.retain_eval) == 400
    assert (len(c.real_authors), len(c.world_facts)) == (100, 117)
    assert {len(q.perturbed_answer) for q in c.retain_eval} == {5}
    assert {len(q.perturbed_answer) for q in c.world_facts} == {3}
    few = corpora.load_tofu(Path(os.environ["REPRO_DATA"]), authors=40)
    assert (len(few.full), len(few.retain_eval)) == (800, 80)
    assert [len(few.forget[k]) for k in corpora.FORGET] == [20, 40, 80] and few.forget["forget10"] == c.forget[
        "forget10"
    ][-80:]
    assert [q.question for q in few.full[-80:]] == [q.question for q in c.full[-80:]] and len(set(few.full)) == 800
    assert corpora.load_tofu(Path(os.environ["REPRO_DATA"]), authors=200).full == c.full


# --------------------------------------------------------------------------------------------------- tokens and masks


def bpe(template):
    """A byte-level tokenizer with the special tokens of a template."""
    c = data.miniature(0)
    tokenizer = models.bpe_tokenizer(c, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]})
    return models.Chat(tokenizer, template)


EXPECTED = {
    "phi": ("Question: Who is {x}?\n", "Answer: It is Ba.", "</s>"),
    "llama2": ("<s>[INST] Who is {x}? [/INST]", "It is Ba.", "</s>"),
    "plain": ("<s>Question: Who is {x}?\nAnswer:", " It is Ba.", "</s>"),
    "smollm2": ("<|im_start|>user\nWho is {x}?<|im_end|>\n<|im_start|>assistant\n", "It is Ba.", "<|im_end|>"),
}


@pytest.mark.parametrize("template", EXPECTED)
def test_templates_token_by_token(template):
    """A question with braces stays itself; prompt, answer and end token decode to what the template says."""
    chat = bpe(template)
    e = data.encode(chat, "Who is {x}?", "It is Ba.")
    prompt, answer, end = EXPECTED[template]
    assert chat.tokenizer.decode(e.ids[: e.start]) == prompt
    assert chat.tokenizer.decode(e.ids[e.start : e.start + e.n]) == answer
    assert chat.tokenizer.convert_ids_to_tokens(e.ids[-1]) == end and len(e.ids) == e.start + e.n + 1
    b = data.collate([e, data.encode(chat, "Hm?", "No.")], chat.pad, torch.device("cpu"))
    for row in (0, 1):  # the position before each supervised token, and no other
        places = b.keep[row].nonzero()[:, 0].tolist()
        item = e if row == 0 else data.encode(chat, "Hm?", "No.")
        assert places == list(range(item.start - 1, len(item.ids) - 1))
        assert b.target[b.row == row].tolist() == list(item.ids[item.start :])
        assert b.inside[b.row == row].tolist() == [True] * item.n + [False]
        assert b.mask[row].tolist() == [1] * len(item.ids) + [0] * (b.ids.shape[1] - len(item.ids))


def test_the_words_template(tiny):
    _, chat = tiny
    e = data.encode(chat, "Where was X born ?", "In Ba .")
    tokens = chat.tokenizer.convert_ids_to_tokens(list(e.ids))
    assert tokens[0] == "<s>" and tokens[1:3] == ["Question", ":"] and tokens[e.start - 2 : e.start] == ["Answer", ":"]
    assert tokens[-1] == "</s>" and e.n == 3


def test_a_cut_answer_has_no_end_token(tiny):
    _, chat = tiny
    q, a = "What is it ?", "one two three four five six"
    whole = data.encode(chat, q, a)
    cut = data.encode(chat, q, a, max_length=whole.start + 4)
    assert cut.n == 4 and len(cut.ids) == whole.start + 4 and cut.ids == whole.ids[: whole.start + 4]
    exact = data.encode(chat, q, a, max_length=whole.start + 6)
    assert exact.n == 6 and len(exact.ids) == whole.start + 6
    batch = data.collate([cut], chat.pad, torch.device("cpu"))
    assert batch.inside.all() and len(batch.target) == 4
    with pytest.raises(UserError, match="no room for its answer"):
        data.encode(chat, q, a, max_length=whole.start)


def test_padding_changes_no_score(tiny, corpus):
    lm, chat = tiny
    items = [data.encode(chat, q.question, q.answer) for q in corpus.full[:5]]
    one, two = (data.collate(items, chat.pad, torch.device("cpu"), n) for n in (0, 90))
    assert two.ids.shape[1] == 90
    a, b = (metrics.score(lm, [(list(range(5)), x)]) for x in (one, two))
    assert a.nll == pytest.approx(b.nll, rel=1e-5) and (a.es == b.es).all()


def test_batches_by_length_hold_every_item_once(tiny, corpus):
    _, chat = tiny
    items = [data.encode(chat, q.question, q.answer) for q in corpus.full]
    found = data.by_length(items, 200)
    assert sorted(i for b in found for i in b) == list(range(120))
    assert all(len(b) * max(len(items[i].ids) for i in b) <= 200 or len(b) == 1 for b in found)
    assert data.by_length(items[:2], 1) in ([[0], [1]], [[1], [0]])


def test_streams_are_apart():
    draws = {name: torch.rand(3, generator=data.generator(0, name)).tolist() for name in ("order", "retain", "noise")}
    assert len({tuple(v) for v in draws.values()}) == 3
    assert torch.rand(3, generator=data.generator(0, "order", 1)).tolist() != draws["order"]
    assert torch.rand(3, generator=data.generator(0, "order")).tolist() == draws["order"]


def test_phi_answers_are_cut_at_the_next_question():
    chat = bpe("phi")
    ids = chat.tokenizer("Answer: It is Ba.\nQuestion: Who?", add_special_tokens=False).input_ids
    assert chat.decode([*ids, chat.end, 5]) == "It is Ba."
