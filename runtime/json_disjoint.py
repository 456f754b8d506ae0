"""Whether JSON schemas exclude each other, which `oneOf` demands of what it lists."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def are_disjoint(schemas: Sequence[Any]) -> bool:
    """Whether no value can meet two of the schemas.

    Types, constants and required constant properties are compared; when these do not
    tell, the answer is no.
    """
    return all(_differ(a, b) for i, a in enumerate(schemas) for b in schemas[i + 1 :])


def _differ(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return False
    one, other = _values(a), _values(b)
    if one is not None and other is not None:
        return not set(one) & set(other)
    types = [{s["type"]} if isinstance(s.get("type"), str) else set() for s in (a, b)]
    if all(types) and not types[0] & types[1] and types[0] | types[1] != {"number", "integer"}:
        return True
    properties = [s.get("properties", {}) for s in (a, b)]
    if not all(isinstance(p, Mapping) for p in properties):
        return False
    shared = set(properties[0]) & set(properties[1])
    shared &= _required(a) & _required(b)
    return any(
        _values(properties[0][n])
        and _values(properties[1][n])
        and _differ(properties[0][n], properties[1][n])
        for n in shared
    )


def _values(schema: Any) -> list[str] | None:
    """The JSON texts of a const or enum."""
    if isinstance(schema, Mapping) and "const" in schema:
        return [json.dumps(schema["const"])]
    if isinstance(schema, Mapping) and isinstance(schema.get("enum"), list):
        return [json.dumps(v) for v in schema["enum"]]
    return None


def _required(schema: Mapping[str, Any]) -> set[str]:
    names = schema.get("required", [])
    return {n for n in names if isinstance(n, str)} if isinstance(names, list) else set()
