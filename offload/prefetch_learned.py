"""A trained predictor of routes: an ONNX file, run by onnxruntime before each token's pass.

What the tokens before chose gives every layer's expected choice, all layers in one run; as
a token goes through the layers, what they really choose corrects the next one's. Source:
ExpertFlow (arXiv 2410.17954), whose predictor reads tokens; routes are what a trace has.

The file is one affine map per layer, `scores = seen @ weight + bias`, in a form that leaves
nothing open but the numbers: every other byte must be what `to_onnx` writes for the model's
number of layers and experts, so that onnxruntime never sees a graph of somebody else's.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.prefetch import Guess, check_size, rank_row
from edgeroute.runtime.errors import ModelFileError, UsageError
from edgeroute.runtime.extras import check_extra
from edgeroute.runtime.units import format_bytes

Array = npt.NDArray[np.float32]
Score = Callable[[Array], Array]
"""The map: F32 [n_layer, 1, N_PARTS * n_expert] to [n_layer, 1, n_expert]."""

N_BACK: Final = 4
"""Layers before, whose choices in the same token count. The more the better, by ever less."""
N_PARTS: Final = N_BACK + 2
"""What a score is made of: those, this layer's choice in the token before, and its mean."""
DECAY: Final = 0.9
"""Of what a layer often chose, per token."""
MAX_BYTES: Final = 64 << 20

_OPSET, _IR_VERSION = 13, 8
_FLOAT, _RAW = 1, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteModel:
    """The numbers of a predictor, F32.

    `weight` [n_layer, N_PARTS * n_expert, n_expert]: rows for what the layer before chose in
    this token, then the one before that, up to N_BACK; for what this layer chose in the last
    token; and for the decayed mean of that. `bias` [n_layer, 1, n_expert].

    Raises:
        UsageError: shapes that are no predictor's, or values that are not finite.
    """

    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        n_layer, _, n_expert = self.bias.shape if self.bias.ndim == 3 else (0, 0, 0)
        right = self.weight.shape == (n_layer, N_PARTS * n_expert, n_expert)
        if not right or self.bias.shape[1] != 1 or n_layer < 1:
            raise UsageError(
                f"a route predictor has weight [n_layer, {N_PARTS} n_expert, n_expert] and bias "
                f"[n_layer, 1, n_expert]; got {self.weight.shape} and {self.bias.shape}"
            )
        check_size(n_layer, n_expert)
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise UsageError("a route predictor's values must be finite; train it again")

    @property
    def n_layer(self) -> int:
        """Layers, those without experts before the last one included."""
        return len(self.bias)

    @property
    def n_expert(self) -> int:
        """Experts of a layer."""
        n_expert: int = self.bias.shape[2]
        return n_expert


class History:
    """What layers chose so far, as a RouteModel sees it; training and running share it."""

    def __init__(self, n_layer: int, n_expert: int) -> None:
        check_size(n_layer, n_expert)
        self.now: Array = np.zeros((n_layer, n_expert), np.float32)
        """1 for each expert that this token has chosen so far."""
        self.seen: Array = np.zeros((n_layer, 1, N_PARTS * n_expert), np.float32)
        """Input of the map with nothing known of this token."""
        self._last: Array = self.seen[:, 0, N_BACK * n_expert : -n_expert]
        self._often: Array = self.seen[:, 0, -n_expert:]

    def begin_token(self) -> None:
        """What was now is before."""
        self._last[:] = self.now
        self.end_sequence()

    def end_sequence(self) -> None:
        """No token is the last one any more; what is chosen often stays."""
        self._often *= DECAY
        self._often += (1 - DECAY) * self.now
        self.now[:] = 0


class Learned:
    """A trained RouteModel behind the protocol of `prefetch.Predictor`."""

    name = "learned"

    def __init__(self, model: RouteModel, score: Score) -> None:
        """Take a model, and what computes its map."""
        self._score = score
        n_layer, n = model.n_layer, model.n_expert
        # What a layer's choice adds to the scores of the next N_BACK, of which some at the end
        # are none: [n_layer, N_BACK, n_expert (chosen), n_expert (scored)].
        self._adds: Array = np.zeros((n_layer, N_BACK, n, n), np.float32)
        for back in range(1, min(N_BACK, n_layer - 1) + 1):
            self._adds[:-back, back - 1] = model.weight[back:, (back - 1) * n : back * n]
        self._scores: Array = np.zeros((n_layer + N_BACK, n), np.float32)
        self._history = History(model.n_layer, model.n_expert)

    def begin_step(self) -> None:
        """Score every layer by what came before."""
        self._history.begin_token()
        self._scores[:-N_BACK] = self._score(self._history.seen)[:, 0]

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        """Correct the next layers' scores by what this one chose; see `prefetch.Predictor`."""
        chosen = list(dict.fromkeys(ids))
        now, scores = self._history.now, self._scores
        now[layer, chosen] = 1
        scores[layer + 1 : layer + 1 + N_BACK] += self._adds[layer][:, chosen].sum(axis=1)
        if layer + 1 >= len(now):
            return ()
        return rank_row((layer + 1) * now.shape[1], scores[layer + 1], -np.inf)

    def end_sequence(self) -> None:
        """What follows is about something else."""
        self._history.end_sequence()


def check_shape(n_layer: int, n_expert: int) -> None:
    """Refuse a model whose predictor would be too large, before anything is allocated.

    Raises:
        UsageError: it would be, or no model has this shape.
    """
    check_size(n_layer, n_expert)
    n_bytes = 4 * n_layer * n_expert * (N_PARTS * n_expert + 1)
    if n_bytes > MAX_BYTES:
        raise UsageError(
            f"a route predictor for {n_layer} layers of {n_expert} experts takes "
            f"{format_bytes(n_bytes)}; at most {format_bytes(MAX_BYTES)} are read: "
            f"choose another predictor"
        )


