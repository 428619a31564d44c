"""The command line of every train.py: a recipe's name, typed overrides, and one line for bad input.

    python train.py [RECIPE] [--seed 3] [--optim.lr .05] ...
    python train.py table1 --only 3          # the third run of a recipe that has several
    python train.py --resume RUN
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shared.config import SCHEMA, from_dict, locate

C = TypeVar("C")


def parse(
    paper: str,
    recipes: Mapping[str, C],
    about: Mapping[str, str],
    expand: Callable[[Any], list[Any]],
    default: str = "embedded",
    argv: list[str] | None = None,
) -> C:
    """The configuration that the command line asks for; exits with code 2 and a line if it errs.

    recipes and about: configurations and their lines of help by name. expand: the runs of a recipe
    that is a whole table or figure (its field `vary`), of which `--only K` takes one.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    name = default
    if args and not args[0].startswith("-"):
        name = args.pop(0)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        fail(f"no recipe {name!r} in {paper}{hint} (there are: {', '.join(recipes)})")
    config: Any = recipes[name]
    if any(a == "--resume" or a.startswith("--resume=") for a in args):
        return _resume(type(config), args)

    several = expand(config)  # the runs of a table or figure
    listing = "".join(f"\n  {k}: {_told(_differing(several), v)}" for k, v in enumerate(several, 1))
    if "--only" in args:
        config = _only(args, several)
        several = [config]
    elif len(several) > 1:
        for flag in sorted(_differing(several)):
            if any(_plain(a.split("=")[0]) == flag for a in args):
                fail(f"{flag} differs between the runs of {name}: choose one of them by --only K")
    runs = config.vary if len(several) > 1 else ()
    config = dataclasses.replace(config, vary=())

    import tyro  # only a script's command line needs it

    known = _flags(config)
    for arg in args:
        flag = arg.split("=")[0]
        if flag.startswith("--") and flag != "--help" and _plain(flag) not in known:
            near = difflib.get_close_matches(_plain(flag), known, n=1)
            fail(f"no flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    table = "\n".join(f"  {r:<22} {about[r]}" for r in recipes)
    description = (
        f"python train.py [RECIPE] [FLAGS]: recipe {name!r} and what you change in it.\n\n"
        f"Recipes:\n\n{table}\n\n"
        + (f"The runs of {name} (--only K takes one):\n{listing}\n\n" if runs else "")
        + "The flags below show this recipe's values."
    )
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            read: Any = tyro.cli(
                type(config), default=config, args=args, description=description, prog="train.py"
            )
            return dataclasses.replace(read, vary=runs)
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue(), end="")
            raise SystemExit(0) from None
        fail(_one_line(err.getvalue() + out.getvalue()))


def _only(args: list[str], several: list[Any]) -> Any:
    at = args.index("--only")
    wanted = args[at + 1] if at + 1 < len(args) else ""
    del args[at : at + 2]
    if not wanted.isdigit() or not 1 <= int(wanted) <= len(several):
        fail(f"--only {wanted}: this recipe has {len(several)} to choose from")
    return several[int(wanted) - 1]


def _differing(several: list[Any]) -> set[str]:
    """The flags whose values are not the same in all of these configurations."""
    values = [_values(one) for one in several]
    return {flag for flag in values[0] if len({str(v[flag]) for v in values}) > 1}


def _told(flags: set[str], config: Any) -> str:
    values = _values(config)
    return ", ".join(f"{flag[2:]} {values[flag]}" for flag in sorted(flags))


def _values(config: Any, prefix: str = "--") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), _plain(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(value):
            found |= _values(value, f"{flag}.")
        else:
            found[flag] = value
    return found


def _resume(cls: type[C], args: list[str]) -> C:
    text = " ".join(args)
    found = re.fullmatch(r"--resume[ =](\S.*)", text)
    if not found or " --" in text:
        fail("--resume RUN takes the run's own configuration: give no recipe's flags beside it")
    folder = Path(found[1].strip())
    folder = folder if folder.is_dir() else locate(str(folder))
    return dataclasses.replace(stored(cls, folder), resume=str(folder.resolve()))  # type: ignore[type-var]


def stored(cls: type[C], folder: str | Path) -> C:
    """The configuration of a run folder. Raises ValueError where there is none or another's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no run folder here (config.json is missing)")
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: schema {record.get('schema')}, this code reads {SCHEMA}; "
            f"use the commit named there ({record.get('git')})"
        )
    return from_dict(cls, record["config"], str(path))


def _flags(config: Any) -> list[str]:
    names = []
    for flag, value in _values(config).items():
        head, _, last = flag.rpartition(".")
        negative = f"{head}.no-{last}" if head else f"--no-{flag[2:]}"
        names += [flag, negative] if isinstance(value, bool) else [flag]
    return names


def _plain(flag: str) -> str:
    return flag.replace("_", "-")


def _one_line(message: str) -> str:
    """What tyro's boxed message says, without box, title and excerpt of the help."""
    lines = [re.sub(r"[─│╭╮╰╯]|--{3,}", " ", line).strip() for line in message.splitlines()]
    words = " ".join(" ".join(line for line in lines[1:] if line).split())
    words = re.sub(r"\s*Argument helptext:.*", "", words)
    return re.sub(r"\s*For full helptext, (see|run) .*$", "", words)


def fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def guarded(script: Callable[[], Any]) -> None:
    """Run a script's main: bad input (ValueError, OSError) becomes one line and exit code 2.

    With `--traceback` as the last argument the whole trace is printed instead.
    """
    trace = sys.argv[-1:] == ["--traceback"]
    if trace:
        sys.argv.pop()
    try:
        script()
    except (ValueError, OSError) as error:
        if trace:
            traceback.print_exc()
        fail(" ".join(str(error).split()) or type(error).__name__)
    except KeyboardInterrupt:  # while data are made or scores counted: nothing is half written
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
