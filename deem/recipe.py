"""What trains in which stage and variant, at which rate; the table of the official configurations.

Variants: deem; deem-star (the paper's baseline: trunk frozen, U-Net trained, no CSR); clean (as deem, no CSR: the
ablation the paper lacks); both (trunk and U-Net trained, CSR: table 10, row 3); llava and llava-csr (table 5).
"""

from dataclasses import dataclass
from typing import Any, Literal

from lab.runs import UserError

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Variant = Literal["deem", "deem-star", "clean", "both", "llava", "llava-csr"]
VARIANTS = ("deem", "deem-star", "clean", "both", "llava", "llava-csr")
CSR = {"deem": True, "deem-star": False, "clean": False, "both": True, "llava": False, "llava-csr": True}
LABELS = {
    **{"deem": "DEEM", "deem-star": "DEEM* (baseline)", "clean": "DEEM without CSR", "both": "DEEM + MM-Interleaved"},
    **{"llava": "LLaVA", "llava-csr": "LLaVA + CSR"},
}

# Rows of the paper's tables for the models of later stages.
LATER = {
    **{(2, "deem"): "DEEM-VQA", (2, "deem-star"): "DEEM*-VQA", (3, "deem"): "DEEM-Mask"},
    **{(2, "clean"): "DEEM-VQA without CSR", (2, "both"): "DEEM + MM-Interleaved, VQA"},
}
# What the paper reports of each stage; of LLaVA it reports the tuned model.
SETS = {
    1: ("pope", "robustvqa", "mmvp"),
    2: ("pope", "robustvqa", "mmvp", "coco", "i2p", "vqav2", "okvqa", "gqa", "vizwiz", "visdial"),
    3: ("refcocog",),
}


def benchmarks_of(stage: int, variant: str, names: tuple[str, ...], first: bool) -> tuple[str, ...]:
    """Sets to answer after a stage: `stage` stands for the paper's; other names count for a run's first stage."""
    own = () if variant.startswith("llava") and stage == 1 else SETS[stage]
    if variant.startswith("llava"):
        own = own[:3]
    return tuple(n for name in names for n in (own if name == "stage" else (name,) if first else ()))


SPEECH = {"llm", "llm head"}
EYES, REGIONS = {"eyes", "condition"}, {"regions"}
SIGHT = {"synchroniser", "gate", "offsets", "soi", "new head"}
DECODER = {"net", "net offsets", "context", "null"}
PARTS = ("trunk", "eyes", "condition", "regions", "llm", "llm head", "synchroniser", "gate", "offsets", "soi",
         "new head", "unet", "vae", "net", "net offsets", "context", "null")  # fmt: skip


def trained(stage: int, variant: str) -> set[str]:
    """Names of the parts that train."""
    if stage not in (1, 2, 3):
        raise UserError(f"--stage {stage} is unknown; use 1, 2 or 3")
    if variant not in VARIANTS:
        raise UserError(f"--variant {variant} is unknown; use one of {', '.join(VARIANTS)}")
    if variant.startswith("llava"):  # stage 1: projector (with CSR also the trunk); stage 2: projector and LLM
        out = {"eyes", "soi", "new head"} | ({"condition"} if CSR[variant] else set())
        out |= {"trunk"} if CSR[variant] and stage == 1 else set()
        return out | ({"llm"} if stage > 1 else set())
    csr = CSR[variant]
    if stage == 1:
        out = EYES | SIGHT | DECODER if csr else {"eyes"} | SIGHT | DECODER
        out |= {"trunk"} if variant != "deem-star" else set()
        return out | ({"unet"} if variant in ("deem-star", "both") else set())
    out = {"eyes", "llm"} | SIGHT
    if stage == 2:
        return out | ({"condition", "net", "net offsets"} if csr else set())
    return out | REGIONS


