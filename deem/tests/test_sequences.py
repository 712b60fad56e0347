"""Tokens, labels and image places of documents."""

from lab.runs import UserError

import pytest
import torch
from conftest import documents, make
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from documents import sequences
from documents.readers import Document, Picture, Text
from documents.sequences import IGNORED, Packer, WordTokenizer, collate, encode, join
from scenes.digits import WORDS

TOK = WordTokenizer(WORDS)
P = Picture(Image.new("RGB", (4, 4)))


def test_labels_of_a_pair():
    row = encode([Text("there is a 3 ."), P, Text("yes")], TOK, 2)
    words = TOK.encode("there is a 3 .")
    assert row.ids == [TOK.bos, *words, TOK.soi, TOK.image, TOK.image, *TOK.encode("yes"), TOK.eos]
    # <SOI> behind text is learned, placeholders and BOS are not
    assert row.labels == [IGNORED, *words, TOK.soi, IGNORED, IGNORED, *TOK.encode("yes"), TOK.eos]
    assert [(s, b) for s, b, _ in row.images] == [(6, 0)]


def test_soi_behind_bos_is_not_learned():
    row = encode([P, Text("yes")], TOK, 3)
    assert row.labels[:5] == [IGNORED] * 5 and row.labels[5:] == [*TOK.encode("yes"), TOK.eos]


def test_prompts_are_not_learned():
    row = encode([Text("is there a 3", learn=False), P, Text("?", learn=False), Text("no")], TOK, 1)
    assert [x for x in row.labels if x != IGNORED] == [*TOK.encode("no"), TOK.eos]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["text", "picture"]), max_size=6), st.integers(2, 30))
def test_limit_never_cuts_an_image(kinds, limit):
    parts = [Text("there is a 3 .") if k == "text" else P for k in kinds]
    row = encode(parts, TOK, 4, limit=limit)
    assert len(row) <= limit and len(row.ids) == len(row.labels)
    for soi, _, _ in row.images:
        assert row.ids[soi] == TOK.soi and row.ids[soi + 1 : soi + 5] == [TOK.image] * 4
    assert row.ids.count(TOK.image) == 4 * len(row.images)


def test_visible_images_lie_in_the_same_document_and_before():
    first = encode([P, Text("yes"), P, Text("no")], TOK, 2)
    row = join([first, encode([Text("no"), P], TOK, 2)])
    b, pictures = collate([row, encode([Text("yes")], TOK, 2)], TOK)
    assert len(pictures) == 3 and b.slots.tolist() == [[0, 1, 2], [-1, -1, -1]]
    assert b.previous.tolist() == [-1, 0, -1] and b.bos.tolist() == [0, 0, len(first)]
    for n in range(3):
        soi, bos = int(b.soi[n]), int(b.bos[n])
        end = len(first) if n < 2 else len(row)
        want = [soi < k < end for k in range(len(row))]
        assert b.visible[0, :, n].tolist() == want and bos <= soi
    assert not b.visible[1].any() and b.attend[1].sum() == 3


def test_left_padding_moves_everything():
    rows = [
        encode([P, Text("yes")], TOK, 2, end=False),
        encode([Text("yes"), Text("no"), P, Text("is a 3")], TOK, 2, end=False),
    ]
    b, _ = collate(rows, TOK, left=True)
    right, _ = collate(rows, TOK)
    shift = len(rows[1]) - len(rows[0])
    assert b.ids[0, shift:].tolist() == rows[0].ids and not b.attend[0, :shift].any()
    assert (b.soi - right.soi).tolist() == [shift, 0]
    assert torch.equal(b.visible[0, shift:], right.visible[0, : len(rows[0])]) and not b.visible[0, :shift].any()
    assert not right.visible[0, len(rows[0]) :].any() and right.visible[0, : len(rows[0])].any()


def test_packer_fills_rows_and_counts_images():
    docs = [Document(tuple(d)) for d in documents(60)]
    packer = Packer(TOK, 3, 40, 4)
    source = iter(docs)
    for _ in range(4):
        row = packer.row(source)
        assert 0 < len(row) <= 40 and len(row.images) <= 4
        assert row.ids[0] == TOK.bos and row.ids.count(TOK.soi) == len(row.images)
    assert len(Packer(TOK, 3, 40, 4).row(iter([]))) == 0
    five = Document((P, P, Text("yes"), P, P, P))
    row = Packer(TOK, 3, 400, 2).row(iter([five]))  # what follows the last picture that may stand in a row is left out
    assert len(row.images) == 2 and row.ids[-2:] == [*TOK.encode("yes"), TOK.eos]
    source = iter(docs)
    for d in docs[:20]:  # stages II and III: a row is a document, with all its pictures
        row = Packer(TOK, 3, 400, 16, single=True).row(source)
        assert row.ids == encode(d.parts, TOK, 3).ids


def test_words_outside_the_vocabulary_are_told():
    with pytest.raises(UserError, match="zebra"):
        TOK.encode("there is a zebra")


def test_hf_tokenizer_with_new_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "is", "yes", "Yes", "region1"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok = sequences.HFTokenizer(hf, 7)
    assert tok.encode("is <ref>region1</ref>") == [3, tok.new["<ref>"], 6, tok.new["</ref>"]]
    assert tok.answers("yes") == [4, 5] and tok.decode([4, 2, tok.soi]) == "yes"
    assert tok.pad == 0 and tok.soi == 7 and len(tok.new) == 6


def test_a_blank_that_the_tokenizer_adds_is_not_added_twice():
    """SentencePiece's normaliser, as in Llama: a blank before every text, blanks written as a letter of their own."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "\u2581", "\u2581is", "\u2581yes", "\u2581Yes"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    hf = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert hf(" yes", add_special_tokens=False).input_ids == [3, 5]
    tok = sequences.HFTokenizer(hf, 7)
    assert tok.encode(" yes") == tok.encode("yes") == [5] and tok.encode("is yes") == [4, 5]
    assert tok.encode(" <mask>") == [tok.new["<mask>"]] and tok.answers("yes") == [5, 6]
    row = sequences.encode([Text("is", learn=False), Text(" yes")], tok, 1)
    assert [v for v in row.labels if v != sequences.IGNORED] == [5, tok.eos]


def test_answers_fit_the_digit_model():
    model, _ = make("digits")
    assert model.tok.answers("yes") != model.tok.answers("no")
    assert max(model.tok.new.values()) + 1 == model.llm.model.embed_tokens.num_embeddings


def test_a_text_that_comes_again_is_looked_up(monkeypatch):
    tok = sequences.WordTokenizer(["there", "is", "a"])
    calls = []
    ids = tok.ids
    monkeypatch.setattr(tok, "ids", lambda text: (calls.append(text), ids(text))[1])
    first = tok.encode("there is a")
    kept = list(first)
    first.append(99)  # the caller's own list
    assert tok.encode("there is a") == kept and calls == ["there is a"]
    for _ in range(2):
        with pytest.raises(UserError, match="vocabulary .*--preset"):
            tok.encode("there was")
    assert calls[1:] == ["there was"] * 2, "what fails is not kept"
