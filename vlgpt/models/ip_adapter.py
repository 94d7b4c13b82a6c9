"""IP-Adapter Plus without diffusers: its checkpoint files, their checks, and the Resampler.

A checkpoint holds two groups. `image_proj` is the Resampler, from ViT-H patch features (257 x 1280) to the 16 tokens
that the U-Net attends to; `ip_adapter` holds one key and one value projection for every cross-attention of that U-Net.
Layout and architecture follow tencent-ailab/IP-Adapter (resampler.py and attention_processor.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.models.weights import shape_problems

HEAD_WIDTH = 64
GROUPS = ("image_proj", "ip_adapter")
# A tensor of image_proj that only this kind of adapter has.
OTHER_ADAPTERS = {
    "proj.weight": "a base IP-Adapter (one pooled embedding)",
    "proj.3.weight": "a full-face IP-Adapter",
    "perceiver_resampler.proj_in.weight": "an IP-Adapter FaceID Plus",
    "norm.weight": "an IP-Adapter FaceID",
}


@dataclass(frozen=True)
class IpAdapterWeights:
    """The tensors of a checkpoint by group; `source` is its path, for messages."""

    image_proj: Mapping[str, Tensor]
    ip_adapter: Mapping[str, Tensor]
    source: str


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves. Parameters are named as in the checkpoint."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(B, P, width), (B, K, width) -> (B, K, width)."""
        latents = self.norm2(latents)
        context = torch.cat([self.norm1(features), latents], dim=1)
        query = rearrange(self.to_q(latents), "b k (h d) -> b h k d", h=self.num_heads)
        key, value = rearrange(self.to_kv(context), "b s (two h d) -> two b h s d", two=2, h=self.num_heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(mixed, "b h k d -> b k (h d)"))


