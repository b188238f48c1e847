"""The flag library of all commands: flags are fields of dataclasses, validated where they enter.

    @dataclass
    class SweepArguments:
        _argument_group_name = "Sweep"
        free: str = required_flag("Checkpoint trained for FREE.")
        threads: int | None = flag(None, "CPU threads.", changes_outputs=False)

    flags, data = parse_groups((SweepArguments, DataArguments), __doc__, argv)

A flag says here, once, which decoding methods read it and whether an output depends on it; what is refused,
compared before a run continues, and written into certificates derives from that. Needs no torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from models.errors import UserError
from models.json_files import LARGEST, decode_json, read_text
from util.flag_help import default_of, describe_flags, is_required, spell

ANY = ()  # the methods of a flag that belongs to none in particular


def flag(
    default: Any,
    help: str,
    choices: Iterable[str] | None = None,
    *,
    method: str | tuple[str, ...] = ANY,
    changes_outputs: bool = True,
    switches: str | None = None,
    always: bool = False,
    file: bool = False,
    certifiable: bool = True,
    positional: bool = False,
) -> Any:
    """A field of a dataclass of flags; `default` may be MISSING.

    Args:
        method: the decoding methods that read it; without one of them it is refused.
        changes_outputs: whether the record of a decoded sample (its text, layers and time) can depend on it.
        switches: the method that it switches on.
        always: it is of use without its method as well.
        file: outputs depend on what is in the file that it names.
        certifiable: a certificate for one value of it can be had; what a calibration chooses has none.
        positional: it is given without its name.
    """
    facts = {
        "help": help,
        "methods": (method,) if isinstance(method, str) else method,
        "changes_outputs": changes_outputs,
        "switches": switches,
        "always": always,
        "file": file,
        "certifiable": certifiable,
        "positional": positional,
    }
    return field(default=default, metadata=facts | ({"choices": list(choices)} if choices else {}))


def required_flag(help: str, choices: Iterable[str] | None = None, **facts: Any) -> Any:
    return flag(MISSING, help, choices, **facts)


def list_flag(default: Iterable[Any], help: str, **facts: Any) -> Any:
    spec = flag(MISSING, help, **facts)
    return field(default_factory=lambda: list(default), metadata=spec.metadata)


# What flags say of themselves


def flags_in(group: Any) -> list[Field[Any]]:
    """The flags of a group: a dataclass or one of its objects."""
    return [spec for spec in fields(group) if spec.init]


def flags_of(group: Any, method: str | None) -> list[Field[Any]]:
    """Those that a method reads; full depth, None, reads none."""
    return [spec for spec in flags_in(group) if method in spec.metadata["methods"]]


def differs(group: Any, spec: Field[Any]) -> bool:
    """Whether a flag has another value than its default."""
    return getattr(group, spec.name) != default_of(spec)


def methods_on(group: Any) -> dict[str, str]:
    """The methods that a group's flags switch on, each with the name of its flag."""
    switches = [spec for spec in flags_in(group) if spec.metadata["switches"] and differs(group, spec)]
    return {spec.metadata["switches"]: spec.name for spec in switches}


def refuse_idle_flags(group: Any) -> None:
    """Raise UserError for a flag of methods that the group does not switch on."""
    ways = {spec.metadata["switches"]: f"--{spec.name} True" for spec in flags_in(group)}
    refuse_flags_without(group, methods_on(group), ways)


def refuse_flags_without(group: Any, methods: Iterable[str], ways: dict[str, str]) -> None:
    """Raise UserError for a flag that only others than these methods read; `ways` says what adds each."""
    on = set(methods)
    for spec in flags_in(group):
        facts = spec.metadata
        idle = facts["methods"] and not on & set(facts["methods"]) and not facts["always"]
        if idle and differs(group, spec):
            wanted = " or ".join(ways[method] for method in facts["methods"])
            raise UserError(f"--{spec.name} has no effect here: add {wanted}.")


