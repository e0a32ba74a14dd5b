"""Frozen vision teachers: the encoders of timm, and the small one that prepare.py trains on a set.

Names of encoders and their preprocessing are those of REPA's official code.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import SIT_SIZES
from support.checkpoints import load_checkpoint
from support.flags import flag
from support.terminal import fail, first_line, first_rank_first

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of RGB in [0,1]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# --enc-type: timm's model; the size at which it sees 256 px, which makes its patches (14 or 16 px)
# match the 16x16 tokens of SiT/2; mean and std; whether tokens are taken after the final norm. All
# as in REPA's code, but dinov1's norm, which is our guess: its module is missing there.
TEACHERS = {
    "dinov2-vit-s": ("vit_small_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-b": ("vit_base_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-l": ("vit_large_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-g": ("vit_giant_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-s": ("vit_small_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-b": ("vit_base_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-l": ("vit_large_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-g": ("vit_giant_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov1-vit-b": ("vit_base_patch16_224.dino", 256, IMAGENET, True),
    "clip-vit-L": ("vit_large_patch14_clip_quickgelu_224.openai", 224, CLIP, False),
    "mae-vit-l": ("vit_large_patch16_224.mae", 256, IMAGENET, False),
    "jepa-vit-h": ("vit_huge_patch14_gap_224.in1k_ijepa", 224, IMAGENET, True),
}


class Teacher(nn.Module):
    """Frozen vision transformer: images (B,H,W,3) uint8 to class token (B,K), patch tokens (B,N,K).

    Both are float32. A model without a class token (I-JEPA) gives the mean of its patch tokens, as
    its authors describe an image.
    """

    def __init__(self, vit, mean, std, input_size, name):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.input_size = input_size
        self.name = name
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @property
    def width(self):
        return self.vit.embed_dim

    @property
    def grid(self):
        return self.vit.patch_embed.grid_size[0]

    def preprocess(self, images):
        """uint8 (B,H,W,3) to normalised pixels at the teacher's input size; bicubic, as REPA.

        REPA resizes without antialias, and for CLIP before it normalises: the same up to rounding,
        for bicubic weights sum to 1.
        """
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        if x.shape[-1] == self.input_size:
            return x
        return F.interpolate(x, self.input_size, mode="bicubic")

    @torch.no_grad()
    def forward(self, images):
        tokens = self.vit.forward_features(self.preprocess(images)).float()
        first_patch = self.vit.num_prefix_tokens  # after the class token and registers
        patches = tokens[:, first_patch:]
        if first_patch:
            return tokens[:, 0], patches
        return patches.mean(dim=1), patches


def load_prepared_teacher(path, resolution):
    """The teacher that `prepare.py teacher` wrote."""
    from timm.models.vision_transformer import VisionTransformer
    command = f"make it: python prepare.py teacher --data {Path(path).parent}"
    if not Path(path).is_file():
        fail(f"there is no teacher {path}; {command}")
    saved = load_checkpoint(path)
    if saved.get("resolution") != resolution:
        fail(f"{path} is not a teacher for {resolution} px, but for {saved.get('resolution')} px; "
             f"{command}")
    vit = VisionTransformer(**saved["config"])
    vit.load_state_dict(saved["model"])
    return Teacher(vit, [0.5] * 3, [0.5] * 3, resolution, "prepared")


def load_teacher(enc_type, resolution, path="", pretrained=True):
    """Teacher by name for images of `resolution` pixels, its weights from the hub or a local file.

    "prepared" reads the file that `prepare.py teacher` wrote; the other names are the keys of
    TEACHERS. A local file is timm's or the original release of DINOv2, DINO, MAE or I-JEPA, or a
    state dict of OpenAI's or open_clip's CLIP.
    """
    import timm
    if enc_type == "prepared":
        return load_prepared_teacher(path, resolution)
    if enc_type not in TEACHERS:
        fail(f"unknown teacher {enc_type!r}; --enc-type is one of: prepared, {', '.join(TEACHERS)} "
             f"(mocov3 is left out: timm has no weights for it)")
    name, size, (mean, std), keep_norm = TEACHERS[enc_type]
    is_too_large = resolution > 256 and not enc_type.startswith("dinov2")  # they learned at 224 px
    if resolution % 16 or is_too_large:
        fail(f"teacher {enc_type} is not for {resolution} px, but for multiples of 16 px up to 256 "
             f"(dinov2: any)")
    weights = None
    if path:  # read first, because a large model takes a while to build
        weights = load_checkpoint(path)
    try:
        with first_rank_first():
            vit = timm.create_model(
                name, pretrained=pretrained and not path, img_size=size * resolution // 256,
                num_classes=0)
    except (OSError, RuntimeError) as error:
        fail(f"could not load {name} ({first_line(error)}); without internet, give a file of its "
             f"weights by --teacher-ckpt FILE")
    if path:
        fill_from_release(vit, weights, path, name)
    if not keep_norm:
        vit.norm = nn.Identity()
    return Teacher(vit, mean, std, vit.patch_embed.img_size[0], enc_type)


def fill_from_release(vit, weights, path, name):
    """Fill a timm model from a release: names become timm's, positions this grid's."""
    from timm.models.vision_transformer import checkpoint_filter_fn
    try:
        weights = checkpoint_filter_fn(weights, vit)
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        vit.load_state_dict(weights)
    except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]  # what timm makes of another model's weights
        fail(f"{path} does not hold the weights of {name}: {reason}")


def load_teachers(cfg, run):
    """The teachers of --enc-type, with commas, on this rank's device; with --bench, untrained."""
    names = cfg.enc_type.split(",")
    files = [""] * len(names)
    if cfg.teacher_ckpt:
        files = cfg.teacher_ckpt.split(",")
    if len(files) != len(names):
        fail(f"--teacher-ckpt names {len(files)} files, --enc-type {len(names)} teachers: one file "
             f"each, separated by commas")
    teachers = []
    for name, file in zip(names, files):
        if name == "prepared" and not file:
            file = f"{cfg.data}/teacher.pt"
        teacher = load_teacher(name, cfg.resolution, file, pretrained=not cfg.bench)
        teachers.append(teacher.to(run.device))
    return teachers


def check_depth(cfg, name="encoder_depth"):
    """A depth, counted from 1, must be one of the model's blocks."""
    depth = getattr(cfg, name)
    blocks = SIT_SIZES[cfg.model]["depth"]
    if not 1 <= depth <= blocks:
        fail(f"{flag(name)} {depth} is not among the {blocks} blocks of {cfg.model}")


def check_grids(cfg, teachers, grid):
    """A teacher must have one token for each of the student's grid x grid."""
    for teacher in teachers:
        if teacher.grid != grid:
            patch_size = cfg.resolution // grid
            fail(f"teacher {teacher.name} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} "
                 f"at {cfg.resolution} px has {grid}x{grid}: choose another --enc-type or --model, "
                 f"or train a teacher for it: python prepare.py teacher --data {cfg.data} "
                 f"--patch-size {patch_size}")
