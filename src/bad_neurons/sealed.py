"""What makes an artifact recognise itself: the version of its format, and a digest of everything else that it holds.

Every JSON object that this package writes ends in ``digest``, every safetensors file has one in its metadata, and what is kept
line by line has one in each line. A reader names what it expects with a :class:`Format`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bad_neurons.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = "digest"


class Format(str):
    """Name and version of a format, ``bad-neurons/<name>/<version>``, and the command that writes it.

    Args:
        text: the name with the version.
        made_by: command, as it is typed.
    """

    made_by: str

    def __new__(cls, text: str, made_by: str) -> Format:
        """A text with a command."""
        made = super().__new__(cls, text)
        made.made_by = made_by
        return made

    def check(self, content: Any, where: object) -> dict[str, Any]:
        """``content`` without its seal, if it is of this format and unchanged since it was written; ``where`` names the file.

        Raises:
            UserError: another format, an older or a later version of this one, or a digest that is absent or wrong.
        """
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != self:
            raise UserError(f"{where}: {self._unlike(found)}")
        if DIGEST not in content:
            raise UserError(f"{where}: has no digest of itself; expected {str(self)!r} as `{self.made_by}` writes it, whole")
        return unsealed(content, where)

    def _unlike(self, found: Any) -> str:
        name, _, version = self.rpartition("/")
        theirs, _, number = found.rpartition("/") if isinstance(found, str) else ("", "", "")
        if found is None or (theirs == name and number.isdecimal() and int(number[:9]) < int(version)):
            return f"format {found!r} is of an older version; expected {str(self)!r}: run `{self.made_by}` again"
        if theirs == name and number.isdecimal():
            return f"format {found[:80]!r} is of a later version of bad-neurons; expected {str(self)!r}: update bad-neurons"
        return f"format {found!r:.80}; expected {str(self)!r}, as `{self.made_by}` writes it"


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form; equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as JSON has it, with a digest of the rest of it at its end."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != DIGEST}, allow_nan=False))
    return {**plain, DIGEST: digest_json(plain)}


def unsealed(content: Mapping[str, Any], where: object) -> dict[str, Any]:
    """``content`` without its digest, after a check of it where there is one.

    Raises:
        UserError: the digest is another one.
    """
    plain = {key: value for key, value in content.items() if key != DIGEST}
    if DIGEST in content and content[DIGEST] != digest_json(plain):
        raise UserError(f"{where}: damaged or changed since it was written (its digest does not match); make it again")
    return plain


def digest_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of tensors, and of what stands beside them."""
    import torch

    digest = hashlib.sha256(digest_json(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
