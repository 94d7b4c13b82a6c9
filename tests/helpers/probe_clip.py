"""The configuration of a tiny CLIP in open_clip's format."""

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "patch_size": 12, "width": 24, "layers": 2, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 448, "width": 16, "heads": 2, "layers": 1},
}
