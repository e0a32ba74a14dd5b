"""The folder data/NAME: its format, written and read here; the order of images; a step's draws.

    images.npy    (N,R,R,3) uint8       RGB, cropped to the resolution R
    moments.npy   (N,2C,h,w) float16    mean and std of the latent's posterior; none in pixel space
    labels.npy    (N,) int64            0..num_classes-1
    captions.json                       a list of N texts, where there are captions
    context.npy   (N,n,K) float16       features of the caption's tokens  } of text-to-image sets,
    pooled.npy    (N,P) float16         features of the whole caption     } in place of labels
    meta.json     format        1; another number is refused
                  source        where the images come from, and by which trained autoencoder
                  count         N
                  resolution    R
                  num_classes   and class_names: of labels, in the sorted order of the folders
                  vae           None in pixel space; sd-vae-ft-mse, sd-vae-ft-ema, sd3, or a file
                  vae_id        checksum of that file's weights
                  channels      C of x: 3 pixels, or the latent's
                  downsample    pixels per latent place, per side; 8 where it is missing
                  latent_scale  and latent_shift: x = z * scale + shift; numbers, or lists of C
                  text          whose features context.npy and pooled.npy are: toy or sd3
    teacher.pt, judge.pt                a small vision teacher and a judge of samples, if trained
    base.pt, objects.npy                of the text-to-image toy: its model, and all its objects
    val/                                held-out images of the same format, the reference of samples
"""
import functools
import itertools
import json
import signal
from pathlib import Path

import numpy as np
import torch

from support.terminal import STOP_SIGNALS, fail, first_line

FORMAT = 1


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------
def write_labels_and_meta(folder, labels, source, resolution, class_names, captions=None, **more):
    """Write all but images and moments; `more` is added to meta.json."""
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    if captions is not None:
        (folder / "captions.json").write_text(json.dumps(captions) + "\n")
    meta = dict(
        format=FORMAT, source=source, count=len(labels), resolution=resolution,
        num_classes=len(class_names), class_names=class_names,
        vae=None, channels=3, latent_scale=1.0, latent_shift=0.0)
    meta |= more
    if "vae_id" in meta:
        meta["source"] += f", encoded by {meta['vae_id']}"  # what a run compares to continue
    (folder / "meta.json").write_text(json.dumps(meta) + "\n")


# --------------------------------------------------------------------------------------------------
# Reading: memory-mapped arrays, one read per image and no decoding
# --------------------------------------------------------------------------------------------------
def read_meta(folder):
    """meta.json of a prepared data set."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{folder} is not a prepared data set ({error}); prepare that first, --help shows how")


class PreparedData(torch.utils.data.Dataset):
    """A data set on disk. An index is a batch of indices, answered by one dict of tensors.

    need_images=False leaves out the pixels where there are latents: without a teacher nobody looks
    at them, and they are twelve times as large.
    """

    def __init__(self, path, resolution, need_images=True):
        self.path = Path(path)
        self.meta = self.read_checked_meta(resolution)
        self.is_latent = self.meta["vae"] is not None
        self.names = ["labels"]
        if self.is_latent:
            self.names.append("moments")
        if need_images or not self.is_latent:
            self.names.append("images")
        size = resolution
        if self.is_latent:
            size = resolution // self.meta.get("downsample", 8)
        self.shape = (self.meta["channels"], size, size)  # of x: (C,H,W)
        self.check_arrays(resolution)

    def read_checked_meta(self, resolution):
        """meta.json, of the format that is read here and of the run's resolution."""
        file = self.path / "meta.json"
        if not file.is_file():
            fail(f"no prepared data in {self.path}; make it: python prepare.py --images FOLDER "
                 f"--out {self.path} --resolution {resolution}")
        try:
            meta = json.loads(file.read_text())
            version = meta["format"]
        except (ValueError, KeyError, TypeError):
            version = "unknown"
        if version != FORMAT:
            fail(f"{file} has format {version}, this program reads {FORMAT}: prepare the data "
                 f"again")
        if meta["resolution"] != resolution:
            fail(f"{self.path} has {meta['resolution']} px, the run {resolution}; add "
                 f"--resolution {meta['resolution']}")
        return meta

    def check_arrays(self, resolution):
        """Every array has the shape that meta.json says, every label a class."""
        channels, *places = self.shape
        shapes = dict(
            labels=(), images=(resolution, resolution, 3), moments=(2 * channels, *places))
        for name in self.names:
            shape = self.array(name).shape
            expected = (self.meta["count"], *shapes[name])
            if shape != expected:
                fail(f"{self.path}/{name}.npy has shape {shape}, meta.json says {expected}: "
                     f"prepare the data again")
        labels = self.array("labels")
        classes = self.meta["num_classes"]
        if labels.min() < 0 or labels.max() >= classes:
            fail(f"{self.path}/labels.npy has labels outside 0..{classes - 1}: prepare the data "
                 f"again")

    def array(self, name):
        """One array, memory-mapped; opened at each use: one pickled to a worker would be a copy."""
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            fail(f"{self.path}/{name}.npy is missing or damaged ({first_line(error)}): prepare "
                 f"the data again")

    def __len__(self):
        return self.meta["count"]

    def __getitem__(self, indices):
        return {name: torch.from_numpy(self.array(name)[indices]) for name in self.names}


