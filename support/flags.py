"""Flags: a setting is a field of a dataclass; this file makes the command line, its --help and its checks out of them.

A field carries its own help, its choices and its range. Settings belong to groups; --help opens with what everyone
uses, then the recipes, then the groups.
"""
import argparse
import difflib
import math
import re
import textwrap
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError

PROJECT = str(Path(__file__).resolve().parents[1]) + "/"
LARGEST_INT, LARGEST_FLOAT = 10**9, 1e30    # past these a run would only fill memory, or float32 products overflow


def opt(default, help: str, choices=None, low: float = 0, high: float | None = None):
    """A field of a settings dataclass. choices: names, or a table whose keys they are. low and high bound a number,
    both included; high None: as large as makes sense."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


class Recipe(NamedTuple):
    """A named paper: one line about it, and the flags it sets."""
    about: str
    flags: dict


def recipe(about: str, **flags) -> Recipe:
    return Recipe(about, flags)


class Parser(argparse.ArgumentParser):
    """A wrong flag is one sentence, not a page of usage."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], flags, 1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
            message = f"unknown flag {unknown[1]}{hint}"
        raise UserError(message)


class Settings(NamedTuple):
    """Everything the command line knows.

    groups      title -> names of the fields in it, in the order of --help; the first is what everyone uses
    """
    config: type
    recipes: dict[str, Recipe]
    groups: dict[str, tuple[str, ...]]


def gather(core: type, recipes: dict[str, Recipe], groups: dict[str, str], extras: list) -> Settings:
    """The core's settings and recipes with those of every extra. groups: title -> names separated by spaces; fields
    in no group go under the word before the colon of their help."""
    bases = [extra.Flags for extra in extras if hasattr(extra, "Flags")]
    config = make_dataclass("Config", [], bases=(core, *bases), frozen=True)
    found = {title: tuple(names.split()) for title, names in groups.items()}
    for extra in extras:
        if hasattr(extra, "Flags"):
            title = re.split(r"[.:]\s", " ".join(extra.__doc__.split()), maxsplit=1)[0]
            found[title] = tuple(f.name for f in fields(extra.Flags))
        recipes = recipes | getattr(extra, "RECIPES", {})
    known = {name for names in found.values() for name in names}
    for f in fields(config):
        if f.name not in known:
            title = f.metadata["help"].partition(":")[0]
            found[title] = (*found.get(title, ()), f.name)
    return Settings(config, recipes, found)


def show(settings: Settings, title: str, names: tuple[str, ...]) -> str:
    """One group of --help."""
    by_name, lines = {f.name: f for f in fields(settings.config)}, [f"{title}:"]
    for f in (by_name[name] for name in names):
        flag = f"--{f.name}" + ("" if f.type is bool else f" {f.name.upper()}")
        choices = f" [{' '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        default = repr(f.default).replace(PROJECT, "")
        text = f"{f.metadata['help'].removeprefix(title + ': ')}{choices} (default: {default})"
        lines += textwrap.wrap(text, 118, initial_indent=f"  {flag:29} ", subsequent_indent=" " * 32)
    return "\n".join(lines)


def help_text(settings: Settings) -> str:
    parts = ["usage: python train.py [--recipe NAME] [--flag value ...]\n\n"
             "On-policy distillation: the student writes, the teacher scores every token, the student moves."]
    for number, (title, names) in enumerate(settings.groups.items()):
        parts.append(show(settings, title, names))
        if number == 0:
            parts.append("recipes (--recipe NAME; any flag after it overrides):\n" + "\n".join(
                f"  {name:12}{found.about}" for name, found in settings.recipes.items()))
    return "\n\n".join(parts)


def parse(argv: list[str], settings: Settings) -> tuple:
    """(config, the flags that were given). Defaults, then the recipe's flags, then those of the command line."""
    parser = Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--help", "-h", action="store_true")
    for f in fields(settings.config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", **kind)
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        print(help_text(settings))
        raise SystemExit(0)
    if empty := [name for name, value in given.items() if isinstance(value, list)]:     # --steps=-- is an empty list
        raise UserError(f"--{empty[0]} needs a value")
    if given.get("plan_memory"):        # asks for a plan
        given["plan"] = True
    name = given.get("recipe", settings.config.recipe)
    if name not in settings.recipes:
        raise UserError(f"unknown recipe {name!r}; known are {', '.join(settings.recipes)}")
    flags = settings.recipes[name].flags
    known = {f.name for f in fields(settings.config)}
    if missing := sorted(set(flags) - known):
        raise UserError(f"recipe {name} needs --{missing[0]}, whose part of extras/ is not here")
    return settings.config(**{**flags, **given}), sorted(given)


def check_ranges(cfg) -> None:
    """UserError for a value outside its field's choices or range."""
    for f in fields(cfg):
        value, low, high, choices = getattr(cfg, f.name), *(f.metadata[key] for key in ("low", "high", "choices"))
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(choices)}")
        if f.type not in (int, float):
            continue
        most = high if high is not None else LARGEST_INT if f.type is int else LARGEST_FLOAT
        least = low if f.type is int or low != -math.inf else -LARGEST_FLOAT
        if not least <= value <= most:
            raise UserError(f"--{f.name} must lie between {least:,} and {most:,}, not {value}" if high is not None else
                            f"--{f.name} must be at least {least:,} and not beyond {most:,}, not {value}")


def run_name(cfg, given: list[str], left_out: tuple[str, ...]) -> str:
    """recipe,flag=value,...: the same command finds the same run, another flag makes another run. Of a path only the
    last part is shown; should two paths share it, the configurations differ and the run folder says so."""
    parts = [f"{key}={str(getattr(cfg, key)).rstrip('/').rsplit('/', 1)[-1]}" for key in given
             if key not in ("recipe", *left_out)]
    return re.sub(r"[^\w.=+,-]+", "_", ",".join([cfg.recipe, *parts]))[:200]
