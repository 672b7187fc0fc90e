"""Paths in a configuration: local or `gs://`, relative to where they were written.

A relative path in a config file is relative to that file's folder, so a scheduled run does not
depend on its working directory; one given on the command line is relative to the working directory.
"""

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from index_builder.datasets import storage


class CommandLineText(str):
    """A value that was typed on the command line."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or storage.is_remote(value):
        return value
    if not value:
        raise ValueError("a path that is not empty")
    typed = isinstance(value, CommandLineText)
    base = os.getcwd() if typed or not info.context else info.context["base"]
    return storage.join(os.path.abspath(base), os.path.expanduser(value))


Location = Annotated[str, BeforeValidator(_resolve)]
