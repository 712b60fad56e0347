"""Answers and drawings: generation against a search from scratch, yes/no, scores of options, batches, drawing."""

import math

from lab.runs import UserError

import pytest
import torch
from conftest import make
from PIL import Image

from documents.readers import Picture, Text
from vision.mmfs import GatedMMFS


def prompt(word, shade=0):
    return [Picture(Image.new("RGB", (16, 16), (shade,) * 3)), Text(f"Is there a {word} in the image?", learn=False)]


def test_yes_no_are_log_probabilities_of_the_next_token():
    model, _ = make("digits")
    model.eval()
    short, long = prompt("3", 40), [Text("there is a 3 .", learn=False), *prompt("8", 90)]
    both = model.yes_no([short, long])
    for i, p in enumerate((short, long)):
        b, seen = model.prepare([p], None, left=False)
        scores = model.llm.lm_head(model.hidden(b, seen)[0, -1]).log_softmax(-1)
        want = [scores[model.tok.encode(w)[0]] for w in ("yes", "no")]
        assert torch.allclose(both[i], torch.stack(want), atol=1e-5)  # padding on the left changes nothing


def test_encoded_images_can_be_reused():
    model, _ = make("digits")
    model.eval()
    prompts_ = [prompt("3", 40), prompt("8", 40), prompt("8", 200)]
    seen = model.encode_images(model.pictures([prompts_[0][0], prompts_[2][0]]))
    assert torch.allclose(model.yes_no(prompts_), model.yes_no(prompts_, seen.select([0, 0, 1])), atol=1e-6)
    with pytest.raises(ValueError, match="2 encoded images for 3"):
        model.yes_no(prompts_, seen)


def next_scores(model, parts, said):
    """Log-probabilities of the next token behind a prompt and words, from scratch: no cache, no padding, no beams."""
    parts = [*parts, Text(" ".join(said), learn=False)] if said else parts
    b, seen = model.prepare([parts], None, left=False)
    scores = model.llm.lm_head(model.hidden(b, seen)[0, -1]).float().log_softmax(-1).detach()
    scores[sorted(model.tok.new.values())] = -math.inf
    return scores


def search(model, parts, beams, steps, least=0):
    """Beam search from its definition, length penalty 0: the best sum of log-probabilities, finished or cut."""
    running, finished = [(0.0, [])], []
    for step in range(steps):
        found = []
        for total, said in running:
            scores = next_scores(model, parts, said)
            if step < least:
                scores[model.tok.eos] = -math.inf
            found += [(total + float(v), said, k) for k, v in enumerate(scores) if v > -math.inf]
        found.sort(key=lambda x: -x[0])
        # of the best 2 x beams those that end are kept if they are among the best, the others go on
        for place, (total, said, k) in enumerate(found[: 2 * beams]):
            if k == model.tok.eos and place < beams:
                finished.append((total, said))
        running = [(total, [*said, model.tok.words[k]]) for total, said, k in found if k != model.tok.eos][:beams]
    return max(finished + running)[1]


