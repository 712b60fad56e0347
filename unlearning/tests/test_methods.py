"""What a step sees and what its loss is: draws, pairs, reference scores, every method's gradient, trained
parameters."""

import copy

import pytest
import torch
from waits import Waits

import data
import losses
import methods
import models
import originals
from methods import METHODS, Unlearner
from settings import Settings
from trainer import Trainer, block, by_size, schedule, steps_of

CPU = torch.device("cpu")


def settings(**more):
    s = Settings(**{"batch": 3, "accum": 2, **more})
    s.check()
    s.resolve()
    return s


def unlearner(tiny, corpus, method, **more):
    """An unlearner whose model has moved away from the reference, as in the middle of a run."""
    lm, chat = tiny
    reference = copy.deepcopy(lm)
    u = Unlearner(settings(**more), method, lm, reference, chat, corpus, "forget-small", 0)
    with torch.no_grad():
        g = torch.Generator().manual_seed(9)
        for p in lm.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    t = Trainer(lm, originals.accelerator_of(CPU), lr=1e-3, steps=5, warmup=1, accum=2, trained=u.trained(method))
    u.bind(t)
    return u, t


# ------------------------------------------------------------------------------------------------------------- draws


def test_numbers_of_steps():
    """floor(epochs n / (b accum)): 12, 62 and 125 for the paper's splits; warm-up is one epoch."""
    assert [steps_of(5, n, 4, 4) for n in (40, 200, 400)] == [(12, 2), (62, 12), (125, 25)]
    assert steps_of(5, 4000, 4, 8) == (625, 125) and steps_of(1, 3, 4, 4) == (1, 1)


def test_schedule_ends():
    shares = [schedule(t, 10, 4) for t in range(10)]
    assert shares[:5] == [0, 0.25, 0.5, 0.75, 1.0] and shares[-1] == pytest.approx(1 / 6)
    assert schedule(10, 10, 4) == 0 and schedule(1, 1, 1) == 0


def test_each_epoch_sees_every_item_once_in_an_order_of_its_own():
    n, size = 10, 4
    seen = [pair for step in range(5) for pair in block(step, size, n, 0, "order")]
    for epoch in (0, 1):
        items = [i for e, i in seen if e == epoch]
        assert sorted(items) == list(range(n))
    assert [i for e, i in seen if e == 0] != [i for e, i in seen if e == 1]
    assert block(3, size, n, 0, "order") == seen[12:16] and block(3, size, n, 1, "order") != seen[12:16]


def test_micro_batches_by_size_keep_what_the_step_sees():
    parts = by_size([5, 1, 4, 2], lambda i: i, 2)
    assert parts == [[1, 2], [4, 5]]


def test_retain_partners_are_new_each_epoch_and_from_the_training_part(tiny, corpus):
    u, _ = unlearner(tiny, corpus, "gd")
    assert len(u.retain) == 120 - 20 - 30
    first = [u.draw(k) for k in range(3)]
    assert all(len(f) == 2 and len(f[0]) == 3 and len(r[0]) == 3 for f, r in first)
    assert u.draw(1) == first[1]
    partners = [sorted(i for part in u.draw(k)[1] for i in part) for k in (0, 10, 20)]  # steps of three epochs
    assert partners[0] != partners[1] != partners[2]


@pytest.mark.parametrize(("method", "stream"), [("gd", "retain"), ("po", "refusal")])
def test_each_epoch_draws_partners_from_a_stream_of_its_own(tiny, corpus, method, stream):
    u, _ = unlearner(tiny, corpus, method)
    n, most = len(u.forget), len(u.retain) if stream == "retain" else len(u.refusals)
    table = [torch.randint(most, (n,), generator=data.generator(u.seed, stream, e)).tolist() for e in (0, 1)]
    assert table[0] != table[1]
    for step in (0, 4, 5):  # 6 items a step of 20: the fourth lies across two epochs
        want = sorted(table[e][i] for e, i in block(step, u.size, n, u.seed, "order"))
        forget, retain = u.draw(step)
        assert want == sorted([r for part in forget for _, r in part] if stream == "refusal" else sum(retain, []))