class Resampler(nn.Module):
    """`image_proj` of IP-Adapter Plus: patch features -> image tokens. Defaults are `ip-adapter-plus_sd15`.

    `ip-adapter-plus_sdxl_vit-h` is width 1280, 20 heads, output_width 2048.
    """

    def __init__(
        self,
        *,
        feature_width: int = 1280,
        width: int = 768,
        output_width: int = 768,
        num_tokens: int = 16,
        depth: int = 4,
        num_heads: int = 12,
        mlp_ratio: int = 4,
    ):
        super().__init__()
        self.feature_width, self.output_width, self.num_tokens = feature_width, output_width, num_tokens
        self.latents = nn.Parameter(torch.randn(1, num_tokens, width) / width**0.5)
        self.proj_in = nn.Linear(feature_width, width)
        self.proj_out = nn.Linear(width, output_width)
        self.norm_out = nn.LayerNorm(output_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, num_heads),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, mlp_ratio * width, bias=False),
                        nn.GELU(),
                        nn.Linear(mlp_ratio * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, feature_width) -> (B, num_tokens, output_width)."""
        features = self.proj_in(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, mlp = cast(nn.ModuleList, layer)
            latents = attention(features, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))


def read_ip_adapter(path: str | Path) -> IpAdapterWeights:
    """Read a `.safetensors` (flat keys `image_proj.*`, `ip_adapter.*`) or a `.bin` file (two nested dicts).

    `path` is a local file, or `owner/repository/path/in/it` on the hub. Raises UserError when there is no such file, it
    cannot be read, or it does not hold the two groups.
    """
    local = _local_file(str(path))
    try:
        if local.suffix == ".safetensors":
            stored = load_file(local)
        else:
            # A .bin file is a pickle, which could execute anything; `weights_only` refuses all but tensors.
            stored = torch.load(local, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} could not be read as an IP-Adapter checkpoint: {reason}") from error
    groups = {group: _group_of(stored, group) for group in GROUPS}
    empty = [group for group, tensors in groups.items() if not tensors]
    if empty:
        is_mapping = isinstance(stored, Mapping)
        found = ", ".join(sorted(map(str, stored))[:4]) if is_mapping else type(stored).__name__
        raise UserError(
            f"{path} holds no {' and no '.join(empty)} tensors (found: {found}); wanted a file like "
            "ip-adapter-plus_sd15.safetensors with the groups image_proj and ip_adapter"
        )
    return IpAdapterWeights(groups["image_proj"], groups["ip_adapter"], str(path))


def _local_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    owner, repository, inside = [*path.split("/", 2), "", ""][:3]
    if not inside or not owner or path.startswith(("/", "./", "../", "~")):
        raise UserError(
            f"IP-Adapter file {path} is missing; give a local file or owner/repository/path on the hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repository}", inside))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"IP-Adapter file {path} is neither a local file nor on the hub: {reason}") from error


def _group_of(stored: object, group: str) -> dict[str, Tensor]:
    if not isinstance(stored, Mapping):
        return {}
    nested = stored.get(group)
    if isinstance(nested, Mapping):
        return {str(name): tensor for name, tensor in nested.items() if isinstance(tensor, Tensor)}
    prefix = f"{group}."
    return {name[len(prefix) :]: tensor for name, tensor in stored.items() if str(name).startswith(prefix)}


def load_resampler(weights: IpAdapterWeights) -> Resampler:
    """Build the Resampler whose sizes the checkpoint implies and fill it, in float32.

    Raises UserError for another kind of adapter, and for missing, unexpected or ill-shaped tensors.
    """
    state = dict(weights.image_proj)
    for name, kind in OTHER_ADAPTERS.items():
        if name in state:
            raise UserError(f"{weights.source} is {kind}; wanted a plus adapter such as ip-adapter-plus_sd15")
    sizes = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    missing = [f"image_proj.{name}" for name in sizes if name not in state]
    if missing:
        raise UserError(f"{weights.source} is no IP-Adapter Plus: it lacks {', '.join(missing)}")
    latents, width_in, width_out, query, mlp = (tuple(state[name].shape) for name in sizes)
    if [len(shape) for shape in (latents, width_in, width_out, query, mlp)] != [3, 2, 2, 2, 2]:
        raise UserError(
            f"{weights.source} is no IP-Adapter Plus: wrong number of dimensions among {', '.join(sizes)}"
        )
    resampler = Resampler(
        feature_width=width_in[1],
        width=latents[2],
        output_width=width_out[0],
        num_tokens=latents[1],
        depth=len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        num_heads=query[0] // HEAD_WIDTH,
        mlp_ratio=mlp[0] // latents[2],
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in resampler.state_dict().items()}
    check_shapes(state, wanted, group="image_proj", source=weights.source)
    resampler.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return resampler


def check_attention(
    weights: IpAdapterWeights, hidden_widths: Mapping[int, int], *, context_width: int
) -> None:
    """Compare `ip_adapter` with a U-Net: `hidden_widths` maps the index of each cross-attention to its width.

    Raises UserError that names the first differences.
    """
    output_width = weights.image_proj["proj_out.weight"].shape[0]
    if output_width != context_width:
        raise UserError(
            f"{weights.source} makes image tokens of width {output_width}, but this U-Net attends to width "
            f"{context_width}: use the adapter made for this base model (768: SD 1.5, 2048: SDXL)"
        )
    found = sum(name.endswith(".to_k_ip.weight") for name in weights.ip_adapter)
    if found != len(hidden_widths):
        raise UserError(
            f"{weights.source} has {found} to_k_ip projections, this U-Net has {len(hidden_widths)} "
            "cross-attentions: use the adapter made for this base model"
        )
    wanted = {
        f"{index}.{kind}.weight": (width, context_width)
        for index, width in hidden_widths.items()
        for kind in ("to_k_ip", "to_v_ip")
    }
    check_shapes(weights.ip_adapter, wanted, group="ip_adapter", source=weights.source)


def check_shapes(
    found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], *, group: str, source: str
) -> None:
    """Raises UserError that lists missing, unexpected and differently shaped tensors."""
    shapes = {f"{group}.{name}": tuple(tensor.shape) for name, tensor in found.items()}
    problems = shape_problems(shapes, {f"{group}.{name}": shape for name, shape in wanted.items()})
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        shown = "; ".join(problems[:4]) + more
        raise UserError(f"{source} does not have the layout of IP-Adapter Plus: {shown}")
