"""What a record is made of: fields that are read strictly, and how they are written."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

from fedcore.errors import missing_extra

try:
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
    from pydantic_core import PydanticCustomError
except ImportError as error:
    raise missing_extra("pydantic", "run") from error


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not isfinite(value))


def _defined(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not _undefined(value)}


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise PydanticCustomError("repeated", "a list of strings that are all different")
    return names


Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[
    Annotated[float, Strict()] | None,
    BeforeValidator(lambda value: None if _undefined(value) else value),
]
"""A number, or ``None`` where it is undefined: NaN and infinities become ``None``."""

Numbers = Annotated[dict[str, Annotated[float, Strict()]], BeforeValidator(_defined)]
"""Numbers by name, without those that are undefined."""

Names = Annotated[tuple[str, ...], AfterValidator(_distinct)]


class Record(BaseModel):
    """Frozen; keys that it does not know are ignored, since later versions may write more."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """As JSON values: what was set, so that a record is written as it was read."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)