def part_of(name: str) -> str:
    """Part of a parameter by its name in Deem."""
    head, _, rest = name.partition(".")
    if head == "encoder":
        if rest.startswith("trunk.") and not rest.startswith(("trunk.adapter.", "trunk.scales")):
            return "trunk"
        return "regions" if rest.startswith(("region_proj.", "mask_mlp.")) else "eyes"
    if head in ("resampler", "text_head", "projector"):
        return "eyes"
    if head in ("condition_head", "condition_reader"):
        return "condition"
    if head in ("context_proj", "context_reader"):
        return "context"
    if head == "soi":
        return "soi"
    if head == "llm":
        if ".synchroniser." in name:
            last = name.rpartition(".synchroniser.")[2]
            return "gate" if last == "gate" else "offsets" if ".offsets." in last else "synchroniser"
        if rest.startswith("lm_head."):
            return "new head" if rest.startswith("lm_head.new.") else "llm head"
        return "llm"
    if head == "denoiser":
        if rest == "null":
            return "null"
        if rest.startswith("net."):
            return "net offsets" if ".offsets." in rest else "net"
        return "vae" if rest.startswith("latents.") else "unet"
    raise KeyError(name)


@dataclass(frozen=True)
class Rates:
    """Learning rates of a stage; the language model's is 1e-6 in the paper and 1e-5 in the code, where it misses its
    key and gets the base rate."""

    base: float
    trunk: float
    unet: float
    llm: float
    synchroniser: float
    offsets: float
    weight_decay: float = 0.05

    def of(self, part: str) -> float:
        named = {"trunk": self.trunk, "unet": self.unet, "llm": self.llm, "offsets": self.offsets}
        named |= {"net offsets": self.offsets, "synchroniser": self.synchroniser, "gate": self.synchroniser}
        return named.get(part, self.base)


STAGE1 = Rates(1e-4, 2e-5, 1e-5, 0.0, 1e-4, 1e-5)
STAGE2 = Rates(1e-5, 2e-5, 1e-5, 1e-6, 5e-6, 5e-6)
RATES = {1: STAGE1, 2: STAGE2, 3: STAGE2}
NO_DECAY = ("offsets", "net offsets", "gate")


def freeze(model: nn.Module, stage: int, variant: str) -> None:
    """requires_grad of every parameter; a frozen U-Net still lets gradients through. What no loss of the stage reads
    (an MMFSNet or map without a reader) stays frozen too, so that several processes wait for no gradient of it."""
    chosen = trained(stage, variant)
    if not model.loss.maps:
        chosen = chosen - {"net", "net offsets"}
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in chosen and _used(model, name))


def _used(model: nn.Module, name: str) -> bool:
    """Whether a map's adapter is read by tokens, the language model's layers, an MMFSNet or the region tokens."""
    if not name.startswith("encoder.adapters."):
        return True
    level, count = int(name.split(".")[2]), len(model.encoder.adapters)
    levels = model.p.llm_levels if model.context is not None else 0
    return level == model.encoder.token_level or level >= count - levels or model.loss.maps or model.p.masks


NORMS = (nn.LayerNorm, nn.GroupNorm, LlamaRMSNorm)


def biases_and_norms(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone; learned queries and vectors are not among them."""
    norms = {f"{k}." for k, m in model.named_modules() if isinstance(m, NORMS)}
    names = [k for k, _ in model.named_parameters()]
    return {k for k in names if k.endswith(".bias") or k.removesuffix(k.rpartition(".")[2]) in norms}


def groups(model: nn.Module, stage: int, variant: str, rates: Rates | None = None) -> list[dict[str, Any]]:
    """Groups {name, params, lr, weight_decay}: a part, split into what decays and what does not (biases, norms,
    sampling offsets, gates). Call freeze first."""
    r, out = rates or RATES[stage], {}
    chosen, spared = trained(stage, variant), biases_and_norms(model)
    for name, p in model.named_parameters():
        part = part_of(name)
        if part not in chosen or not p.requires_grad:
            continue
        decay = r.weight_decay if part not in NO_DECAY and name not in spared else 0.0
        key = f"{part}{'' if decay else ', no decay'}"
        group = out.setdefault(key, {"name": key, "params": [], "lr": r.of(part), "weight_decay": decay})
        group["params"].append(p)
    return list(out.values())


def table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{part: (parameters, trained ones)}."""
    out = dict.fromkeys(PARTS, (0, 0))
    for name, p in model.named_parameters():
        a, b = out[part_of(name)]
        out[part_of(name)] = (a + p.numel(), b + p.numel() * p.requires_grad)
    return {k: v for k, v in out.items() if v[0]}
