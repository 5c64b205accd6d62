"""YAML in a flag's value, in which numbers are read as JSON and Python write them."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe: plain data only. YAML 1.1 takes 1e-06, as JSON writes a small number, for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """The plain data that YAML, or JSON, describes.

    Raises:
        yaml.YAMLError: it is neither.
    """
    return yaml.load(text, _Loader)
