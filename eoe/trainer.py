"""Pictures, captions, encoder and optimiser of a seed of the stand-in, and its checkpoints."""

import dataclasses
import hashlib
import random
from pathlib import Path

from lab import checkpoints, runs

import torch

from settings import Settings
from standins import drawn, standin


def captions(names: list[str], drop: float, rng: random.Random) -> list[str]:
    """ "a photo of a red striped circle", each word before the last left out with probability `drop`."""
    kept = ([w for w in n.split()[:-1] if rng.random() >= drop] + n.split()[-1:] for n in names)
    return ["a photo of a " + " ".join(words) for words in kept]


NOT_PART_OF_A_SEED = ("seeds", "out", "device", "scale", "table", "checkpoint_every")


class Trainer:
    """Model, optimiser, data and random state of one seed: everything a checkpoint needs."""

    def __init__(self, s: Settings, seed: int, device: torch.device):
        rng = random.Random(f"pictures {seed}")
        world = [*drawn.concepts(), *drawn.patterns()]
        names = [rng.choice(world) for _ in range(s.pictures)]
        self.pictures = drawn.draw(names, seed).to(device)
        self.tokens = standin.tokenise(captions(names, s.drop_word, rng)).to(device)
        torch.manual_seed(seed)
        self.model = standin.DualEncoder(s.width).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.s, self.seed, self.device = s, seed, device
        data = [self.pictures.cpu().numpy().tobytes(), self.tokens.cpu().numpy().tobytes()]
        own = {k: v for k, v in dataclasses.asdict(s).items() if k not in NOT_PART_OF_A_SEED}
        self.fingerprint = checkpoints.fingerprint({**own, "seed": seed}, [hashlib.sha256(x).hexdigest() for x in data])

    def batches(self, steps: int) -> torch.Tensor:
        """Pictures of the next `steps` batches [steps, batch], drawn on the CPU and sent over in one piece: a step that
        sends its own waits for the device. The numbers are those of as many single draws."""
        return torch.randint(len(self.pictures), (steps, self.s.batch), generator=self.generator).to(self.device)

    def rate(self, step: int) -> float:
        """One cycle: linear warm-up over 15 % of the steps, then a cosine to zero."""
        warm = max(1, round(0.15 * self.s.steps))
        if step < warm:
            return self.s.lr * (step + 1) / warm
        return (
            self.s.lr
            * 0.5
            * (1 + torch.cos(torch.tensor(3.14159265 * (step - warm) / max(1, self.s.steps - warm))).item())
        )

    def save(self, path: Path, step: int, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"adam.{k}": v for k, v in checkpoints.pack_optimizer(self.optimizer).items()}
        tensors["rng"] = self.generator.get_state()
        runs.write_tensors(path, tensors, {"step": str(step), "seconds": str(seconds), "run": self.fingerprint})

    def load(self, path: Path) -> tuple[int, float]:
        """-> (steps done, seconds spent)."""
        tensors, meta = runs.read_tensors(path)
        if meta.get("run") != self.fingerprint:
            raise checkpoints.misfit(path, "it is of other settings, another seed or other pictures")
        step, seconds = checkpoints.position(meta, "step", self.s.steps, path), checkpoints.seconds(meta, path)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "adam": {}, "rng": {}}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            parts.setdefault(group, {})[name] = value
        checkpoints.restore_module(self.model, parts["model"], path)
        checkpoints.restore_optimizer(self.optimizer, parts["adam"], path, began=step > 0)
        try:
            self.generator.set_state(parts["rng"][""])
        except (KeyError, RuntimeError, TypeError) as error:
            raise checkpoints.misfit(path, str(error)) from None
        return step, seconds