def test_refusals_stand_behind_their_question(tiny, corpus):
    u, _ = unlearner(tiny, corpus, "po")
    lm, chat = tiny
    for pairs in u.draw(0)[0]:
        for i, r in pairs:
            e = u.refused(i, r)
            question = chat.prompt_ids(corpus.forget["forget-small"][i].question)
            assert list(e.ids[: e.start]) == question
            assert chat.decode(list(e.ids[e.start :])) == corpus.refusals[r]


@pytest.mark.parametrize("method", ["po", "po-kl"])
def test_preference_optimisation_never_trains_on_the_forget_answers(tiny, corpus, method):
    """The released code does so with a KL term; here the retain set is the only other text."""
    u, _ = unlearner(tiny, corpus, method)
    seen: list[data.Encoded] = []
    u.batch, real = lambda items: (seen.extend(items), real(items))[1], u.batch
    u.micro(0, 0)
    answers = {tuple(e.ids) for e in u.forget}
    assert seen and not answers & {tuple(e.ids) for e in seen}


# -------------------------------------------------------------------------------------------------------- the losses


def nll_of(lm, e):
    """Token losses of one sequence without padding, by the plain model."""
    logits = lm.hf(torch.tensor([e.ids])).logits[0]
    return [
        torch.nn.functional.cross_entropy(logits[t - 1], torch.tensor(e.ids[t])) for t in range(e.start, len(e.ids))
    ]


def plain_forget(u, method, pairs):
    """The forget term with one sequence at a time."""
    kind, lm, ref = METHODS[method].forget, u.lm, u.reference
    items = [u.forget[i] for i, _ in pairs]
    refused = [u.refused(i, r) for i, r in pairs] if u.refusals else []
    if kind == "rmu":
        rows = []
        for e in items:
            h = lm.hf(torch.tensor([e.ids]), output_hidden_states=True).hidden_states[u.layer][0]
            rows += [((h[t - 1] - 2.0 * u.direction) ** 2).mean() for t in range(e.start, len(e.ids))]
        return sum(rows) / len(rows)
    every = [nll_of(lm, e) for e in (refused if kind == "po" else items)]
    flat = torch.stack([v for row in every for v in row])
    s = [sum(row) for row in every]
    if kind == "ga":
        return -flat.mean()
    if kind == "po":
        return flat.mean()
    if kind == "wga":
        return -(torch.exp(-5 * flat).detach() * flat).mean()
    if kind == "satimp":
        p = torch.exp(-flat).detach()
        return -(p**5 * (1 - p) * flat).mean()
    if kind == "simnpo":
        each = [torch.nn.functional.logsigmoid(4.5 * a / len(r)) for a, r in zip(s, every, strict=True)]
        return -(2 / 4.5) * sum(each) / len(each)
    with torch.no_grad():
        before = [sum(nll_of(ref, e)) for e in items]
    if kind == "npo":
        each = [torch.nn.functional.logsigmoid(0.5 * (a - b)) for a, b in zip(s, before, strict=True)]
        return -(2 / 0.5) * sum(each) / len(each)
    with torch.no_grad():
        idk_before = [sum(nll_of(ref, e)) for e in refused]
    idk = [sum(nll_of(lm, e)) for e in refused]
    each = [
        torch.nn.functional.logsigmoid(0.1 * ((-i + ib) - (-a + ab)))
        for i, ib, a, ab in zip(idk, idk_before, s, before, strict=True)
    ]
    return -(2 / 0.1) * sum(each) / len(each)


