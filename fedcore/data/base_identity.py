"""Which base model a client trains on, as a record that clients and server compare.

A base has five *parts*, each a digest of named *entries*: the fields of its configuration, how each
tensor is stored, the values of each tensor, the tokenizer, the chat template. The parts travel with
every broadcast and upload; the entries, from which they follow, only where something differs or
nobody else knows them, so that the error can name the first that does.
:func:`fedcore.training.base_identity.identity_of` makes the record of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from fedcore.data.folders import read_object, write_text
from fedcore.errors import FedcoreError, unknown_name

BASE_FILE = "base.json"
"""The file that holds an identity with its entries, beside an adapter or in a run's folder."""

Part = Literal["config", "quantisation", "weights", "tokenizer", "template"]
PARTS = get_args(Part)

Mode = Literal["sampled", "full"]
MODES = get_args(Mode)
"""Whether the weights' digests are of blocks of each tensor or of all its bytes."""

WRAPPERS = ("base_layer", "original_module", "_orig_mod")
"""What PEFT and torch.compile call the wrapped module inside their own."""

_REMEDY: Mapping[str, str] = {
    "config": "load the server's model with the server's version of transformers",
    "quantisation": "load the base in the format and dtype of the server's",
    "weights": "load the base that the server names",
    "tokenizer": "load the server's tokenizer",
    "template": "set the server's chat template",
}

_DIGEST = re.compile(r"[0-9a-f]{32}")
_LONGEST = 400
_FILE_BYTES = 1 << 26

Entries = Mapping[str, Mapping[str, str]]
"""Part to the entries' names and values, in the order in which a model has them."""


@dataclass(frozen=True)
class BaseIdentity:
    """A base model by its digests.

    Attributes:
        mode: one of :data:`MODES`.
        parts: part to 32 hex digits; a part that was not looked at is missing.
        entries: part to what its digest is made of: field, tensor or setting to 16 hex digits of
            its value, or, in ``quantisation``, to dtype and shape. Empty where only the parts are
            known.
    """

    mode: str
    parts: Mapping[str, str]
    entries: Entries = field(default_factory=dict)

    @classmethod
    def of(cls, mode: str, entries: Entries) -> BaseIdentity:
        """The identity that has these ``entries``."""
        parts = {part: part_digest(entries[part]) for part in PARTS if part in entries}
        return cls(mode, parts, {part: dict(entries[part]) for part in parts})

    @property
    def tensors(self) -> Mapping[str, str]:
        """Tensor to the 16 hex digits of its values; empty where only the parts are known."""
        return self.entries.get("weights", {})

    @property
    def brief(self) -> BaseIdentity:
        """The same without entries: what travels as a rule."""
        return replace(self, entries={})

    def only(self, parts: Collection[str]) -> BaseIdentity:
        """The same without any but these ``parts``."""
        return replace(
            self,
            parts={part: digest for part, digest in self.parts.items() if part in parts},
            entries={part: named for part, named in self.entries.items() if part in parts},
        )

    def without(self, names: Iterable[str]) -> BaseIdentity:
        """The same without the tensors ``names``, which an adapter trains or replaces.

        A classifier's head, for instance, is drawn anew at every site and then comes with the
        broadcast. Without entries there is nothing to leave out.
        """
        taken = tuple({plain_name(name) for name in names})
        entries = {
            part: {
                name: value
                for name, value in named.items()
                if part not in ("weights", "quantisation")
                or not any(name == one or name.startswith(f"{one}.") for one in taken)
            }
            for part, named in self.entries.items()
        }
        return BaseIdentity.of(self.mode, entries) if entries else self

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the entries are lists of pairs, which keep their order."""
        about: dict[str, Any] = {"mode": self.mode, "parts": dict(self.parts)}
        if self.entries:
            about["entries"] = {
                part: [[name, value] for name, value in named.items()]
                for part, named in self.entries.items()
            }
        return about

    @classmethod
    def from_json(cls, value: Any, label: str) -> BaseIdentity:
        """Read what :meth:`to_json` made.

        Raises:
            FedcoreError: it is something else, or the parts are not those of the entries.
        """
        if not isinstance(value, Mapping) or value.get("mode") not in MODES:
            raise FedcoreError(f"{label}: its base identity has no mode, one of {', '.join(MODES)}")
        parts = value.get("parts")
        if not isinstance(parts, Mapping) or not all(
            part in PARTS and isinstance(digest, str) and _DIGEST.fullmatch(digest)
            for part, digest in parts.items()
        ):
            raise FedcoreError(f"{label}: its base identity has parts that are not 32 hex digits")
        identity = cls(value["mode"], dict(parts))
        if "entries" not in value:
            return identity
        whole = cls.of(identity.mode, _entries(value["entries"], label))
        if whole.parts != identity.parts:
            raise FedcoreError(f"{label}: the parts of its base identity are not of its entries")
        return whole

    def save(self, folder: str | Path) -> Path:
        """Write it as ``base.json`` into ``folder``: beside an adapter, it goes with it.

        Raises:
            FedcoreError: it cannot be written.
        """
        file = Path(folder) / BASE_FILE
        write_text(json.dumps(self.to_json(), indent=1) + "\n", file)
        return file

    @classmethod
    def read(cls, folder: str | Path, label: str | None = None) -> BaseIdentity | None:
        """What :meth:`save` wrote into ``folder``; None where nothing was.

        Raises:
            FedcoreError: the file is not a base identity.
        """
        file = Path(folder) / BASE_FILE
        if not file.is_file():
            return None
        label = label or str(file)
        return cls.from_json(read_object(file, label, limit=_FILE_BYTES), label)


def part_digest(entries: Mapping[str, str]) -> str:
    """32 hex digits of a part's ``entries``, whatever their order."""
    return sha256(json.dumps(sorted(entries.items())).encode()).hexdigest()[:32]


