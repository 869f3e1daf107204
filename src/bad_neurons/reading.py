"""Text from outside: read up to a bound, and parsed so that nothing in it can hang, crash or swell.

Whatever is wrong comes back as a ``ValueError`` of a few words (from a text) or as the one-line :class:`UserError` (from a file).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from bad_neurons.errors import UserError

if TYPE_CHECKING:
    import yaml

DATA_BYTES = 1 << 30  # of a data file or a table at most
CONFIG_BYTES = 1 << 18  # of a configuration at most
_DIGITS = 300  # of a number at most; the largest float has 309
_DEPTH = 50  # of nested YAML at most
_NODES = 100_000  # of a YAML text at most, with every alias written out

_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
_FAR_INTEGER = re.compile(r"[-+]?[0-9_:]+")


def read_bytes(path: str | os.PathLike[str], expected: str, limit: int = DATA_BYTES) -> bytes:
    """The content of an ordinary file of at most ``limit`` bytes; ``expected`` says in a message what it should have been.

    Raises:
        UserError: absent, no ordinary file (a device or a pipe may never end), or too large.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as handle:
            found = os.fstat(handle.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError("Is a directory" if stat.S_ISDIR(found.st_mode) else "not an ordinary file")
            if found.st_size > limit:
                raise OSError(f"{found.st_size:,} bytes, and {limit:,} are read at most")
            return handle.read(limit)
    except (OSError, ValueError) as error:  # a ValueError from a path that no file system has
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); expected {expected}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe that nobody writes to would wait for ever


def read_text(path: str | os.PathLike[str], expected: str, limit: int = DATA_BYTES) -> str:
    """The same as UTF-8 text, without a byte order mark.

    Raises:
        UserError: as :func:`read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, expected, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read (not UTF-8 text); expected {expected}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; numbers are finite and short, keys differ, and every text can be written again.

    Raises:
        ValueError: anything else; a ``json.JSONDecodeError`` where the text is not JSON, with the place.
    """
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=_no_constant, object_pairs_hook=_object
        )  # fmt: skip
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair, which is no text") from error
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} twice")
    return found


def parse_yaml(text: str, load: Callable[[str], Any] | None = None) -> Any:
    """The value of a YAML text, by ``yaml.safe_load`` or ``load``, after a look at its shape.

    Raises:
        ValueError: not YAML, nested too deeply, aliases that multiply, a key twice, or a number of thousands of digits.
    """
    import yaml

    try:
        _check_shape(text)
        return (load or yaml.safe_load)(text)
    except (yaml.YAMLError, OverflowError, TypeError, AttributeError, KeyError) as error:  # safe_load lets all of these through
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _check_shape(text: str) -> None:
    import yaml

    depth = 0
    # Event by event: composing a text that is nested too deeply takes the square of its length.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _DIGITS and _FAR_INTEGER.fullmatch(event.value):
            raise ValueError(f"a number of {len(event.value)} digits")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None:
        _size(node, {})


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes with every alias written out; checks that it is small and that no key stands twice."""
    import yaml

    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError("an alias inside of what it stands for")
        return found
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if strange := [key for key, _ in node.value if key.tag not in _KEYS]:
            raise ValueError(f"line {strange[0].start_mark.line + 1}: a key that is no text")
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} twice")
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_size(child, known) for child in children)
    if size > _NODES:
        raise ValueError(f"more than {_NODES} values, aliases written out")
    known[id(node)] = size
    return size