def plain_retain(u, method, index):
    lm, ref, kind, total, n = u.lm, u.reference, METHODS[method].retain, 0, 0
    for i in index:
        e = u.retain[i]
        ids = torch.tensor([e.ids])
        if kind == "ce":
            rows = nll_of(lm, e)
            total, n = total + sum(rows), n + len(rows)
        elif kind == "kl":
            p = torch.log_softmax(lm.hf(ids).logits[0], -1)
            q = torch.log_softmax(ref.hf(ids).logits[0], -1).detach()
            total, n = total + (q.exp() * (q - p)).sum(), n + len(e.ids)
        else:
            a, b = (m.hf(ids, output_hidden_states=True).hidden_states[u.layer][0] for m in (lm, ref))
            total, n = total + ((a - b.detach()) ** 2).sum(), n + a.numel()
    return total / n


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_its_terms_taken_one_sequence_at_a_time(tiny, corpus, method):
    u, t = unlearner(tiny, corpus, method)
    forget, retain = u.draw(0)
    loss, _ = u.micro(0, 1)
    want = plain_forget(u, method, forget[1])
    if METHODS[method].retain:
        want = want + METHODS[method].weight * plain_retain(u, method, retain[1])
    assert float(loss) == pytest.approx(float(want), rel=2e-4, abs=1e-6)
    chosen = [p for p in u.lm.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, chosen, allow_unused=True) for x in (loss, want)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


def test_published_defaults():
    """Weights and betas of the dossier's table."""
    assert {k: m.weight for k, m in METHODS.items() if m.weight != 1} == {
        "npo-kl": 20,
        "satimp": 0.1,
        "rmu-origin": 100,
    }
    assert methods.BETA["npo"] == 0.5 and methods.BETA["dpo"] == 0.1 and methods.BETA["wga"] == 5


@pytest.mark.parametrize(
    "knob", [{"temperature": 2.0}, {"select": 0.5}, {"cap": 30.0}, {"cap": 3.0, "cap_unit": "token"}]
)
def test_tricks_reach_the_loss(tiny, corpus, knob):
    more = {"methods": ("ga", "gd")}
    u, _ = unlearner(tiny, corpus, "gd", **more, **knob)
    loss, parts = u.micro(0, 0)
    b = u.batch([u.forget[i] for i, _ in u.draw(0)[0][0]])
    logits = u.call(b.ids, b.mask, b.places)
    nll = losses.token_nll(logits, b.target)
    want = {
        "temperature": lambda: losses.ga(losses.token_nll(logits, b.target, 2.0)),
        "select": lambda: losses.selected(nll, b.row, b.size, 0.5),
        "cap": lambda: (
            losses.capped_tokens(nll, 3.0) if "cap_unit" in knob else losses.capped(nll, b.row, b.size, 30.0)
        ),
    }[next(iter(knob))]()
    assert float(parts["forget"]) == pytest.approx(float(want), rel=1e-5)
    weights = (0.1, 0.9) if "cap" in knob else (1, 1)
    total = weights[0] * float(want) + weights[1] * float(parts["retain"])
    assert float(loss) == pytest.approx(total, rel=1e-5) and float(want) != pytest.approx(
        float(losses.ga(nll)), rel=1e-3
    )


def test_simnpo_divides_by_the_length_of_the_answer(tiny, corpus):
    """With a small beta, where the loss is not flat."""
    u, _ = unlearner(tiny, corpus, "simnpo", beta=0.2)
    pairs = u.draw(0)[0][0]
    every = [nll_of(u.lm, u.forget[i]) for i, _ in pairs]
    each = [torch.nn.functional.logsigmoid(0.2 * sum(row) / len(row)) for row in every]
    assert float(u.forget_term(pairs)) == pytest.approx(float(-(2 / 0.2) * sum(each) / len(each)), rel=1e-5)


def test_zero_is_a_value_and_minus_one_the_default(tiny, corpus):
    u, _ = unlearner(tiny, corpus, "satimp", retain_weight=0.0)
    assert u.weight == 0
    loss, parts = u.micro(0, 0)
    assert float(loss) == float(parts["forget"])
    u, _ = unlearner(tiny, corpus, "satimp")
    assert u.beta == 5 and u.weight == 0.1