class SyntheticData(PreparedData):
    """Random images and latents of a data set's shapes, for --bench: the same code, but no disk."""

    def __init__(self, resolution, is_latent, need_images=True, count=1024):
        self.meta = dict(
            count=count, resolution=resolution, num_classes=1000,
            class_names=[str(i) for i in range(1000)],
            vae="random" if is_latent else None, latent_scale=1.0, latent_shift=0.0)
        self.shape = (3, resolution, resolution)
        if is_latent:
            self.shape = (4, resolution // 8, resolution // 8)
        rng = np.random.default_rng(0)
        rows = 64
        self.arrays = {"labels": rng.integers(0, 1000, rows)}
        if need_images or not is_latent:
            pixels = (rows, resolution, resolution, 3)
            self.arrays["images"] = rng.integers(0, 256, pixels, np.uint8)
        if is_latent:
            moments = rng.random((rows, 2 * self.shape[0], *self.shape[1:]))
            self.arrays["moments"] = moments.astype(np.float16)
        self.names = list(self.arrays)

    def __getitem__(self, indices):
        batch = {}
        for name in self.names:
            array = self.arrays[name]
            batch[name] = torch.from_numpy(array[indices % len(array)])
        return batch


class CaptionedData(PreparedData):
    """Images or latents with features of their captions, context (N,n,K) and pooled (N,P).

    The last twentieth, at most 512, is held out for validation. `text` is the model whose features
    they are: toy or sd3.
    """

    def __init__(self, path, resolution, text, held_out=False):
        form = f"text --images FOLDER --captions FILE --resolution {resolution}"
        if text == "toy":
            form = "pairs"
        command = f"make it: python prepare.py {form} --out {path}"
        if not Path(path, "meta.json").is_file():
            fail(f"no captioned data in {path}; {command}")
        super().__init__(path, resolution, need_images=False)
        features_of = self.meta.get("text")
        if features_of != text:
            fail(f"{path} is for another model (its text features: {features_of}, not {text}); "
                 f"{command}")
        self.names[0:1] = ["context", "pooled"]  # in place of labels
        count = self.meta["count"]
        for name in self.names:
            rows = len(self.array(name))
            if rows != count:
                fail(f"{path}/{name}.npy has {rows} rows, not {count}: prepare it again")
        start = count - min(512, count // 20)
        self.rows = range(start, count) if held_out else range(start)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        rows = np.arange(self.rows.start, self.rows.stop)
        return super().__getitem__(rows[indices])


def open_data(cfg, need_images=True):
    """The data set of a run, or random data of the same shapes for --bench."""
    if cfg.bench:
        return SyntheticData(cfg.resolution, cfg.model != "toy", need_images)
    return PreparedData(cfg.data, cfg.resolution, need_images)


# --------------------------------------------------------------------------------------------------
# Randomness has one rule: a draw depends on the seed and on what it is for (a step, an image), not
# on the process that makes it. So no random state is saved, and neither the number of ranks nor the
# number of images at once changes anything.
# --------------------------------------------------------------------------------------------------
def mix_seed(*numbers):
    """One well-mixed 63-bit seed from a few integers: (seed, step) and (seed, step + 1) differ."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def step_draws(seed, step, batch_size, run):
    """normal(*shape) and uniform(*shape) of a step: drawn for the global batch, cut to this rank.

    Both return (B,*shape) for the B images of this rank.
    """
    generator = torch.Generator(run.device).manual_seed(mix_seed(seed, step))

    def cut(draw, *shape):
        batch = draw(batch_size, *shape, generator=generator, device=run.device)
        return batch[run.rank::run.world]

    return functools.partial(cut, torch.randn), functools.partial(cut, torch.rand)


def image_randn(seed, indices, device):
    """randn(*shape) -> (len(indices),*shape): every image draws from a generator of its own."""
    generators = [torch.Generator(device).manual_seed(mix_seed(seed, int(i))) for i in indices]

    def randn(*shape):
        return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

    return randn


def micro_batches(data, seed, batch_size, run, first_step=0, workers=0):
    """This rank's micro-batches on its device, from step `first_step` on, without end.

    The order of images is a pure function of (seed, epoch): the global batch of a step is a stretch
    of the shuffled epochs; rank r takes every world-th image of it from r on, in pieces of
    run.micro_batch.
    """
    @functools.lru_cache(2)  # a batch touches two epochs, or the set is tiny
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(data))

    def order():
        for start in itertools.count(first_step * batch_size, batch_size):
            places = range(start + run.rank, start + batch_size, run.world)
            indices = [permutation(i // len(data))[i % len(data)] for i in places]
            yield from np.array(indices).reshape(-1, run.micro_batch)

    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=order(),  # the sampler gives whole batches of indices
        num_workers=workers, worker_init_fn=outlive_signals,
        pin_memory=run.device.type == "cuda")
    for batch in loader:
        yield {name: array.to(run.device, non_blocking=True) for name, array in batch.items()}


def outlive_signals(worker):
    """A signal reaches every process of a job: data workers live until the step is saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.alarm(30))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# From a batch to the model's input
# --------------------------------------------------------------------------------------------------
def images_to_input(images):
    """images (B,H,W,3) uint8 to x (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@functools.lru_cache
def channel_tensor(values, device):
    """A number per channel as (C,1,1); cached, since a copy at every step would stall a GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def latent_affine(meta, device):
    """scale, shift of a latent z (B,C,h,w), x = z * scale + shift: numbers, or tensors (C,1,1)."""
    pair = []
    for value in (meta["latent_scale"], meta["latent_shift"]):
        if isinstance(value, list):
            value = channel_tensor(tuple(value), device)
        pair.append(value)
    return pair


def clean_input(batch, meta, noise):
    """x (B,C,H,W) of a batch: pixels in [-1,1], or a scaled sample of the VAE's posterior."""
    if "moments" not in batch:
        return images_to_input(batch["images"])
    mean, std = batch["moments"].float().chunk(2, dim=1)  # (B,2C,h,w) -> twice (B,C,h,w)
    scale, shift = latent_affine(meta, mean.device)
    return (mean + std * noise) * scale + shift