def plain_name(key: str) -> str:
    """A tensor's name in the plain base, without the segments that wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def check_allow(allow: Iterable[str]) -> tuple[str, ...]:
    """The parts that may differ, each once.

    Raises:
        FedcoreError: the part is unknown, with the nearest names.
    """
    if isinstance(allow, str):
        raise FedcoreError(f"allow is {allow!r}; pass a list of parts: {', '.join(PARTS)}")
    parts = tuple(dict.fromkeys(allow))
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part of a base in allow", str(part), PARTS)
    return parts


def base_differences(
    base: BaseIdentity,
    expected: BaseIdentity,
    allow: Collection[str] = (),
    owner: str = "the server's",
) -> tuple[str | None, tuple[str, ...]]:
    """What is wrong with ``base``, and the differences that are allowed, each as a sentence.

    Every part of ``expected`` has to be there and equal. Where another ``quantisation`` is allowed,
    weights that are stored otherwise differ with it; those that are stored alike do not, where both
    sides' entries are known.

    Args:
        allow: parts that may differ.
        owner: whose base is expected, for the messages.

    Returns:
        The first difference that is not allowed, or None, and all those that are.
    """
    if base.mode != expected.mode:
        problem = (
            f"its base was measured {base.mode}, {owner} {expected.mode}; set "
            "model.identity (identity_of's mode) alike"
        )
        return problem, ()
    allowed = []
    for part in PARTS:
        if part not in expected.parts or base.parts.get(part) == expected.parts[part]:
            continue
        difference: str | None = _difference(part, base, expected, owner)
        if part == "weights" and "quantisation" in allow:
            names = _stored_alike(base, expected)
            if names is not None:
                difference = _first(part, base, expected, owner, names)
                if difference is None:
                    continue
            elif base.parts.get("quantisation") != expected.parts.get("quantisation"):
                continue
        if part not in allow:
            known = part in base.parts
            remedy = _REMEDY[part] if known else "pass the tokenizer to FederatedClient"
            remedy = f"{remedy}, or let it differ by allow = [{part!r}]"
            return f"{difference}; {remedy} (in a recipe model.allow)", ()
        allowed.append(f"{difference}, as allowed")
    return None, tuple(allowed)


def _difference(part: str, base: BaseIdentity, expected: BaseIdentity, owner: str) -> str:
    if part not in base.parts:
        return f"it does not say the {part} of its base, to compare with {owner}"
    names = {**expected.entries.get(part, {}), **base.entries.get(part, {})}
    known = part in expected.entries and part in base.entries
    first = _first(part, base, expected, owner, names) if known else None
    return first or f"its base differs from {owner} in its {part}"


def _first(
    part: str,
    base: BaseIdentity,
    expected: BaseIdentity,
    owner: str,
    names: Iterable[str],
) -> str | None:
    """The first of ``names`` whose entries differ, in words."""
    here, there = base.entries[part], expected.entries[part]
    for name in names:
        if here.get(name) == there.get(name):
            continue
        place = f"its base differs from {owner} in its {part}, first {name}"
        if name not in here:
            return f"{place}, which it lacks"
        if name not in there:
            return f"{place}, which {owner} lacks"
        if part == "quantisation" and " " in here[name] + there[name]:
            return f"{place}: {here[name]}, {owner} {there[name]}"
        return place
    return None


def _stored_alike(base: BaseIdentity, expected: BaseIdentity) -> list[str] | None:
    """The tensors that both store in one dtype and shape; None where that is not known."""
    here, there = base.entries.get("quantisation"), expected.entries.get("quantisation")
    if here is None or there is None or not (base.tensors and expected.tensors):
        return None
    return [name for name in there if name in expected.tensors and here.get(name) == there[name]]


def _entries(value: Any, label: str) -> Entries:
    entries: dict[str, dict[str, str]] = {}
    for part, pairs in value.items() if isinstance(value, Mapping) else ():
        if part in PARTS and isinstance(pairs, list) and all(map(_is_pair, pairs)):
            entries[part] = dict(pairs)
    if not isinstance(value, Mapping) or len(entries) != len(value):
        raise FedcoreError(f"{label}: its base identity has entries that are not pairs of names")
    return entries


def _is_pair(pair: Any) -> bool:
    # Names are shown in errors: no control characters.
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, str) and text.isprintable() for text in pair)
        and all(len(text) <= _LONGEST for text in pair)
    )
