"""What every section of the configuration is made of."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from transforms.settings import Settings


class Section(Settings):
    """A part of the configuration, written out again under the names that its file has."""

    model_config = ConfigDict(serialize_by_alias=True)


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]
AutoCountOrZero = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_auto)]
AutoEncoding = Annotated[Literal["float16", "compressed"] | None, BeforeValidator(_auto)]