def test_rmu_origin_moves_three_blocks(tiny, corpus):
    u, _ = unlearner(tiny, corpus, "rmu-origin")
    u.layer = 7
    names = {f"hf.model.layers.{k}.mlp.down_proj.weight" for k in range(10)}
    assert {k for k in names if u.trained("rmu-origin")(k)} == {
        f"hf.model.layers.{k}.mlp.down_proj.weight" for k in (4, 5, 6)
    }


def test_rmu_trains_what_its_loss_reaches(tiny, corpus):
    """Layer 2 of 3: the rest of the network gets no gradient; RMU's origin moves down projections only."""
    u, _ = unlearner(tiny, corpus, "rmu")
    assert u.layer == 2
    loss, _ = u.micro(0, 0)
    loss.backward()
    moved = {k for k, p in u.lm.named_parameters() if p.grad is not None}
    assert moved == {k for k, p in u.lm.named_parameters() if p.requires_grad}
    assert not any(".layers.2." in k for k in moved) and any(".layers.1." in k for k in moved)
    names = [k for k, _ in u.lm.named_parameters() if u.trained("rmu-origin")(k)]
    assert names == [f"hf.model.layers.{k}.mlp.down_proj.weight" for k in (0, 1)]
    assert unlearner(tiny, corpus, "rmu-origin")[0].direction.norm() == pytest.approx(1.0)


def test_phi_depth_maps_layer_32_to_the_last():
    """Phi has 24 blocks: 10, 21 and 32 of 32 are 8, 16 and 24 there."""
    assert [max(1, min(24, round(k / 32 * 24))) for k in (10, 21, 32)] == [8, 16, 24]


def test_kl_of_a_run_does_not_change_with_padding(tiny, corpus):
    values = []
    for pad_to in (0, 60, 90):
        lm, chat = tiny
        u, _ = unlearner((copy.deepcopy(lm), chat), corpus, "kl", pad_to=pad_to)
        loss, parts = u.micro(0, 0)
        values.append((float(loss), float(parts["retain"])))
    assert values[1] == pytest.approx(values[0], rel=1e-4) and values[2] == pytest.approx(values[0], rel=1e-4)
    assert values[0][1] > 0


def test_cut_reads_an_earlier_layer_through_norm_and_head(tiny, corpus):
    lm, chat = tiny
    ids = torch.tensor([chat.prompt_ids(corpus.full[0].question)])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        states = lm.hf(ids, output_hidden_states=True).hidden_states
        want = lm.hf.lm_head(lm.hf.model.norm(states[1]))
        with lm.cut(1):
            torch.testing.assert_close(lm(ids, mask), want)
            assert lm.depth == 1
        torch.testing.assert_close(lm(ids, mask), lm.hf(ids).logits)
        assert lm.depth == 3 and len(lm.hf.model.layers) == 3


def test_logits_only_where_asked_are_those_of_the_whole(tiny, corpus):
    lm, chat = tiny
    b = data.collate([data.encode(chat, q.question, q.answer) for q in corpus.full[:3]], chat.pad, CPU)
    with torch.no_grad():
        torch.testing.assert_close(lm(b.ids, b.mask, b.places), lm.hf(b.ids, attention_mask=b.mask).logits[b.keep])
        h = lm(b.ids, b.mask, b.places, 3)
        torch.testing.assert_close(lm.hf.lm_head(h), lm(b.ids, b.mask, b.places))  # the last state is behind the norm


def test_states_of_a_layer_need_no_block_behind_the_next(tiny, corpus):
    """Asked for first of an early layer, then of later ones: the library's hooks sit on all blocks."""
    lm, chat = tiny
    b = data.collate([data.encode(chat, q.question, q.answer) for q in corpus.full[:3]], chat.pad, CPU)
    ran: list[int] = []
    for k, inner in enumerate(lm.hf.model.layers):
        inner.register_forward_hook(lambda *_, k=k: ran.append(k))
    with torch.no_grad():
        found = [lm(b.ids, b.mask, b.places, 1)]
        assert ran == [0, 1]
        found += [lm(b.ids, b.mask, b.places, layer) for layer in (2, 3)]
        whole = lm.hf(b.ids, attention_mask=b.mask, output_hidden_states=True).hidden_states
    for h, want in zip(found, whole[1:], strict=True):
        torch.testing.assert_close(h, want[b.keep], rtol=0, atol=0)
    assert lm.depth == 3


