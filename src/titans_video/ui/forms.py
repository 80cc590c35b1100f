"""The options of a command as a form, and a filled form as a command line, as YAML and as checked options.

A form has one text for each field, as on the command line: "1e-4", "on" or "off" for a switch, several lines for an
option that can be repeated. Fields that the form leaves out keep their defaults.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from titans_video.cli.main import PROG
from titans_video.config.fields import OptionGroup, flag_of, is_group
from titans_video.config.help import About, Option, groups_of
from titans_video.config.parse import parse
from titans_video.errors import ConfigError, UserError

Values = Mapping[str, str]
"""The filled fields of a form, by name."""

HIDDEN = ("config", "resume")
"""Options with a control of their own on the page."""

ACRONYMS = {"fps": "FPS", "lr": "Learning rate", "vae": "VAE", "llm": "LLM", "ema": "EMA", "cfg": "CFG", "tf32": "TF32"}
ACRONYMS |= {"kl": "KL", "gan": "GAN", "lpips": "LPIPS", "fp8": "FP8", "json": "JSON", "mb": "MB", "ram": "RAM"}
LABELS = {"muon_lr": "Muon learning rate", "min_lr": "Lowest learning rate", "num_frames": "Frames", "crf": "CRF"}
LABELS |= {"preset": "Network size", "output_dir": "Output folder", "validate_every": "Samples every (steps)"}
LABELS |= {"save_every": "Checkpoint every (steps)", "max_steps": "Steps", "data_root": "Data folder"}
LABELS |= {"lr_schedule": "Learning rate schedule", "lr_warmup_steps": "Warm-up steps", "gan_lr": "GAN learning rate"}


@dataclass(frozen=True)
class Form:
    """A command with options.

    Attributes:
        command: the words after `titans-video`.
        about: its help, which also has its options.
        check: raises UserError for options that do not go together, or inputs that are missing.
    """

    command: str
    about: About
    check: Callable[[Any], object]

    def describe(self, defaults: OptionGroup | None = None, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the groups of fields as plain values; `defaults` are those of a preset."""
        skipped = {*HIDDEN, *skip}
        return [
            {
                "title": group.title,
                "purpose": group.purpose,
                "fields": [_field(o, o.name in self.about.main) for o in group.options if o.name not in skipped],
            }
            for group in groups_of(defaults or self.about.options())
            if any(o.name not in skipped for o in group.options)
        ]

    def words(self, values: Values, config: str | None = None) -> list[str]:
        """Return the flags of a filled form, after those of a preset's YAML file."""
        known = {o.name: o for group in groups_of(self.about.options()) for o in group.options}
        words = [] if config is None else ["--config", config]
        for name, text in values.items():
            if name not in known:
                raise ConfigError(f"There is no option {flag_of(name)}.")
            words += _flags(known[name], text)
        return words

    def options(self, words: Sequence[str]) -> Any:
        """Return the checked options; UserError as the command itself."""
        options = parse(self.about.options(), words, prog=f"{PROG} {self.command}")
        self.check(options)
        return options

    def explain(self, values: Values, config: str | None = None) -> dict[str, Any]:
        """Return what a filled form means: command, YAML, and the error with the field that it names."""
        found: dict[str, Any] = {"command": "", "yaml": "", "error": None, "field": None}
        try:
            words = self.words(values, config)
            found["command"] = shlex.join([PROG, *self.command.split(), *words])
            options = parse(self.about.options(), words, prog=f"{PROG} {self.command}")
            found["yaml"] = as_yaml(options, self.about.options())
            self.check(options)
        except UserError as e:
            found |= {"error": str(e), "field": self._named(str(e))}
        return found

    def _named(self, message: str) -> str | None:
        """Return the first option that a message names."""
        names = [o.name for group in groups_of(self.about.options()) for o in group.options]
        places = {name: message.find(flag_of(name)) for name in sorted(names, key=len)}
        found = [(at, -len(name), name) for name, at in places.items() if at >= 0]
        return min(found)[2] if found else None


def _field(option: Option, basic: bool) -> dict[str, Any]:
    return {
        "name": option.name,
        "label": label_of(option.name),
        "flag": flag_of(option.name),
        "help": option.text,
        "limits": option.limits,
        "default": option.default,
        "choices": list(option.choices),
        "kind": "switch" if option.is_switch else "choice" if option.choices else _kind(option.value),
        "repeatable": option.is_repeatable,
        "basic": basic,
    }


def _kind(value: str) -> str:
    paths = ("FILE", "FOLDER", "PATH", "MANIFEST", "RUN")
    return "path" if value in paths else "number" if value in ("N", "X") else "text"


def label_of(name: str) -> str:
    """Return the label of a field: "Learning rate" of `lr`."""
    if name in LABELS:
        return LABELS[name]
    first, *rest = name.split("_")
    return " ".join([ACRONYMS.get(first, first.capitalize()), *(ACRONYMS.get(word, word) for word in rest)])


def _flags(option: Option, text: str) -> list[str]:
    flag = flag_of(option.name)
    if option.is_switch:
        if text not in ("on", "off"):
            raise ConfigError(f"{flag} is on or off, not {text!r}.")
        return [flag if text == "on" else f"--no-{flag[2:]}"]
    if option.is_repeatable:
        return [word for line in text.splitlines() if line.strip() for word in (flag, line.strip())]
    # A value that begins with a dash would be read as a flag.
    return [] if text == "" else [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def changes(options: OptionGroup, defaults: OptionGroup) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name, as plain values."""
    found: dict[str, Any] = {}
    for f in fields(options):
        value, usual = getattr(options, f.name), getattr(defaults, f.name)
        if is_group(value):
            found |= changes(value, usual)
        elif value != usual and f.name not in HIDDEN:
            found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def as_yaml(options: OptionGroup, defaults: OptionGroup) -> str:
    """Return the options that differ from their defaults as a file for `--config`."""
    return "".join(_yaml_line(name, value) for name, value in changes(options, defaults).items())


def _yaml_line(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{name}: {yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=10**6)}"
    return yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=False, width=10**6)
