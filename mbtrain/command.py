"""What the two command lines share: verbs by fire, strict options, one line and exit status 2 for a user's mistake."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from mbtrain.errors import CheckpointError, ConfigError, DataError, DivergedError, MbtrainError, PeersError
from mbtrain.redact import one_line

# Raised on all ranks alike: rank 0 says it for all.
SHARED = (ConfigError, DataError, CheckpointError, DivergedError)


@dataclass(frozen=True)
class Program:
    """A command: its name, its verbs (functions of strings), their options without a value, and the help page."""

    name: str
    verbs: Mapping[str, Callable[..., None]]
    flags: tuple[str, ...]
    help: str
    when_interrupted: str = "interrupted"


def main(program: Program, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0 done, 2 a user's mistake or bad data, 75 ranks that did not meet, 130 Ctrl-C."""
    try:
        run(program, list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except MbtrainError as error:
        sys.stdout.flush()
        if not (isinstance(error, SHARED) and os.environ.get("RANK", "0") != "0"):
            sys.stderr.write(f"{program.name}: {one_line(str(error), 10_000)}\n")
        sys.exit(75 if isinstance(error, PeersError) else 2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program.name}: {program.when_interrupted}\n")
        sys.stderr.flush()
        os._exit(130)  # at once: a clean exit would wait for workers, and they end with this process
    sys.exit(0)


def run(program: Program, args: list[str]) -> None:
    """Find the verb and call it through fire. Raises ConfigError for unknown verbs and malformed options."""
    if not args or args[0] in ("--help", "-h", "help"):
        write(program.help.rstrip())
        return
    verb = args[0]
    if verb not in program.verbs:
        known = ", ".join(program.verbs)
        raise ConfigError(f"{verb}: no such verb{closest(verb, program.verbs)}; expected one of {known}")
    if "--help" in args or "-h" in args:
        write(inspect.getdoc(program.verbs[verb]) or "")
        return

    import fire

    # fire would read `--json SRC` as json=SRC and `--normalize` as rmalize=False; so every option is made --key=value.
    command = [verb, *(_key_value(arg, program.flags) for arg in args[1:])]
    fire.Fire({name: fire.decorators.SetParseFn(str)(verb) for name, verb in program.verbs.items()}, command)


def no_unknown(verb: Callable[..., Any], unknown: Mapping[str, str]) -> None:
    """Raise ConfigError for options that a verb does not have."""
    if unknown:
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = [p.name for p in inspect.signature(verb).parameters.values() if p.kind in kinds]
        key = next(iter(unknown))
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        raise ConfigError(f"--{key.replace('_', '-')}: no such option{closest(key, known)}; expected one of {listed}")


def settings_of(verb: Callable[..., Any], given: Mapping[str, Any], also: Sequence[str] = ("name",)) -> dict[str, str]:
    """The settings among a verb's options, dotted path -> text; `also`: those without a dot.

    Raises ConfigError for an option that is neither.
    """
    no_unknown(verb, {key: value for key, value in given.items() if "." not in key and key not in also})
    return {key: str(value) for key, value in given.items()}


def one_config(given: Sequence[str], otherwise: str | None = None) -> str:
    """The one configuration file that a verb is for; `otherwise`, if that is not None, where none is given.

    Raises ConfigError.
    """
    if not given and otherwise is not None:
        return otherwise
    if len(given) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(given)}; see configs/")
    return given[0]


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Say in one line that something cannot be written: raises ConfigError for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what}: cannot be written ({error.strerror or error}); choose another place") from error


def closest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """' (did you mean X?)' where something known is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0].replace('_', '-')}?)" if near else ""


def flag(option: str, value: str) -> bool:
    """An option that is there or not. Raises ConfigError for another value than true or false."""
    if value.lower() in ("true", "false", ""):
        return value.lower() == "true"
    raise ConfigError(f"{option}: expected true or false, got {value!r}")


def number(option: str, value: str, kind: type[int] | type[float], least: float) -> Any:
    """An int or float option of at least `least`. Raises ConfigError."""
    try:
        parsed = kind(value)
    except (ValueError, TypeError):  # TypeError: a list, where a file has the option
        parsed = None
    if parsed is None or not parsed >= least:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{option}: expected {what} of at least {least:g}, got {value!r}")
    return parsed


def write(line: str) -> None:
    """A line on stdout, which belongs to the command line alone."""
    sys.stdout.write(line + "\n")


def finish(figures: Mapping[str, Any], as_json: bool) -> None:
    """The verb's figures as one JSON object, the last line on stdout, where asked for."""
    if as_json:
        write(json.dumps(known(figures), default=str, allow_nan=False))


def known(value: Any) -> Any:
    """For JSON, which knows no nan (null) and no inf (the string)."""
    if isinstance(value, Mapping):
        return {key: known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [known(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _key_value(arg: str, flags: Sequence[str]) -> str:
    if not arg.startswith("-"):
        return arg
    key, equals, _ = arg.partition("=")
    if not key.startswith("--") or len(key) < 4:
        raise ConfigError(f"{arg}: options are written --key=value; a file of that name is ./{arg}")
    if equals:
        return arg
    if key[2:] in flags:
        return f"{key}=true"
    raise ConfigError(f"{key}: has no value; options are written --key=value")