def refuse_unread_flags(group: Any, instead: dict[str, str]) -> None:
    """Raise UserError for a flag that programs with this group take and this one does not read; `instead`
    says of each such flag what to do."""
    specs = {spec.name: spec for spec in flags_in(group)}
    for name, way in instead.items():
        require(not differs(group, specs[name]), f"--{name} has no effect here: {way}.")


def drop_repeats(group: Any) -> None:
    """Keep the first of equal values of each list flag: the others would run, and be named, twice."""
    for spec in flags_in(group):
        value = getattr(group, spec.name)
        if isinstance(value, list):
            setattr(group, spec.name, list(dict.fromkeys(value)))


def non_default_settings(*groups: Any) -> dict[str, Any]:
    """The flags that differ from their defaults and that outputs depend on."""
    return {
        spec.name: getattr(group, spec.name)
        for group in groups
        for spec in flags_in(group)
        if spec.metadata["changes_outputs"] and differs(group, spec)
    }


# Conditions


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_unit_interval(name: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, f"--{name} must lie in [0, 1], got {value}.")


def require_positive(name: str, value: float | None) -> None:
    require(value is None or 0 < value < math.inf, f"--{name} must be positive, got {value}.")


def require_not_negative(name: str, value: float | None) -> None:
    require(value is None or 0 <= value < math.inf, f"--{name} must not be negative, got {value}.")


def require_file(name: str, path: str | Path | None) -> None:
    require(path is None or Path(path).is_file(), f"--{name}: there is no file {path}.")


def require_known(name: str, values: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(values) - set(known))
    require(not unknown, f"--{name}: there is no {', '.join(unknown)}; choose of {', '.join(known)}.")


def refuse_huge_numbers(groups: Iterable[Any]) -> None:
    """Raise UserError for a whole number that no size, count or seed can be: they have 64 bits."""
    for name, value in ((name, value) for group in groups for name, value in vars(group).items()):
        for number in value if isinstance(value, list) else [value]:
            fine = not isinstance(number, int) or abs(number) <= LARGEST
            require(fine, f"--{name} {number} is too large: whole numbers have 64 bits.")


# From words to dataclasses


class Parser(argparse.ArgumentParser):
    """Fills dataclasses from words. Its complaints are one line, its help is ours.

    `foreign` are a dataclass that is not made of our flags and the parser that knows its words.
    """

    def __init__(
        self,
        groups: Sequence[type],
        description: str = "",
        foreign: tuple[type, argparse.ArgumentParser] | None = None,
    ) -> None:
        parents = [] if foreign is None else [foreign[1]]
        super().__init__(
            description=description,
            allow_abbrev=False,
            parents=parents,
            argument_default=argparse.SUPPRESS,  # so that only what is given is told to a dataclass
        )
        for action in self._actions:  # those of the foreign parser have defaults of their own
            action.default = argparse.SUPPRESS
        self.groups = groups
        self.foreign = foreign
        for group in groups:
            hints = get_type_hints(group)
            for spec in flags_in(group):
                self.add_flag(spec, hints[spec.name])

    def add_flag(self, spec: Field[Any], hint: Any) -> None:
        kind, is_list = value_type(hint)
        options = {"type": CONVERTERS.get(kind, kind), "help": spec.metadata["help"].replace("%", "%%")}
        if "choices" in spec.metadata and not is_list:
            options["choices"] = spec.metadata["choices"]
        if is_list:
            options["nargs"] = "*" if default_of(spec) == [] else "+"  # [] says what nothing says
        if kind is bool:
            options |= {"nargs": "?", "const": True}
            if spec.default is True:
                self.add_argument(f"--no_{spec.name}", action="store_false", dest=spec.name)
        if spec.metadata["positional"]:
            self.add_argument(spec.name, **options | {"nargs": "*"})
        else:
            self.add_argument(f"--{spec.name}", **options)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One object a dataclass, the foreign one last.

        Raises:
            UserError: unknown, missing, malformed or contradictory flags.
        """
        given = self.read_all(argv)
        groups = self.groups if self.foreign is None else (*self.groups, self.foreign[0])
        missing = [
            spell(spec)
            for group in groups
            for spec in flags_in(group)
            if is_required(spec) and spec.name not in given
        ]
        require(not missing, f"Missing: {', '.join(missing)}. See --help.")
        built = [
            group(**{spec.name: given[spec.name] for spec in fields(group) if spec.name in given})
            for group in groups
        ]
        refuse_huge_numbers(built)
        return tuple(built)

    def read(self, argv: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
        """The given values by flag, and the words that no flag takes."""
        words = [self.underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        namespace, rest = self.parse_known_args(words)
        return vars(namespace), rest

    def read_all(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The given values by flag, where each word belongs to one."""
        given, rest = self.read(argv)
        if rest:
            self.refuse_unknown(rest[0])
        return given

    def underscored(self, word: str) -> str:
        """`--learning-rate=1` as `--learning_rate=1`, if there is such a flag."""
        name, equals, value = word.partition("=")
        plain = name[:2] + name[2:].replace("-", "_")
        return plain + equals + value if plain in self._option_string_actions else word

    def refuse_unknown(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise UserError(f"{word}: no flag takes this word.")
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        raise UserError(f"Unknown flag {name}" + (f": did you mean {near[0]}?" if near else "."))

    def format_help(self) -> str:
        return describe_flags(self.groups, self.description or "", training=self.foreign is not None)

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:])


