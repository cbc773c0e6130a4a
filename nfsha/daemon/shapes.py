"""Is JSON from another process of the form that is expected? Pure; a bound on its size, too.

The other node has the key of the pair, but may run another version: what it tells is shown to
operators only when it has exactly this form.
"""

from __future__ import annotations

import json
from typing import Any, Final

MAX_BYTES: Final = 640 << 10
"""As text: well below what one answer of the control socket carries."""

Shape = Any
"""A type, a tuple of types (None among them for nothing), [a shape], or {key: shape}; {str: shape}
for any keys."""


def fits(value: object, shape: Shape) -> bool:
    """Whether the value has this shape, and is not too large. A dict has just these keys."""
    return _fits(value, shape) and len(json.dumps(value)) <= MAX_BYTES


def _fits(value: object, shape: Shape) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if shape is None:
        return value is None
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and _fits_keys(value, shape)
    return type(value) is shape and (not isinstance(value, int) or abs(value) < 1 << 63)


def _fits_keys(value: dict[Any, Any], shape: dict[Any, Any]) -> bool:
    if set(shape) == {str}:
        of_each = shape[str]
        return all(type(key) is str and _fits(one, of_each) for key, one in value.items())
    return set(value) == set(shape) and all(_fits(value[key], one) for key, one in shape.items())
