"""edgeroute in a desktop program: a window that streams an answer and stays alive meanwhile.

pip install PySide6 && python examples/embed_qt.py [MODEL]
"""

import sys

from PySide6.QtCore import QObject, QThread, Signal, Slot
from PySide6.QtWidgets import (
    QApplication,
    QLineEdit,
    QPlainTextEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

import edgeroute


class Writer(QObject):
    """Lives in a thread of its own: loading and answering block that one, never the window."""

    text = Signal(str)
    ended = Signal(str)

    def __init__(self, model: str | None) -> None:
        super().__init__()
        self._model = model
        self._runtime: edgeroute.Runtime | None = None
        self._stream = None

    @Slot(str)
    def answer(self, question: str) -> None:
        """Stream an answer; the model is loaded for the first one."""
        try:
            if self._runtime is None:
                self._runtime = edgeroute.Runtime(self._model, n_ctx=2048)
            messages = [{"role": "user", "content": question}]
            self._stream = self._runtime.stream(messages=messages, max_tokens=256)
            for chunk in self._stream:
                self.text.emit(chunk.text)
                if chunk.generation is not None:
                    stats = chunk.generation.stats
                    self.ended.emit(f"\n[{stats.n_generated} tokens, {stats.decode_tok_s:.0f} "
                                    f"tok/s, {chunk.finish_reason}]\n\n")  # fmt: skip
        except edgeroute.EdgerouteError as error:
            self.ended.emit(f"\n[{error}]\n\n")

    def stop(self) -> None:
        """End the answer under way; may be called from any thread."""
        if self._stream is not None:
            self._stream.cancel()

    @Slot()
    def close(self) -> None:
        """Free the model."""
        if self._runtime is not None:
            self._runtime.close()


class Window(QWidget):
    """A line to ask, a text to read, a button to stop."""

    ask = Signal(str)
    leave = Signal()

    def __init__(self, model: str | None) -> None:
        super().__init__()
        self.setWindowTitle("edgeroute")
        self.line, self.page, self.button = QLineEdit(), QPlainTextEdit(), QPushButton("Stop")
        self.line.setPlaceholderText("Ask something, then press Enter")
        self.page.setReadOnly(True)
        column = QVBoxLayout(self)
        for each in (self.page, self.line, self.button):
            column.addWidget(each)
        self.thread_, self.writer = QThread(self), Writer(model)
        self.writer.moveToThread(self.thread_)
        self.ask.connect(self.writer.answer)
        self.leave.connect(self.writer.close)
        self.writer.text.connect(self.page.insertPlainText)
        self.writer.ended.connect(self.end)
        self.line.returnPressed.connect(self.begin)
        self.button.clicked.connect(self.writer.stop)
        self.thread_.start()

    def begin(self) -> None:
        """Put a question."""
        self.page.insertPlainText(f"> {self.line.text()}\n")
        self.line.setEnabled(False)
        self.ask.emit(self.line.text())

    def end(self, text: str) -> None:
        """Take the next question."""
        self.page.insertPlainText(text)
        self.line.clear()
        self.line.setEnabled(True)
        self.line.setFocus()

    def closeEvent(self, event: object) -> None:
        """Stop, free the model, and wait for the thread."""
        self.writer.stop()
        self.leave.emit()
        self.thread_.quit()
        self.thread_.wait()


if __name__ == "__main__":
    program = QApplication(sys.argv)
    window = Window(sys.argv[1] if len(sys.argv) > 1 else None)
    window.resize(640, 480)
    window.show()
    sys.exit(program.exec())
