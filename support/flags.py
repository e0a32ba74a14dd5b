"""From a script's Config to its command line: one field is one flag, its comment the help text.

Also what all scripts agree on: the ranges of the shared fields, and which of them may change
between a run and its continuation.
"""
import argparse
import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from support.terminal import fail

# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = frozenset({
    "data", "out", "micro_batch", "max_train_steps", "teacher_ckpt", "vae", "vae_ckpt", "compile",
    "workers", "log_every", "save_every", "keep_every", "preview_every", "ckpt", "sample", "labels",
    "mode", "num_steps", "heun", "cfg_scale", "guidance_low", "guidance_high", "bench",
})
COUNT = 1, 1e12
COUNT_OR_NONE = 0, 1e12
AMOUNT = 0, 1e12
SHARE = 0, 1
POSITIVE = 1e-12, 1e12
RANGES = {
    "resolution": COUNT, "batch_size": COUNT, "micro_batch": COUNT_OR_NONE,
    "max_train_steps": COUNT, "learning_rate": AMOUNT, "max_grad_norm": POSITIVE,
    "ema_decay": SHARE, "cfg_prob": SHARE, "proj_coeff": AMOUNT, "projector_dim": COUNT,
    "seed": COUNT_OR_NONE, "workers": COUNT_OR_NONE, "log_every": COUNT, "save_every": COUNT,
    "keep_every": COUNT_OR_NONE, "preview_every": COUNT_OR_NONE, "sample": COUNT_OR_NONE,
    "num_steps": COUNT, "cfg_scale": COUNT,  # the sampler guides above 1 only
    "guidance_low": SHARE, "guidance_high": SHARE, "bench": COUNT_OR_NONE,
}


def comments_of(config_class):
    """{field: the comment behind it} of a dataclass with one field per line."""
    source = inspect.getsource(config_class)
    return dict(re.findall(r"^    (\w+):.*?# *(.*)$", source, re.MULTILINE))


def flag(name):
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def make_parser(config_class, description):
    """The argument parser of a Config: a flag for every field."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    comments = comments_of(config_class)
    for field in fields(config_class):
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        options = dict(default=field.default, help=text)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        elif field.type == list[int]:
            options |= dict(type=int, nargs="+")
        else:
            options["type"] = field.type
        parser.add_argument(flag(field.name), **options)
    return parser


def recipe_of(model, recipes):
    """The settings of the first recipe whose name the model's name begins with."""
    for beginning, recipe in recipes.items():
        if model.startswith(beginning):
            return recipe
    return {}


def check_ranges(cfg, ranges):
    """Every number makes sense, and the interval of guidance is not empty."""
    for name, (least, most) in ranges.items():
        value = getattr(cfg, name, least)
        if not least <= value <= most:  # NaN is in no range
            fail(f"{flag(name)} {value} must lie between {least:g} and {most:g}")
    low = getattr(cfg, "guidance_low", 0)
    high = getattr(cfg, "guidance_high", math.inf)
    if low > high:
        fail(f"--guidance-low {low} lies above --guidance-high {high}: the interval is empty")


def parse(argv, config_class, models, recipes, ranges=None, description=""):
    """Config from the command line: the model picks the recipe, every flag overrides it.

    models: the names that --model takes. recipes: {beginning of a model's name: {field: value}}.
    ranges: {name: (least, most)} of the script's own fields, beside the shared ones.
    """
    parser = make_parser(config_class, description)
    model = parser.parse_args(argv).model
    if model not in models:
        fail(f"unknown --model {model}; there are {', '.join(models)}")
    parser.set_defaults(**recipe_of(model, recipes))
    cfg = config_class(**vars(parser.parse_args(argv)))
    if cfg.sample and cfg.out == config_class.out:
        cfg.out = str(Path(cfg.ckpt).parent)
    cfg.data = cfg.data.replace("{resolution}", str(cfg.resolution))
    cfg.out = cfg.out.replace("{model}", model.replace("/", "-"))
    check_ranges(cfg, RANGES | (ranges or {}))
    if cfg.sample and not cfg.ckpt:
        fail("--sample needs --ckpt FILE, the checkpoint to sample from")
    if cfg.bench:
        cfg.max_train_steps = cfg.bench
        cfg.log_every = max(1, cfg.bench // 5)
    return cfg
