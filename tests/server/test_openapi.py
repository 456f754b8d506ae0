"""The description says what is checked: names, bounds, endpoints."""

import json
from typing import Any

import pytest

from edgeroute.server.fields import RULES
from edgeroute.server.openapi import BODIES, described, description, routes
from edgeroute.server.records import ServerParams, Services
from tests.server.asgi import Ask, answer

NONE = Services(params=ServerParams(), models=None)  # type: ignore[arg-type]


def schemas() -> dict[str, Any]:
    found: dict[str, Any] = description()["components"]["schemas"]
    return found


def test_every_body_is_described_field_by_field() -> None:
    for body in BODIES:
        schema = schemas()[body.__name__]
        assert schema["properties"].keys() == set(body.__struct_encode_fields__)
        assert schema["additionalProperties"] is False


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(description())
    for piece in text.split('"$ref": "')[1:]:
        name = piece.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in schemas()


def test_fields_that_are_refused_are_described_as_such() -> None:
    fields = schemas()["ChatBody"]["properties"]
    for name in RULES.keys() & fields.keys():
        assert fields[name]["enum"] == [None, *RULES[name].taken]


def test_bounds_are_those_of_the_records() -> None:
    fields = schemas()["ChatBody"]["properties"]
    assert {"type": "integer", "minimum": 1, "maximum": 16} in fields["n"]["anyOf"]
    assert schemas()["FeedbackBody"]["required"] == ["id", "reward"]


def test_keys_are_asked_for_where_there_are_some() -> None:
    assert "security" not in described(ServerParams())
    assert described(ServerParams(api_keys=("k",)))["security"] == [{"key": []}]
    assert "k" not in str(described(ServerParams(api_keys=("kkkk",)))["security"][0]["key"])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_it_is_served(method: str) -> None:
    (route,) = routes(NONE)
    reply = answer(route, Ask(method=method, path="/openapi.json"))
    assert reply.status == 200
    assert reply["content-type"] == "application/json"
    if method == "GET":
        assert json.loads(reply.body)["openapi"] == "3.1.0"
