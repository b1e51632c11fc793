"""The tables of what an adapter may be, as the documentation shows them."""

from __future__ import annotations

from fedcore.data.adapter_fields import FIELDS, FieldRule
from fedcore.reports.grid import Column, Grid

_TREATED = {
    "any": "any value",
    "read": "any value, read",
    "same": "the same in all adapters",
    "union": "any value, united",
    "dropped": "any value, left out of the result",
    "refused": "refused",
}


def adapters_markdown() -> str:
    """One pipe table per kind of adapter: its fields, what is accepted, and why.

    A kind's table leaves out the fields that the kinds before it treat alike.

    Example:
        >>> print(adapters_markdown().splitlines()[0])
        ### `LORA`
    """
    parts: list[str] = []
    shown: list[tuple[str, FieldRule]] = []
    for kind, rules in FIELDS.items():
        rows = [item for item in rules.items() if item not in shown]
        shown += rows
        columns = tuple(Column(heading, number=False) for heading in ("field", "accepted", "why"))
        cells = tuple((f"`{field}`", _accepted(rule), _why(rule)) for field, rule in rows)
        parts.append(f"### `{kind}`\n\n{Grid(kind, columns, cells).markdown()}")
    return "\n".join(parts)


def _accepted(rule: FieldRule) -> str:
    if rule.use != "limited":
        return _TREATED[rule.use]
    # Not JSON: the values are shown as a configuration in Python has them.
    return ", ".join(f"`{value}`" for value in rule.accepted)


def _why(rule: FieldRule) -> str:
    return f"{rule.why}; {rule.remedy}" if rule.remedy else rule.why
