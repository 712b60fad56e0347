"""Class-conditional diffusion generators in pixel space, built of diffusers' own classes, and their training.

`concat`: UNet2DModel with the control map as a further input channel. `controlnet`: UNet2DConditionModel with
ControlNetModel, the classes of Stable Diffusion, with an identity in the autoencoder's place. Both share the interface
of ExactDenoiser (echomod.py). Control is weak on purpose: from an edge map of a digit its class can be read, and a
network trained on pairs that always agree learns to ignore the label.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError, sent

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echomod import STEPS, alphas, noise_of, sdedit, timesteps, to_images, to_signal

CONTROLS = ("ink", "box", "none")


def control_map(images: Tensor, kind: str, cells: int = 4) -> Tensor:
    """uint8 [n, H, W, C] -> [n, 1, H, W] in [0, 1]. ink: mean brightness in cells x cells fields; box: the bounding box
    of what is brighter than a quarter of the brightest; none: zeros."""
    grey = images.float().mean(-1, keepdim=True).permute(0, 3, 1, 2) / 255
    if kind == "ink":
        return F.interpolate(F.adaptive_avg_pool2d(grey, cells), grey.shape[-2:], mode="nearest")
    if kind == "box":
        on = grey > grey.amax((1, 2, 3), keepdim=True) / 4

        def between(v: Tensor, dim: int) -> Tensor:  # from the first to the last True
            return (v.cummax(dim).values * v.flip(dim).cummax(dim).values.flip(dim)) > 0

        rows, columns = on.any(3, keepdim=True).float(), on.any(2, keepdim=True).float()
        return (between(rows, 2) & between(columns, 3)).float()
    return torch.zeros_like(grey)


class Concat(nn.Module):
    """eps(x_t, t, y, c): UNet2DModel on [x_t, c]; class C is the unconditional one."""

    def __init__(self, size: int, channels: int, classes: int, widths: Sequence[int], layers: int):
        super().__init__()
        from diffusers import UNet2DModel

        n = len(widths)
        self.net = UNet2DModel(
            sample_size=size,
            in_channels=channels + 1,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * n,
            up_block_types=("UpBlock2D",) * n,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            norm_num_groups=8,
            num_class_embeds=classes + 1,
            add_attention=False,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor, control: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(torch.cat([x, scale * control], 1), t, class_labels=y).sample


class Control(nn.Module):
    """eps(x_t, t, y, c): UNet2DConditionModel with a ControlNetModel made from it; labels are tokens of a table."""

    def __init__(self, size: int, channels: int, classes: int, widths: Sequence[int], layers: int, dim: int = 32):
        super().__init__()
        from diffusers import ControlNetModel, UNet2DConditionModel

        n = len(widths)
        self.net = UNet2DConditionModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (n - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (n - 1) + ("UpBlock2D",),
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            norm_num_groups=8,
            cross_attention_dim=dim,
            attention_head_dim=8,
        )
        self.control = ControlNetModel.from_unet(
            self.net, conditioning_embedding_out_channels=(16,), conditioning_channels=1
        )
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, control: Tensor, scale: float = 1.0) -> Tensor:
        word = self.table(y)[:, None]
        if scale == 0:
            return self.net(x, t, word).sample
        down, mid = self.control(x, t, word, control, conditioning_scale=scale, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.net(x, t, word, **more).sample


NETS = {"concat": Concat, "controlnet": Control}


class Trained:
    """A trained noise predictor behind `edit`: SDEdit with classifier-free guidance and weak, early control."""

    def __init__(
        self,
        net: nn.Module,
        about: dict,
        classes: int,
        device: torch.device,
        *,
        strength: float,
        steps: int,
        sampler: str = "ddim",
        guidance: float = 2.0,
        control: str = "ink",
        control_scale: float = 0.5,
        control_end: float = 0.5,
        bf16: bool = False,
    ):
        self.net, self.classes, self.device = net.to(device).eval(), classes, device
        self.strength, self.steps, self.sampler, self.guidance = strength, steps, sampler, guidance
        self.control, self.scale, self.end, self.bf16 = control, control_scale, control_end, bf16
        knobs = {"strength": strength, "steps": steps, "sampler": sampler, "guidance": guidance, "control": control}
        knobs |= {"control_scale": control_scale, "control_end": control_end, "bf16": bf16}
        self._about = {**about, **knobs}

    def about(self) -> dict:
        return dict(self._about)

    @torch.no_grad()
    def edit(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        if not timesteps(self.strength, self.steps):
            return images.clone()
        x0 = to_signal(images).to(self.device)
        hint = control_map(images, self.control).to(self.device)
        y, none = labels.to(self.device), torch.full_like(labels, self.classes, device=self.device)

        def predict(x: Tensor, t: int, done: float) -> Tensor:
            scale = self.scale if done < self.end else 0.0
            ts = torch.full((len(x),), t, device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                if self.guidance == 1:
                    return self.net(x, ts, y, hint, scale).float()
                both = [torch.cat(pair) for pair in ((x, x), (ts, ts), (none, y), (hint, hint))]
                free, wanted = self.net(*both, scale).float().chunk(2)
            return free + self.guidance * (wanted - free)

        noise = noise_of(seeds, x0.shape[1:]).to(self.device)
        return to_images(sdedit(predict, x0, noise, self.strength, self.steps, self.sampler)).cpu()


def train(
    kind: str,
    images: Tensor,
    labels: Tensor,
    classes: int,
    folder: Path,
    device: torch.device,
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    widths: Sequence[int],
    layers: int,
    control: str,
    label_dropout: float = 0.1,
    control_dropout: float = 0.5,
    decay: float = 0.999,
    flip: bool = False,
    bf16: bool = False,
    every: int = 200,
    show: bool = True,
) -> tuple[nn.Module, dict]:
    """Train on clean images (uint8 [n, H, W, C]) by eps-MSE; (network with averaged weights, its description).

    The result lies in folder/model.safetensors, checkpoints every `every` steps beside it; all that a step draws
    comes from a generator seeded with (seed, step), so a training that was cut goes on to the same weights.
    """
    if len(images) == 0:
        raise UserError(f"--generator {kind} is trained on clean images: give --pretrain")
    if any(w % 8 for w in widths) or images.shape[1] % 2 ** (len(widths) - 1):
        raise UserError(
            f"--net.widths {widths}: multiples of 8, and the side {images.shape[1]} must halve between them"
        )
    torch.manual_seed(seed)
    net = NETS[kind](images.shape[1], images.shape[3], classes, widths, layers)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    about = {"generator": kind, "widths": list(widths), "layers": layers, "train_steps": steps, "train_batch": batch}
    about |= {"train_lr": lr, "train_seed": seed, "train_data": digest, "train_control": control, "decay": decay}
    about |= {"label_dropout": label_dropout, "control_dropout": control_dropout, "flip": flip, "train_bf16": bf16}
    name = hashlib.sha256(runs.json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    final, half = folder / f"{kind}-{name}.safetensors", folder / f"{kind}-{name}.checkpoint"
    if final.is_file():
        _load(net, runs.read_tensors(final)[0], final)
        return net, about
    net = net.to(device)
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    first, before = 0, 0.0
    if half.is_file():
        first, before = _resume(half, net, average, optimizer)
        print(f"resuming the generator at step {first}")
    x_all, hint_all, y_all = to_signal(images).to(device), control_map(images, control).to(device), labels.to(device)
    a, started = alphas().float().to(device), time.perf_counter()
    total = torch.zeros((), device=device)
    bar = progress(range(first, steps), f"generator {kind}", steps, first, hide=not show)
    net.train()
    for step in bar:
        draw = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        pick = sent(torch.randint(len(images), (batch,), generator=draw), device)
        t = sent(torch.randint(STEPS, (batch,), generator=draw), device)
        noise = sent(torch.randn(batch, *x_all.shape[1:], generator=draw), device)
        drops = sent(torch.rand(3, batch, generator=draw), device)
        x, hint = x_all[pick], hint_all[pick]
        if flip:
            turned = (drops[2] < 0.5)[:, None, None, None]
            x, hint = torch.where(turned, x.flip(3), x), torch.where(turned, hint.flip(3), hint)
        hint = hint * (drops[1] >= control_dropout)[:, None, None, None]
        y = torch.where(drops[0] < label_dropout, classes, y_all[pick])
        at = a[t][:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = net(at.sqrt() * x + (1 - at).sqrt() * noise, t, y, hint)
        loss = F.mse_loss(found.float(), noise)
        for group in optimizer.param_groups:  # 5 % warm-up, then half a cosine
            up = min(1.0, (step + 1) / max(1, steps // 20))
            group["lr"] = lr * up * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(decay, (step + 1) / (step + 10)))
        total += loss.detach()
        if (step + 1) % every == 0 or step + 1 == steps:
            value = float(total) / ((step - first) % every + 1)
            if not math.isfinite(value):
                raise UserError(f"the generator's loss is not finite at step {step + 1}; lower --net.lr")
            bar.set_postfix(loss=f"{value:.4f}")
            total.zero_()
            seconds = before + time.perf_counter() - started
            _save(half, step + 1, seconds, net, average, optimizer)
    with torch.no_grad():
        for p, v in zip(parameters, average, strict=True):
            p.copy_(v)
    runs.write_tensors(final, net.state_dict(), {"about": runs.json.dumps(about)})
    half.unlink(missing_ok=True)
    return net.cpu(), about


def _save(path: Path, step: int, seconds: float, net: nn.Module, average: list[Tensor], optimizer) -> None:
    tensors = {f"model.{k}": v for k, v in net.state_dict().items()}
    for i, (p, v) in enumerate(zip(net.parameters(), average, strict=True)):
        state = optimizer.state[p]
        tensors |= {f"average.{i}": v, f"m.{i}": state["exp_avg"], f"v.{i}": state["exp_avg_sq"]}
    runs.write_tensors(path, tensors, {"step": str(step), "seconds": str(seconds)})


def _resume(path: Path, net: nn.Module, average: list[Tensor], optimizer) -> tuple[int, float]:
    tensors, meta = runs.read_tensors(path)
    try:
        _load(net, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, path)
        step = int(meta["step"])
        for i, p in enumerate(net.parameters()):
            average[i].copy_(tensors[f"average.{i}"])
            made = {"step": torch.tensor(float(step))}
            made["exp_avg"] = torch.empty_like(p).copy_(tensors[f"m.{i}"])
            made["exp_avg_sq"] = torch.empty_like(p).copy_(tensors[f"v.{i}"])
            optimizer.state[p] = made
        return step, float(meta["seconds"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} belongs to another generator ({error}); delete it to start again") from None


def _load(net: nn.Module, tensors: dict, path: Path) -> None:
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} holds weights of another network ({str(error)[:120]}); delete it") from None
