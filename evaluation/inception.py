"""The Inception network of FID: Google's 2015-12-05 graph as pytorch-fid and torch-fidelity port it (2048 features).

It differs from torchvision's Inception v3 in three kinds of block (average pooling that leaves padding out
of the count; max pooling in the last block) and has 1,008 classes. Weights: a local copy of
`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or the same as safetensors; a file of other weights is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception

from evaluation.features import in_batches
from evaluation.metrics.resize import ResizeMode, resize
from vlgpt.errors import UserError
from vlgpt.models.encoders import hash_weights

NUM_CLASSES = 1008


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class BlockA(inception.InceptionA):
    """Mixed_5: four branches, (B, C, 35, 35) -> (B, C', 35, 35)."""

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps, same height and width: (B, C, H, W) -> (B, D, H, W)."""
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(_pool(x))], 1)


class BlockC(inception.InceptionC):
    """Mixed_6: 7 x 7 convolutions in halves, (B, 768, 17, 17) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps, same height and width: (B, C, H, W) -> (B, D, H, W)."""
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for number in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{number}")(double)
        return torch.cat([self.branch1x1(x), b7, double, self.branch_pool(_pool(x))], 1)


class BlockE(inception.InceptionE):
    """Mixed_7: (B, C, 8, 8) -> (B, 2048, 8, 8). `is_last` pools with the maximum, as the original graph does."""

    def __init__(self, in_channels: int, *, is_last: bool):
        super().__init__(in_channels)
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps, same height and width: (B, C, H, W) -> (B, 2048, H, W)."""
        b3 = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        # UPSTREAM: pytorch-fid inception.py, FIDInceptionE_2: the TensorFlow graph has max pooling here.
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1) if self.is_last else _pool(x)
        b3 = torch.cat([self.branch3x3_2a(b3), self.branch3x3_2b(b3)], 1)
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return torch.cat([self.branch1x1(x), b3, double, self.branch_pool(pooled)], 1)


def new_inception() -> nn.Module:
    """The network without weights; `features_of` runs it up to its average pool."""
    net = inception.Inception3(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(net, f"Mixed_{name}", BlockC(768, channels_7x7=width))
    net.Mixed_7b, net.Mixed_7c = BlockE(1280, is_last=False), BlockE(2048, is_last=True)
    return net.eval()


def features_of(net: nn.Module, pixels: Tensor) -> Tensor:
    """Pool-3 features: (B, 3, 299, 299) -> (B, 2048)."""
    for name, layer in net.named_children():
        if name == "avgpool":
            return layer(pixels).flatten(1)
        pixels = layer(pixels)
    raise ValueError("the network has no layer avgpool")


class InceptionFeatures:
    """Pool-3 features of the FID Inception with local weights. Raises UserError when the file does not fit."""

    def __init__(self, path: Path, *, resize_mode: ResizeMode = "pytorch_fid", device: str = "cpu"):
        if not path.is_file():
            raise UserError(
                f"Inception weights {path} not found; docs/evaluation.md says which file is meant"
            )
        self.net = new_inception().to(device)
        try:
            self.net.load_state_dict(_read(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} does not hold the FID Inception ({reason}); docs/evaluation.md names it"
            ) from error
        self.resize_mode, self.device = resize_mode, device
        self.identity = {
            "extractor": "inception-2015-12-05",
            "weights_hash": hash_weights(self.net),
            "resize": resize_mode,
        }

    def images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Images -> (n, 2048)."""
        rows = []
        for batch in in_batches(images):
            arrays = [resize(np.asarray(image), self.resize_mode) for image in batch]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
            pixels = _scaled(pixels, self.resize_mode).to(self.device)
            with torch.no_grad():
                rows.append(features_of(self.net, pixels).double().cpu())
        return torch.cat(rows).numpy()


def _scaled(pixels: Tensor, mode: ResizeMode) -> Tensor:
    """Grey levels 0..255 -> the network's range, as each implementation does."""
    if mode in ("pytorch_fid", "seed"):
        return pixels / 127.5 - 1
    return (pixels - 128) / 128


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # Tensors only, so that no code in a downloaded file runs.
    return torch.load(path, map_location="cpu", weights_only=True)
