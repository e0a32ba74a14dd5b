"""The toy in one dimension: two classes on a line, networks that carry noise to them, a picture.

    class y = 0: x ~ N(-1.5, 0.2^2)      class y = 1: x ~ N(1.5, 0.2^2)      noise ~ N(0, 1)
"""
import functools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import timestep_embedding

CENTRE = 1.5  # of class 1; class 0 stands at minus this
STD = 0.2
COUNT = 2000  # samples of a class, to measure


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def training_draws(normal, uniform):
    """x, noise, time t and class y of a batch, as normal() and uniform() draw them."""
    y = (uniform() < 0.5).float()
    x = (2 * y - 1) * CENTRE + STD * normal()
    noise = normal()
    t = uniform()
    return x, noise, t, y


def normal_quantiles(device):
    """COUNT numbers that stand for N(0, 1), in order: nothing measured depends on chance."""
    shares = (torch.arange(COUNT) + 0.5) / COUNT
    return torch.special.ndtri(shares).to(device)


def measured_draws(models, device):
    """Noise and class y, each (models,2*COUNT): class 0, then class 1, with the same noise."""
    noise = normal_quantiles(device).repeat(2)
    y = torch.arange(2, device=device).float().repeat_interleave(COUNT)
    return noise.expand(models, -1), y.expand(models, -1)


def distances(x):
    """Of samples x (M,2*COUNT), in order, to the truth: (M,2,COUNT), whose mean is W1."""
    centres = torch.tensor([[-CENTRE], [CENTRE]], device=x.device)
    x, _ = x.unflatten(-1, (2, COUNT)).sort(dim=-1)
    return (x - centres - STD * normal_quantiles(x.device)).abs()


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
class Flows1D(nn.Module):
    """M = variants x seeds velocity networks on the line, with shifts and scales of both ends.

    The published 1,993 parameters fit layers of 56 -> 24 -> 24 -> 1 on sinusoids of z (24), t (24)
    and the class y, 0 or 1 (8). Shifts and log-scales are a Linear(8, 1) each, of the class's
    sinusoids, and begin at 0. learned: per variant, which of mu0, mu1, log s0, log s1 it has (0 or
    1); seeds begin alike in all variants.
    """

    def __init__(self, learned, seeds):
        super().__init__()
        self.seeds = seeds
        self.variants = len(learned)
        for name, inputs, outputs in (("fc1", 56, 24), ("fc2", 24, 24), ("fc3", 24, 1)):
            bound = inputs ** -0.5
            weight = torch.empty(seeds, outputs, inputs + 1)  # the bias in the last column
            weight.uniform_(-bound, bound)
            weight = weight.repeat(self.variants, 1, 1)  # (M,outputs,inputs+1)
            self.register_parameter(name, nn.Parameter(weight))
        self.ends = nn.Parameter(torch.zeros(self.variants * seeds, 4, 9))
        learned = torch.tensor(learned).float().repeat_interleave(seeds, dim=0)
        self.register_buffer("learned", learned.unsqueeze(1))  # (M,1,4)

    @staticmethod
    def linear(weight, h):
        """M linear layers (M,o,i+1) on h (M,B,i): (M,B,o)."""
        bias = weight[..., -1].unsqueeze(1)  # (M,1,o)
        return torch.baddbmm(bias, h, weight[..., :-1].mT)

    def shifts_and_scales(self, y):
        """mu0, mu1, s0, s1 (M,B) of classes y (M,B)."""
        ends = self.linear(self.ends, timestep_embedding(y, 8)) * self.learned  # (M,B,4)
        mu0, mu1, log_s0, log_s1 = ends.unbind(dim=-1)
        return mu0, mu1, log_s0.exp(), log_s1.exp()

    def velocity(self, z, t, y):
        """v_theta (M,B)."""
        sinusoids = timestep_embedding(z, 24), timestep_embedding(t, 24), timestep_embedding(y, 8)
        h = torch.cat(sinusoids, dim=-1)  # (M,B,56)
        h = F.silu(self.linear(self.fc1, h))
        h = F.silu(self.linear(self.fc2, h))
        return self.linear(self.fc3, h).squeeze(-1)

    def forward(self, x, noise, t, y):
        """z_t between z1 = s1 x + mu1 and z0 = s0 noise + mu0, v_theta there, its target: (M,B)."""
        mu0, mu1, s0, s1 = self.shifts_and_scales(y)
        z1 = s1 * x + mu1
        z0 = s0 * noise + mu0
        z_t = (1 - t) * z1 + t * z0
        return z_t, self.velocity(z_t, t, y), z0 - z1

    @torch.no_grad()
    def paths(self, noise, y, num_steps):
        """Euler from t = 1 to 0: the path z (num_steps+1,M,B), and the data x (M,B) at its end."""
        mu0, mu1, s0, s1 = self.shifts_and_scales(y)
        z = s0 * noise + mu0
        path = [z]
        for t in torch.linspace(1, 0, num_steps + 1)[:-1].to(y):
            z = z - self.velocity(z, t.expand_as(y), y) / num_steps
            path.append(z)
        return torch.stack(path), (z - mu1) / s1


