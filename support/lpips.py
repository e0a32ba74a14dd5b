"""What an autoencoder is judged by: LPIPS, a discriminator of patches, a linear probe.

LPIPS is how far apart two images look, by features of a frozen VGG16 (arXiv 1801.03924, v0.1).
Parameter names follow the copy that taming-transformers and others train autoencoders with. The
weights are two public files: torchvision's VGG16, and the linear layers of LPIPS's authors.
"""
import pickle
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.terminal import fail, first_line, first_rank_first

# Convolutions of torchvision's vgg16().features by stages; the last ReLU's output is compared.
VGG_STAGES = (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # its IMAGENET1K_V1
LPIPS_URL = ("https://github.com/richzhang/PerceptualSimilarity"
             "/raw/master/lpips/weights/v0.1/vgg.pth")
PROBE_GRID = 8  # the probe sees latents averaged to at most 8x8 places


class LPIPS(nn.Module):
    """The distance (B,1,1,1) of two images (B,3,H,W) in [-1,1]; frozen, so without its dropout."""

    def __init__(self, channels=(64, 128, 256, 512, 512)):
        super().__init__()
        self.net = nn.ModuleDict()
        width_in = 3
        for stage, (numbers, width) in enumerate(zip(VGG_STAGES, channels), start=1):
            layers = OrderedDict()
            if stage > 1:
                layers["pool"] = nn.MaxPool2d(2)
            for i in numbers:
                layers[str(i)] = nn.Conv2d(width_in, width, 3, padding=1)
                layers[f"relu{i}"] = nn.ReLU()
                width_in = width
            self.net[f"slice{stage}"] = nn.Sequential(layers)
            conv = nn.Conv2d(width, 1, 1, bias=False)
            lin = nn.ModuleDict({"model": nn.Sequential(nn.Identity(), conv)})  # Identity: dropout
            self.add_module(f"lin{stage - 1}", lin)
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.eval().requires_grad_(False)

    def features(self, x):
        """x (B,3,H,W) to the five stages' features of x, (B,C,H,W) each, float32."""
        h = (x - self.shift) / self.scale
        features = []
        for stage in self.net.values():
            h = stage(h)
            features.append(h.float())
        return features

    def forward(self, x, x_hat):
        total = 0
        for k, (a, b) in enumerate(zip(self.features(x), self.features(x_hat))):
            weights = getattr(self, f"lin{k}")["model"][1].weight  # (1,C,1,1), none negative
            difference = (unit(a) - unit(b)).square() * weights
            total = total + difference.sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        return total


def unit(features):
    """Features (B,C,H,W), a unit vector at each place."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def read_public_file(path, url, flag):
    """State dict from `path`, else from the internet; in PyTorch's older format, so not mapped."""
    try:
        with first_rank_first():
            if path:
                return dict(torch.load(path, "cpu", weights_only=True))
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
            return dict(weights)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError,
            pickle.UnpicklingError) as error:
        fail(f"cannot read {path or url} ({first_line(error)}): give it by {flag} FILE, or train "
             f"without LPIPS: --perceptual-coeff 0")


def load_lpips(vgg_path="", lpips_path="", pretrained=True):
    """LPIPS with its public weights, VGG16's and the linear layers', from files or the internet."""
    lpips = LPIPS()
    if not pretrained:
        return lpips
    public = read_public_file(vgg_path, VGG_URL, "--vgg-ckpt")
    public |= read_public_file(lpips_path, LPIPS_URL, "--lpips-ckpt")
    # net.slice2.5.weight is torchvision's features.5.weight; the linear layers have one name
    names = {name: re.sub(r"^net\.slice\d\.", "features.", name) for name in lpips.state_dict()}
    try:
        lpips.load_state_dict({name: public[public_name] for name, public_name in names.items()})
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        fail(f"--vgg-ckpt and --lpips-ckpt do not hold the weights of {VGG_URL} and {LPIPS_URL} "
             f"({reason}); without LPIPS: --perceptual-coeff 0")
    return lpips


class PatchDiscriminator(nn.Module):
    """Are the patches of x (B,3,H,W) real? Logits (B,1,h,w). pix2pix's and taming's network."""

    def __init__(self, dim=64, layers=3):
        super().__init__()
        main = [nn.Conv2d(3, dim, 4, 2, 1), nn.LeakyReLU(0.2)]
        width_in = dim
        for i in range(1, layers + 1):
            width = dim * min(2**i, 8)
            stride = 2 if i < layers else 1
            conv = nn.Conv2d(width_in, width, 4, stride, 1, bias=False)
            main += [conv, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
            width_in = width
        self.main = nn.Sequential(*main, nn.Conv2d(width_in, 1, 4, 1, 1))
        self.blocks = []  # none is compiled
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x).float()


def hinge_loss(real, fake):
    """The discriminator's loss, from its logits for images and for reconstructions.

    Each is a pass of its own: BatchNorm in it has the statistics of one pass.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def ridge_probe(train, train_labels, test, test_labels, strength=0.01):
    """Accuracy on `test` of a ridge regression from latents (N,C,h,w) to one-hot labels (N,)."""
    def flat(z):
        grid = min(PROBE_GRID, z.shape[-1])
        return F.adaptive_avg_pool2d(z, grid).flatten(1).double()  # (N,C,h,w) -> (N,C*g*g)

    train = flat(train)
    mean = train.mean(dim=0)
    std = train.std(dim=0) + 1e-8
    train = (train - mean) / std
    test = (flat(test) - mean) / std
    targets = F.one_hot(train_labels).double()  # (N,classes)
    average = targets.mean(dim=0)
    identity = torch.eye(train.shape[1], dtype=train.dtype)
    gram = train.mT @ train + strength * len(train) * identity
    weights = torch.linalg.solve(gram, train.mT @ (targets - average))
    predicted = (test @ weights + average).argmax(dim=1)
    return (predicted == test_labels).float().mean().item()