@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_the_papers_architectures_run_at_tiny_size(kind, tmp_path, corpus):
    """A folder as `save_pretrained` writes it, through the loader, the losses and a cut."""
    from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    tokenizer = models.bpe_tokenizer(corpus, 300)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    size |= {"intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    hf = PhiForCausalLM(PhiConfig(**size)) if kind == "phi" else LlamaForCausalLM(LlamaConfig(**size))
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    lm, chat = models.load({"phi": "phi", "llama": "llama2"}[kind], corpus, str(tmp_path / "m"), tmp_path)
    assert lm.depth == 3 and chat.tokenizer.decode(chat.answer_ids("x")) == {"phi": "Answer: x", "llama": "x"}[kind]
    for method in ("kl", "npo", "rmu", "rmu-origin"):
        u = Unlearner(settings(), method, lm, copy.deepcopy(lm), chat, corpus, "forget-small", 0)
        t = Trainer(lm, originals.accelerator_of(CPU), lr=1e-2, steps=3, warmup=1, accum=2, trained=u.trained(method))
        u.bind(t)
        before = {k: v.clone() for k, v in models.weights(lm).items()}
        t.update(u.micro), setattr(t, "step", 1), t.update(u.micro)
        moved = {k for k, v in models.weights(lm).items() if not torch.equal(v, before[k])}
        if method == "rmu-origin":
            assert moved and all(any(w in k for w in ("down_proj", "mlp.fc2")) for k in moved)
        else:
            assert len(moved) > 5
    with lm.cut(2), torch.no_grad():
        assert lm(torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.long)).shape == (1, 2, len(tokenizer))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((m, {}) for m in METHODS),
        ("gd", {"select": 0.8}),
        ("gd", {"cap": 2.0}),
        ("ga", {"cap": 2.0, "cap_unit": "token"}),
    ],
)
def test_a_step_never_waits_for_the_device(tiny, corpus, method, more):
    """What a batch is made of is built on the host; from there to the optimizer's step nothing is read back."""
    u, t = unlearner(tiny, corpus, method, methods=(method,), kl="tokens", **more)
    made = []
    u.batch = lambda items, whole=u.batch: made.append(whole(items)) or made[-1]
    u.micro(0, 0), u.micro(0, 1)  # now every batch of the step is known
    ready = iter(made)
    u.batch = lambda items: next(ready)
    drawn = u.draw(0)
    u.draw = lambda step: drawn
    with Waits() as found:
        t.update(lambda step, k: u.micro(0, k))
    # The library looks once a pass at the mask of a batch without padding.
    assert all(place.startswith("models.py") for place in found.places)
    assert len(found.places) <= 2 * sum(not b.padded for b in made) and any(b.padded for b in made)


def test_what_a_padded_batch_attends_to_is_what_the_library_makes_of_its_mask(tiny, corpus):
    lm, chat = tiny
    items = [data.encode(chat, q.question, q.answer) for q in corpus.full[:4]]
    b, alone = data.collate(items, chat.pad, CPU), data.collate(items[:1], chat.pad, CPU)
    assert b.padded and b.attend.shape == (4, 1, *[b.ids.shape[1]] * 2) and not alone.padded
    with torch.no_grad():
        assert torch.equal(lm(b.ids, b.attend, b.text), lm(b.ids, b.mask, b.text))
        assert torch.equal(alone.attend, alone.mask)
        lm.hf.set_attn_implementation("eager")  # takes what is no padding out of it
        torch.testing.assert_close(lm(b.ids, b.attend, b.text), lm(b.ids, b.mask, b.text), rtol=0, atol=0)