def velocity_errors(model, normal, uniform):
    """Squared errors (M,B): every seed has a batch of its own, the same for all variants.

    normal() and uniform() draw seeds x B numbers.
    """
    draws = training_draws(normal, uniform)
    x, noise, t, y = [u.view(model.seeds, -1).repeat(model.variants, 1) for u in draws]  # (M,B)
    _, v, target = model(x, noise, t, y)
    return (v - target).square()


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------
WIDTH, HEIGHT = 900, 600  # of a panel, in pixels; three stand in a row
REACH = 5  # values from minus this to this are shown
GREY = (200, 204, 210)
INK = (40, 42, 48)
CLASS_COLOURS = (36, 99, 176, 130), (214, 96, 28, 130)


def pixel(panel, across, value):
    """Where in the picture: across from 0, the noise, to 1, the data; and a value of z."""
    column = panel % 3 + 0.24 + 0.56 * across
    row = panel // 3 + 0.51 - 0.4 * value / REACH
    return WIDTH * column, HEIGHT * row


def draw_paths(path, titles, z):
    """A panel per title: 40 paths of each class between the densities of the ends.

    z (steps+1,panels,2,COUNT), an array.
    """
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(26)
    rows = math.ceil(len(titles) / 3)
    image = Image.new("RGB", (WIDTH * min(3, len(titles)), HEIGHT * rows), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for panel, title in enumerate(titles):
        place = functools.partial(pixel, panel)
        for value in range(1 - REACH, REACH):
            draw.line([place(0, value), place(1, value)], GREY, 1)
            draw.text(place(-0.34, value), str(value), INK, font, "rm")
        for y, colour in enumerate(CLASS_COLOURS):
            draw_class(draw, place, z[:, panel, y], colour)
        draw.text(place(0, -REACH), "noise, t = 1", INK, font, "ma")
        draw.text(place(1, -REACH), "data, t = 0", INK, font, "ma")
        draw.text(place(0.5, REACH), title, INK, font, "md")
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(path)


def draw_class(draw, place, z, colour):
    """The paths z (steps+1,COUNT) of a class, and the densities of their ends."""
    for line in z[::5, COUNT // 80::COUNT // 40].T:
        steps = len(line) - 1
        draw.line([place(i / steps, value) for i, value in enumerate(line)], colour, 2)
    edges = np.linspace(-REACH, REACH, 122)
    values = np.linspace(-REACH, REACH, 121)
    for side, end in enumerate((z[0], z[-1])):  # a density stands on its axis, pointing outwards
        counts, _ = np.histogram(end, edges)
        counts = np.convolve(counts, np.hanning(11), "same")
        heights = 0.3 * (2 * side - 1) * counts / counts.max()
        outline = [place(side + h, value) for h, value in zip(heights, values)]
        draw.polygon([place(side, -REACH), *outline, place(side, REACH)], colour)
