"""Autoencoders between pixels (B,3,H,W) in [-1,1] and latents (B,C,h,w): the SD-VAE and its kin.

Holds the network, the readers of its files (the SD-VAE's in diffusers' names, present or older, or
in Latent Diffusion's; an autoencoder trained here; SD3's single file), and the decoder of latents.
Names follow diffusers' AutoencoderKL, so that the published files load with strict=True.
"""
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import load_checkpoint, load_strict
from support.dataset import latent_affine
from support.terminal import fail, first_line, hub_file

# Stable Diffusion v1's scale_factor, 1 / std of its latents; not in the VAE's own config.json
LATENT_SCALE = 0.18215
SD_VAE_META = dict(vae="sd", latent_scale=LATENT_SCALE, latent_shift=0.0)
VAE_REPOS = {"ft-mse": "stabilityai/sd-vae-ft-mse", "ft-ema": "stabilityai/sd-vae-ft-ema"}
VAE_FILE = "diffusion_pytorch_model.safetensors"
DECODED_AT_ONCE = 16  # images: the decoder holds 0.2 GB for one of 256 px, 0.8 GB for one of 512 px


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------
class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (B,width_in,H,W) -> (B,width,H,W)."""

    def __init__(self, width_in, width, groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, h):
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.conv2(F.silu(self.norm2(r)))
        return self.conv_shortcut(h) + r


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head of the full width: (B,D,H,W) -> (B,D,H,W)."""

    def __init__(self, width, groups=32):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, h):
        r = self.group_norm(h).flatten(2).mT.unsqueeze(1)  # (B,D,H,W) -> (B,1,N,D)
        r = self.to_out(F.scaled_dot_product_attention(self.to_q(r), self.to_k(r), self.to_v(r)))
        return h + r.squeeze(1).mT.reshape(h.shape)  # (B,1,N,D) -> (B,D,H,W)


class MidBlock(nn.Module):
    """The only attention of the SD-VAE, between two ResNet blocks; keeps (B,D,h,w)."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(width, groups)])

    def forward(self, h):
        h = self.resnets[0](h)
        h = self.attentions[0](h)
        return self.resnets[1](h)


class FP32Conv2d(nn.Conv2d):
    """A convolution that leaves autocast: bf16 would round a latent by more than its own noise."""

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.float())


def halve(width):
    """(B,D,H,W) -> (B,D,H/2,W/2); padded right and bottom only, as the filters were trained."""
    return nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d((0, 1, 0, 1)),
        conv=nn.Conv2d(width, width, 3, stride=2)))


def double(width):
    """(B,D,H,W) -> (B,D,2H,2W): nearest neighbour, then a convolution that smooths it."""
    return nn.Sequential(OrderedDict(
        grow=nn.Upsample(scale_factor=2.0),
        conv=nn.Conv2d(width, width, 3, padding=1)))


def resnet_stages(widths, layers, groups, name, resample):
    """A stage per width: `layers` ResNet blocks, then, but in the last, `resample` under `name`."""
    stages = nn.Sequential()
    width_in = widths[0]
    for i, width in enumerate(widths):
        resnets = nn.Sequential()
        for _ in range(layers):
            resnets.append(ResnetBlock(width_in, width, groups))
            width_in = width
        tail = nn.Sequential()  # an empty Sequential is the identity and has no keys
        if i < len(widths) - 1:
            tail.append(resample(width))
        stages.append(nn.Sequential(OrderedDict({"resnets": resnets, name: tail})))
    return stages


class Encoder(nn.Sequential):
    """(B,3,H,W) -> (B,2C,h,w)."""

    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(in_channels, widths[0], 3, padding=1),
            # -> (B,widths[-1],h,w)
            down_blocks=resnet_stages(widths, layers, groups, "downsamplers", halve),
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
            act=nn.SiLU(),
            conv_out=FP32Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)))


class Decoder(nn.Sequential):
    """(B,C,h,w) -> (B,3,H,W): the encoder mirrored, one ResNet block more per stage."""

    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
            mid_block=MidBlock(widths[-1], groups),
            # -> (B,widths[0],H,W)
            up_blocks=resnet_stages(widths[::-1], layers + 1, groups, "upsamplers", double),
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6),
            act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], in_channels, 3, padding=1)))


class AutoencoderKL(nn.Module):
    """Pixels to the mean and std of a latent and back; the defaults are the SD-VAE (83.65 M).

    `factor` pixels a side become one place of the latent.
    """

    def __init__(self, in_channels=3, latent_channels=4, widths=(128, 256, 512, 512), layers=2,
                 groups=32):
        super().__init__()
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(in_channels, latent_channels, widths, layers, groups)
        self.decoder = Decoder(in_channels, latent_channels, widths, layers, groups)
        self.quant_conv = FP32Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = FP32Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """x (B,3,H,W) in [-1,1] -> mean, std (B,C,h,w); a model sees z = mean + std n, scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # (B,2C,h,w) -> (B,C,h,w)
        std = torch.exp(logvar.clamp(-30, 20) / 2)
        return mean, std

    def decode(self, z):
        """z (B,C,h,w), scale and shift already undone -> (B,3,H,W) in about [-1,1]."""
        return self.decoder(self.post_quant_conv(z))


