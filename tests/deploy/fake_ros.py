"""As much of rclpy as the node uses, in one process, so that its logic is tested without ROS."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any


class Message:
    """Any message: its fields are what it was made with."""

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


class Publisher:
    """Keeps what was published."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def publish(self, message: object) -> None:
        self.sent.append(message)


class Node:
    """A lifecycle node whose topics and parameters a test reaches."""

    given: dict[str, object] = {}  # noqa: RUF012 - a test sets it before it makes the node

    def __init__(self, name: str) -> None:
        self.name = name
        self.parameters: dict[str, object] = {}
        self.topics: dict[str, Publisher] = {}
        self.listeners: dict[str, Callable[[Any], None]] = {}
        self.log: list[str] = []

    def declare_parameter(self, name: str, value: object) -> None:
        self.parameters[name] = self.given.get(name, value)

    def get_parameter(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.parameters[name])

    def get_logger(self) -> SimpleNamespace:
        return SimpleNamespace(error=self.log.append, warning=self.log.append)

    def create_lifecycle_publisher(self, kind: type, topic: str, depth: int) -> Publisher:
        return self.topics.setdefault(topic, Publisher())

    def create_subscription(
        self, kind: type, topic: str, heard: Callable[[Any], None], depth: int
    ) -> None:
        before = self.listeners.get(topic, lambda message: None)

        def both(message: Any) -> None:  # every subscription hears every message
            before(message)
            heard(message)

        self.listeners[topic] = both

    def on_activate(self, state: object) -> str:
        return "success"

    def on_deactivate(self, state: object) -> str:
        return "success"


@contextmanager
def ros() -> Iterator[type[Node]]:
    """Let `import rclpy` and the messages find these classes inside the block."""
    results = SimpleNamespace(SUCCESS="success", FAILURE="failure")
    made = {
        "rclpy": {}, "rclpy.executors": {"ExternalShutdownException": RuntimeError},
        "rclpy.lifecycle": {"Node": Node, "State": object, "TransitionCallbackReturn": results},
        "std_msgs": {}, "std_msgs.msg": {"String": Message, "Empty": Message},
    }  # fmt: skip
    for name, content in made.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    try:
        yield Node
    finally:
        for name in made:
            del sys.modules[name]
