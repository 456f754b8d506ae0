"""A ROS 2 lifecycle node that answers prompts with edgeroute; see README.md beside it.

Callbacks return at once: one worker thread generates, and publishes as text comes.
"""

import contextlib
import json
import queue
import threading

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import Node, State, TransitionCallbackReturn
from std_msgs.msg import Empty, String

import edgeroute

PARAMETERS = {
    "model": "", "memory": "", "adapters": "", "small": "", "steps": "", "max_tokens": 256,
    "timeout_s": 60.0, "system": "", "max_waiting": 8,
}  # fmt: skip
SETTINGS = ("memory", "adapters", "small", "steps")


class EdgerouteNode(Node):
    """Loads on configure, answers while active, frees on cleanup."""

    def __init__(self) -> None:
        super().__init__("edgeroute")
        for name, value in PARAMETERS.items():
            self.declare_parameter(name, value)
        self._runtime: edgeroute.Runtime | None = None
        self._waiting: queue.Queue[str | None] = queue.Queue()
        self._running = None  # the stream under way
        self._lock = threading.Lock()
        self._active = False
        self._worker: threading.Thread | None = None
        # Once: a node that is configured again would hear everything twice.
        self._tokens = self.create_lifecycle_publisher(String, "~/tokens", 100)
        self._answer = self.create_lifecycle_publisher(String, "~/answer", 10)
        self.create_subscription(String, "~/prompt", self._on_prompt, 10)
        self.create_subscription(Empty, "~/cancel", self._on_cancel, 10)

    def on_configure(self, state: State) -> TransitionCallbackReturn:
        """Load the model; what is wrong with it goes to the log, and the node stays as it was."""
        given = {name: self._value(name) for name in SETTINGS if self._value(name)}
        try:
            self._runtime = edgeroute.Runtime(self._value("model") or None, **given)
        except edgeroute.EdgerouteError as error:
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        self._waiting = queue.Queue(maxsize=int(self._value("max_waiting")))
        self._worker = threading.Thread(target=self._work, name="edgeroute-node", daemon=True)
        self._worker.start()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: State) -> TransitionCallbackReturn:
        """Take prompts from now on."""
        self._active = True
        return super().on_activate(state)

    def on_deactivate(self, state: State) -> TransitionCallbackReturn:
        """Take no more, and end what runs."""
        self._active = False
        self._cancel()
        return super().on_deactivate(state)

    def on_cleanup(self, state: State) -> TransitionCallbackReturn:
        """Close the model and give its memory back."""
        self._end()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: State) -> TransitionCallbackReturn:
        """As cleanup, from whatever state."""
        self._active = False
        self._end()
        return TransitionCallbackReturn.SUCCESS

    def _value(self, name: str) -> object:
        return self.get_parameter(name).value

    def _on_prompt(self, message: String) -> None:
        if not self._active:
            self.get_logger().warning("a prompt came while the node is not active; dropped")
            return
        try:
            self._waiting.put_nowait(message.data)
        except queue.Full:
            self._tell({"error": f"{self._waiting.maxsize} prompts wait already; try again later"})

    def _on_cancel(self, message: Empty) -> None:
        self._cancel()

    def _cancel(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        with self._lock:
            if self._running is not None:
                self._running.cancel()

    def _work(self) -> None:
        while (prompt := self._waiting.get()) is not None:
            try:
                self._generate(prompt)
            except edgeroute.EdgerouteError as error:
                self._tell({"error": str(error)})

    def _generate(self, prompt: str) -> None:
        system = self._value("system")
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        assert self._runtime is not None  # the worker runs between configure and cleanup only
        stream = self._runtime.stream(
            messages=messages, max_tokens=int(self._value("max_tokens")),
            timeout_s=float(self._value("timeout_s")),
        )  # fmt: skip
        with self._lock:
            self._running = stream
        try:
            for chunk in stream:
                if chunk.text:
                    self._tokens.publish(String(data=chunk.text))
                if chunk.generation is not None:
                    done = chunk.generation
                    self._tell({"id": done.id, "text": done.text, "stats": done.stats.to_dict(),
                                "finish_reason": done.finish_reason})  # fmt: skip
        finally:
            with self._lock:
                self._running = None

    def _tell(self, content: dict[str, object]) -> None:
        self._answer.publish(String(data=json.dumps(content)))

    def _end(self) -> None:
        """Cancel, let the worker finish, and close the model."""
        if self._worker is not None:
            self._cancel()
            self._waiting.put(None)
            self._worker.join()
            self._worker = None
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None


def main() -> None:
    """Spin until Ctrl-C or ROS shuts down."""
    rclpy.init()
    node = EdgerouteNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node._end()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