def parse_groups(
    groups: Sequence[type], description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """One dataclass a group, from the flags of a script.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    parser = Parser(groups, description)
    return parser.parse(expand_argument_file(argv, parser))


def value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there are several: (int, True) of `list[int] | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not types.NoneType)
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return get_origin(hint) or hint, False


def truth(text: str) -> bool:
    """A flag's True or False."""
    words = {"true": True, "yes": True, "1": True, "t": True, "y": True}
    words |= {"false": False, "no": False, "0": False, "f": False, "n": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return words[text.lower()]


def mapping(text: str) -> dict[str, Any]:
    """A flag's JSON object."""
    try:
        value = decode_json(text, "this")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("give a JSON object")
    return value


CONVERTERS = {bool: truth, dict: mapping}  # others are their own


# Argument files


def expand_argument_file(argv: Sequence[str] | None, parser: Parser | None = None) -> list[str]:
    """Replace a leading .json/.yaml file of arguments by the flags it stands for; later flags override.

    Raises:
        UserError: it cannot be read, or holds what `parser`, which knows all flags, does not take.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = argv and not argv[0].startswith("-")  # not --config_name=t5.json
    if not named or Path(argv[0]).suffix not in (".json", ".yaml", ".yml"):
        return argv
    words = as_flags(read_argument_file(Path(argv[0])))
    if parser is not None:
        try:
            parser.read_all(words)
        except UserError as error:
            raise UserError(f"{argv[0]}: {error}") from error
    return [*words, *argv[1:]]


def read_argument_file(path: Path) -> dict[str, Any]:
    """The mapping of flags to values in a .json or .yaml file."""
    require(path.is_file(), f"There is no argument file {path}.")
    text = read_text(path)
    settings = decode_json(text, str(path)) if path.suffix == ".json" else decode_yaml(text, str(path))
    require(isinstance(settings, dict), f"{path} must hold one mapping of argument names to values.")
    return settings


def decode_yaml(text: str, place: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{place}: not YAML ({' '.join(str(error).split())}).") from error


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line words; None keeps the default."""
    words: list[str] = []
    for name, value in settings.items():
        items = value if isinstance(value, list) else [value]
        texts = [as_text(item) for item in items if item is not None]
        if len(texts) == 1:
            words.append(f"--{name}={texts[0]}")  # in one word: a text may begin with a dash
        elif texts or value == []:
            words += [f"--{name}", *texts]
    return words


def as_text(item: Any) -> str:
    return json.dumps(item, default=str) if isinstance(item, dict) else str(item)