# --------------------------------------------------------------------------------------------------
# Files: the SD-VAE's under three sets of names, and those of autoencoders trained here
# --------------------------------------------------------------------------------------------------
# The published files are older than diffusers' present names.
OLD_ATTENTION_NAMES = {
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Latent Diffusion's names, in which SD3's file has its VAE, replaced in this order.
LDM_NAMES = [
    ("encoder.down.", "encoder.down_blocks."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
]


def convert_ldm_vae(weights):
    """An SD-VAE's weights from Latent Diffusion's names to diffusers', 1x1 convolutions to Linear.

    Latent Diffusion counts the stages of the decoder from the other end.
    """
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up."))
    converted = {}
    for name, tensor in weights.items():
        if name.startswith("decoder.up."):
            _, _, stage, rest = name.split(".", 3)
            name = f"decoder.up_blocks.{last - int(stage)}.{rest}"
        for old, new in LDM_NAMES:
            name = name.replace(old, new)
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # (D,D,1,1) -> (D,D)
        converted[name] = tensor
    return converted


def rename_vae_weights(weights):
    """Weights in diffusers' present names, from those, the older ones, or Latent Diffusion's."""
    weights = {str(name).removeprefix("first_stage_model."): w for name, w in weights.items()}
    if any(name.startswith("decoder.up.") for name in weights):
        weights = {name: w for name, w in weights.items() if not name.startswith("loss.")}
        weights = convert_ldm_vae(weights)
    for old, new in OLD_ATTENTION_NAMES.items():
        weights = {name.replace(old, new): w for name, w in weights.items()}
    return weights


def to_fp32(weights):
    """A file's tensors in float32; what is not a tensor stays, for the strict loader to find."""
    return {name: w.float() if isinstance(w, torch.Tensor) else w for name, w in weights.items()}


def load_vae_weights(vae, path):
    """Fill `vae` strictly from a file in any of these names; by assignment: it ends on the CPU."""
    weights = to_fp32(rename_vae_weights(load_checkpoint(path)))
    load_strict(vae, weights, f"{path} does not fit this VAE in diffusers' names", assign=True)


def read_latent_stats(path):
    """meta.json's entries for latents of the autoencoder in `path`, one trained here.

    After scale and shift, lists of a number a channel, each channel has mean 0 and std 1.
    """
    saved = load_checkpoint(path)
    if "latent_std" not in saved:
        fail(f"{path} holds no latent statistics: it is not an autoencoder trained here (weights "
             f"of the SD-VAE are given by --vae ft-mse --vae-ckpt FILE)")
    scale = [1 / std for std in saved["latent_std"]]
    shift = [-mean * s for mean, s in zip(saved["latent_mean"], scale)]
    downsample = 2 ** (len(saved["sizes"]["widths"]) - 1)
    return dict(vae=str(path), vae_id=saved["id"], channels=len(scale), latent_scale=scale,
                latent_shift=shift, downsample=downsample)


def load_trained_vae(path, expected_id=None):
    """An autoencoder trained here, frozen, fp32, on the CPU; of this identity, if one is given."""
    if not Path(path).is_file():
        fail(f"the autoencoder {path} is not there: give its file by --vae-ckpt FILE")
    vae_id = read_latent_stats(path)["vae_id"]
    if expected_id is not None and vae_id != expected_id:
        fail(f"{path} is another autoencoder ({vae_id}) than the one that made the latents "
             f"({expected_id}): give that one's file by --vae-ckpt FILE, or prepare the data again")
    saved = load_checkpoint(path)
    vae = AutoencoderKL(**saved["sizes"])
    load_strict(vae, saved["vae"], f"{path} is damaged")
    return vae.eval().requires_grad_(False)


def load_vae(name="ft-ema", path=""):
    """The SD-VAE, frozen, fp32, on the CPU: from the file `path`, else ft-mse or ft-ema by the hub.

    `name` can also be the file of an autoencoder trained here, which says itself what it holds.
    """
    if name not in VAE_REPOS and Path(name).is_file():
        return load_trained_vae(name)
    if not path:
        if name not in VAE_REPOS:
            fail(f"--vae {name}: choose from {', '.join(VAE_REPOS)}, or give --vae-ckpt FILE")
        path = hub_file(VAE_REPOS[name], VAE_FILE, "--vae-ckpt")
    with torch.device("meta"):  # no memory, no random numbers for weights that the file replaces
        vae = AutoencoderKL()
    load_vae_weights(vae, path)
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# SD3's single file: it holds the network, the VAE and both text towers
# --------------------------------------------------------------------------------------------------
SD3_REPO = "stabilityai/stable-diffusion-3-medium"
SD3_FILE = "sd3_medium_incl_clips.safetensors"
SD3_PREFIXES = dict(
    network="model.diffusion_model.",
    vae="first_stage_model.",
    clip_l="text_encoders.clip_l.transformer.",
    clip_g="text_encoders.clip_g.transformer.")
# x = (z - 0.0609) * 1.5305, in the form of meta.json: z * latent_scale + latent_shift
SD3_VAE_META = dict(vae="sd3", channels=16, latent_scale=1.5305, latent_shift=-0.0609 * 1.5305)


def load_sd3_part(part, model, path=""):
    """Fill `model` (made on the meta device) with a part of SD3's file, by its prefix; frozen."""
    from safetensors import SafetensorError, safe_open
    prefix = SD3_PREFIXES[part]
    path = path or hub_file(SD3_REPO, SD3_FILE, "--sd3-ckpt")
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            weights = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        fail(f"{path} is no safetensors file, or is damaged ({first_line(error)}); "
             f"--sd3-ckpt wants {SD3_FILE}")
    if not weights:
        fail(f"{path} holds no {part} (no {prefix}*); "
             f"--sd3-ckpt wants {SD3_FILE}, which holds all parts")
    if part == "vae":
        weights = convert_ldm_vae(weights)
    # CLIP-L's projection is not applied, and positions are counted, not read
    for name in ("text_model.embeddings.position_ids", "text_projection.weight"):
        if name not in model.state_dict():
            weights.pop(name, None)
    load_strict(model, to_fp32(weights), f"{path} does not fit SD3 medium",
                f"names or shapes of its {part}", assign=True)
    return model.eval().requires_grad_(False)


def load_sd3_vae(path=""):
    """SD3's autoencoder, frozen, fp32, on the CPU: 16 channels and no quant convolutions."""
    with torch.device("meta"):
        vae = AutoencoderKL(latent_channels=16)
        vae.quant_conv = nn.Identity()
        vae.post_quant_conv = nn.Identity()
    return load_sd3_part("vae", vae, path)


# --------------------------------------------------------------------------------------------------
# The decoder of a data set
# --------------------------------------------------------------------------------------------------
def pixels_to_uint8(x):
    """x (B,3,H,W) in [-1,1] -> (B,H,W,3) uint8, truncated as REPA does; SiT's code rounds."""
    levels = ((x.float() + 1) / 2 * 255).clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to(torch.uint8)


def load_decoder(meta, name, path, device):
    """The function x (B,C,H,W) -> images (B,H,W,3) uint8 for data as `meta` says.

    By the VAE that made its latents: one trained here, SD3's, or the SD-VAE `name`; path: its file.
    """
    if meta["vae"] is None:
        return pixels_to_uint8
    if "vae_id" in meta:  # trained here
        vae = load_trained_vae(path or meta["vae"], meta["vae_id"])
    elif meta["vae"] == "sd3":
        vae = load_sd3_vae(path)
    else:
        vae = load_vae(name, path)
    vae.to(device)
    scale, shift = latent_affine(meta, device)

    def decode(x):
        parts = ((x - shift) / scale).split(DECODED_AT_ONCE)
        return torch.cat([pixels_to_uint8(vae.decode(part)) for part in parts])

    return decode