def load(path: str | os.PathLike[str], n_layer: int, n_expert: int) -> Learned:
    """Read a predictor for a model of so many layers and experts.

    Raises:
        ModelFileError: it is not one of `to_onnx`'s files for this shape.
        UsageError: the file cannot be read, or onnxruntime is not installed.
    """
    model = read_model(path, n_layer, n_expert)
    return Learned(model, on_onnxruntime(model))


def read_model(path: str | os.PathLike[str], n_layer: int, n_expert: int) -> RouteModel:
    """Read a predictor's numbers. Nothing is allocated unless the file has the right size.

    Raises:
        ModelFileError: it is not one of `to_onnx`'s files for this shape.
        UsageError: the file cannot be read, or no predictor can have this shape.
    """
    template = _Template.of(n_layer, n_expert)
    foreign = (
        f"{Path(path).name} is no route predictor for {n_layer} layers of {n_expert} experts; "
        f"train one from a trace of this model: python -m edgeroute.tools.train_routes"
    )
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size != template.n_bytes:
                raise ModelFileError(foreign)
            data = file.read(template.n_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read the route predictor {path}: {error.strerror}") from error
    parts = template.split(data)
    if parts is None:
        raise ModelFileError(foreign)
    weight, bias = (np.frombuffer(part, "<f4").astype(np.float32) for part in parts)
    try:
        return RouteModel(
            weight=weight.reshape(n_layer, N_PARTS * n_expert, n_expert),
            bias=bias.reshape(n_layer, 1, n_expert),
        )
    except UsageError as error:
        raise ModelFileError(f"{Path(path).name}: {error}") from error


def to_onnx(model: RouteModel) -> bytes:
    """Return a predictor as an ONNX file: MatMul and Add over constants, nothing else.

    Raises:
        UsageError: it would be larger than MAX_BYTES.
    """
    template = _Template.of(model.n_layer, model.n_expert)
    return template.fill(model.weight.astype("<f4").tobytes(), model.bias.astype("<f4").tobytes())


def on_onnxruntime(model: RouteModel) -> Score:
    """Have onnxruntime compute a model's map, with one thread.

    Raises:
        UsageError: onnxruntime is not installed.
    """
    check_extra("a learned predictor", "onnxruntime", otherwise="choose another predictor")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(to_onnx(model), options, providers=providers)

    def score(seen: Array) -> Array:
        scores: Array = session.run(None, {"seen": seen})[0]
        return scores

    return score


# The protocol buffers of ONNX, as much as a map of two nodes needs. Source: onnx.proto3.


@dataclass(frozen=True, slots=True)
class _Template:
    """The bytes around the two arrays of numbers, and how long those are."""

    texts: tuple[bytes, bytes, bytes]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, n_layer: int, n_expert: int) -> "_Template":
        check_shape(n_layer, n_expert)
        weight, bias = (n_layer, N_PARTS * n_expert, n_expert), (n_layer, 1, n_expert)
        sizes = 4 * math.prod(weight), 4 * math.prod(bias)
        heads = _tensor_head("weight", weight, sizes[0]), _tensor_head("bias", bias, sizes[1])
        # In front of each tensor of the graph: its field and its length, the numbers included.
        tensors = [
            _tag(5, 2) + _varint(len(head) + size) + head
            for head, size in zip(heads, sizes, strict=True)
        ]
        before = (
            _node("MatMul", ("seen", "weight"), "product")
            + _node("Add", ("product", "bias"), "scores")
            + _text(2, "routes")
        )
        after = _value(11, "seen", (n_layer, 1, N_PARTS * n_expert)) + _value(12, "scores", bias)
        n_graph = len(before) + sum(map(len, tensors)) + sum(sizes) + len(after)
        head = _number(1, _IR_VERSION) + _text(2, "edgeroute") + _tag(7, 2) + _varint(n_graph)
        opset = _message(8, _text(1, "") + _number(2, _OPSET))
        return cls((head + before + tensors[0], tensors[1], after + opset), sizes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return sum(map(len, self.texts)) + sum(self.sizes)

    def fill(self, weight: bytes, bias: bytes) -> bytes:
        """The file of these numbers."""
        return self.texts[0] + weight + self.texts[1] + bias + self.texts[2]

    def split(self, data: bytes) -> tuple[memoryview, memoryview] | None:
        """The numbers of a file; None where anything else in it is not the template's."""
        view = memoryview(data)
        first, second = len(self.texts[0]), self.sizes[0] + len(self.texts[0])
        third = second + len(self.texts[1])
        found = (view[:first], view[second:third], view[third + self.sizes[1] :])
        if len(data) != self.n_bytes or any(
            bytes(mine) != text for mine, text in zip(found, self.texts, strict=True)
        ):
            return None
        return view[first:second], view[third : third + self.sizes[1]]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _message(field: int, data: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    names = b"".join(_text(1, name) for name in inputs) + _text(2, output)
    return _message(1, names + _text(4, kind))


def _tensor_head(name: str, shape: Sequence[int], n_bytes: int) -> bytes:
    """All of a TensorProto but the bytes of its numbers, which come last."""
    dims = b"".join(_number(1, n) for n in shape)
    return dims + _number(2, _FLOAT) + _text(8, name) + _tag(_RAW, 2) + _varint(n_bytes)


def _value(field: int, name: str, shape: Sequence[int]) -> bytes:
    """A graph's input (11) or output (12): F32 of a fixed shape."""
    dims = b"".join(_message(1, _number(1, n)) for n in shape)
    return _message(
        field,
        _text(1, name) + _message(2, _message(1, _number(1, _FLOAT) + _message(2, dims))),
    )