@pytest.mark.parametrize("preset", ["digits", "tiny"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_a_search_from_scratch(preset, beams):
    """Cache, left padding, beams and kept values of maps change nothing: rows with one image, none, and two."""
    model, _ = make(preset)
    model.eval()
    torch.manual_seed(4)
    for m in model.modules():
        if isinstance(m, GatedMMFS):
            m.gate.data.fill_(0.7)
            torch.nn.init.normal_(m.mmfs.out.bias, std=0.5)
            torch.nn.init.normal_(m.mmfs.weights.weight, std=0.3)
    torch.nn.init.normal_(model.llm.lm_head.base.weight, std=0.3)  # answers that differ from row to row
    given = [
        prompt("3", 40), [Text("there is a 3 .", learn=False)],
        [Text("there is a 3 .", learn=False), *prompt("8", 220)], [*prompt("8", 90), *prompt("1", 200)],
    ]  # fmt: skip
    texts = model.generate(given, num_beams=beams, max_new_tokens=4, length_penalty=0.0)
    for text, parts in zip(texts, given, strict=True):
        assert text == " ".join(w for w in search(model, parts, beams, 4) if not w.startswith("<"))
        assert model.generate([parts], num_beams=beams, max_new_tokens=4, length_penalty=0.0) == [text]
    assert len({*texts}) > 1
    assert not model.context.values or len(model.context.values) == len(model.gates())


def test_least_and_most_new_tokens():
    model, _ = make("digits")
    model.eval()
    torch.manual_seed(5)
    torch.nn.init.normal_(model.llm.lm_head.base.weight, std=0.1)
    parts = prompt("3", 40)
    first = [int(next_scores(model, parts, []).argmax())]
    with torch.no_grad():  # the end of the text is the most probable token from the start
        model.llm.lm_head.base.weight[model.tok.eos] = 1.2 * model.llm.lm_head.base.weight[first[0]]
    assert model.generate([parts], num_beams=3, max_new_tokens=5, length_penalty=0.0) == [""]
    (text,) = model.generate([parts], num_beams=3, max_new_tokens=5, min_new_tokens=5, length_penalty=0.0)
    assert text == " ".join(w for w in search(model, parts, 3, 5, least=5) if not w.startswith("<")) and text


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_a_row_does_not_depend_on_its_batch(preset):
    """Text without an image beside a prompt with one: the same hidden states as alone, gates open (all is ignored)."""
    model, _ = make(preset)
    model.eval()
    for m in model.modules():
        if isinstance(m, GatedMMFS):
            m.gate.data.fill_(0.7)
            torch.nn.init.normal_(m.mmfs.out.bias)
    text = [Text("there is a 3 .", learn=False)]
    alone, both = model.yes_no([text]), model.yes_no([text, prompt("8", 90)])
    assert torch.allclose(alone[0], both[0], atol=1e-5)
    assert torch.allclose(model.yes_no([prompt("8", 90)])[0], both[1], atol=1e-5)
    for g in model.gates():
        g.data.zero_()
    assert not torch.allclose(model.yes_no([text]), alone, atol=1e-4)


def test_option_scores_sum_log_probabilities():
    model, _ = make("digits")
    model.eval()
    got = model.option_scores([prompt("3"), prompt("4", 99)], [["yes", "there is a 3"], ["no"]])
    assert [len(g) for g in got] == [2, 1]
    b, seen = model.prepare([[*prompt("3"), Text("there is a 3")]], None, left=False)
    scores = model.llm.lm_head(model.hidden(b, seen)).log_softmax(-1)[0]
    ids = model.tok.encode("there is a 3")
    first = b.ids.shape[1] - len(ids)
    want = sum(scores[first - 1 + i, k] for i, k in enumerate(ids))
    assert torch.allclose(got[0][1], want, atol=1e-4)
    both = [[Text("no", learn=False), *prompt("3", 10)], [*prompt("4", 240), *prompt("4", 90)]]  # one picture, then two
    torch.nn.init.normal_(model.text_head.weight, std=0.5)
    asked = [["yes", "there is a 3"], ["no", "yes"]]
    together = model.option_scores(both, asked)
    for parts, texts, scores in zip(both, asked, together, strict=True):
        assert torch.allclose(model.option_scores([parts], [texts])[0], scores, atol=1e-4)
    other = [both[0], [*prompt("4", 0), *prompt("4", 90)]]
    assert not torch.allclose(model.option_scores(other, asked)[1], together[1], atol=1e-3)


def test_drawing_the_next_image():
    model, _ = make("digits")
    model.eval()
    docs = [[Text("there is a 3 .")], [prompt("3", 120)[0], Text("there is a 8 .")]]
    out = model.draw(docs, steps=3, guidance=2.0, seed=0)
    assert out.shape == (2, 3, 16, 16) and torch.isfinite(out).all()
    assert torch.equal(out, model.draw(docs, steps=3, guidance=2.0, seed=0))
    assert model.draw([[Text("there is a 3 .")]], steps=2).shape == (1, 3, 16, 16)
    third, _ = make("tiny", stage=3)
    with pytest.raises(UserError, match="stage 3 loads none"):
        third.draw([[Text("there is a 3 .")]])


def test_reconstruction_from_tokens():
    model, _ = make("digits")
    model.eval()
    x = torch.rand(2, 3, 16, 16)
    assert model.reconstruct(x, steps=3).shape == (2, 3, 16, 16)
    assert model.reconstruct(x, x, steps=10, strength=0.65, maps=True).shape == (2, 3, 16, 16)


def test_new_tokens_are_never_said():
    model, _ = make("digits")
    model.eval()
    model.llm.lm_head.base.weight.data.mul_(4)
    said = model.generate([prompt("3", 40)], max_new_tokens=4)
    model.llm.lm_head.new.bias.data.fill_(99.0)
    assert said[0] and model.generate([prompt("3", 40)], max_new_tokens=4) == said


def test_a_drawing_has_the_condition_of_the_next_image_loss(monkeypatch):
    """The context from <SOI> back and the maps of the picture before it are those that L_NIP trains with."""
    model, _ = make("digits")
    model.eval()
    torch.nn.init.normal_(model.soi, std=0.5)
    for g in model.gates():
        g.data.fill_(0.5)
    a, b = prompt("3", 40)[0], prompt("3", 220)[0]
    docs = [[Text("there is a 3 .")], [a, Text("yes"), b, Text("there is a 8 .")]]
    got = {}
    monkeypatch.setattr(model.denoiser, "draw", lambda c, **more: got.update(condition=c, **more))
    model.draw(docs)
    batch, seen = model.prepare([[*d, a] for d in docs], None, left=False)
    h = model.hidden(batch, seen)
    last = [0, 3]  # the pictures that would be drawn
    states, keep = model.image_context(h, batch)
    want = model.context_reader(states[last], keep[last])
    assert torch.allclose(got["condition"], want, atol=1e-5)
    assert got["seen"].tolist() == [False, True] and got["steps"] == 250 and got["guidance"] == 3.5
    for m, own in zip(got["maps"], seen.maps, strict=True):
        assert torch.allclose(m[1], own[2], atol=1e-6) and not m[0].any()
