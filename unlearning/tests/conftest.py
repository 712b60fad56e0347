"""A tiny language model over the generated corpus, and a finished run, shared by the tests."""

import pytest
import torch
from commands import DONE, run_main

import data
import models

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus():
    return data.miniature(0)


@pytest.fixture()
def tiny(corpus):
    """(LM, Chat) with random weights of its own for each test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.word_tokenizer(corpus)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **size, tie_word_embeddings=True, **ids)
    return models.LM(LlamaForCausalLM(config)).eval(), models.Chat(tokenizer, "words")


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """The folder of a finished run with three methods, attacks, utility and a retrained model; not to be written to."""
    out = tmp_path_factory.mktemp("done") / "r"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, *DONE, "--out", out)
    return out
