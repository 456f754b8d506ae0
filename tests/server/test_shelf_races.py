"""The shelf under threads that lease, leave, unload, break and abandon as they like."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeroute.pool_shelf import NobodyWaits, Shelf
from edgeroute.runtime.errors import CapacityError, ClosedError, EdgerouteError
from edgeroute.shelf_plan import ShelfModel
from tests.server.fleet_lab import NAMES, PROMPT, bytes_of, make_files, shelf_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ShelfModel]:
    files = make_files(tmp_path_factory.mktemp("shelf"))
    return [shelf_model(name, path) for name, path in files.items()]


class Storm:
    """Threads at one shelf; what they see is counted."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.seen = shelf, Counter[str]()
        self.wrong: list[str] = []
        self._stop = threading.Event()

    def watch(self) -> None:
        """Look for what must never be, as often as can be."""
        while not self._stop.is_set():
            used = self.shelf.used_bytes
            if used > self.shelf.budget_bytes:
                self.wrong.append(f"{used} bytes are used")
            if any(each.n_leases < 0 for each in self.shelf.places.values()):
                self.wrong.append("a lease was given back twice")
            time.sleep(0.0005)

    def lease(self, seed: int) -> None:
        dice = random.Random(seed)
        for turn in range(15):
            left = threading.Event()
            wait_s = dice.choice([0.0, 0.01, 5.0, None])
            if dice.random() < 0.3:
                threading.Timer(0.01 * dice.random(), self._leave, (left,)).start()
            try:
                with self.shelf.lease(dice.choice(NAMES), wait_s, left) as lease:
                    self._use(lease, dice, turn)
            except (NobodyWaits, CapacityError) as error:
                self.seen[type(error).__name__] += 1
            except ClosedError:
                self.seen["died"] += 1

    def _use(self, lease: object, dice: random.Random, turn: int) -> None:
        runtime = lease.runtime  # type: ignore[attr-defined]
        try:
            answer = runtime.generate(PROMPT, max_tokens=dice.randrange(1, 6))
        except ClosedError:
            lease.broke()  # type: ignore[attr-defined]
            raise
        self.seen["answers"] += len(answer.token_ids) > 0 or answer.finish_reason == "stop"
        if dice.random() < 0.1:
            runtime.close()
            lease.broke()  # type: ignore[attr-defined]

    def _leave(self, left: threading.Event) -> None:
        left.set()
        self.shelf.wake()

    def unload(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(30):
            self.seen["unloaded"] += self.shelf.unload(dice.choice(NAMES))
            self.seen["unused"] += self.shelf.close_unused(0.02)
            lease = self.shelf.try_lease(dice.choice(NAMES))
            if lease is not None:
                self.seen["at once"] += 1
                lease.close()
                lease.close()  # twice is once
            time.sleep(0.003 * dice.random())

    def end(self) -> None:
        self._stop.set()


@pytest.mark.parametrize("room", [1, 2, 3])
def test_whatever_comes_bytes_and_leases_add_up(models: list[ShelfModel], room: int) -> None:
    with Shelf(models, room * bytes_of(models[0]), "test") as shelf:
        storm = Storm(shelf)
        watcher = threading.Thread(target=storm.watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(10) as threads:
                work = [threads.submit(storm.lease, seed) for seed in range(8)]
                work += [threads.submit(storm.unload, 100 + seed) for seed in range(2)]
                for each in work:
                    each.result(60)
        finally:
            storm.end()
            watcher.join()
        assert not storm.wrong
        assert storm.seen["answers"] > 20
        assert shelf.n_waiting == 0 and not any(each.n_leases for each in shelf.places.values())
        assert {each.state for each in shelf.places.values()} <= {"open", "closed"}
        for name in NAMES:  # and all still answer
            with shelf.lease(name, 30) as lease:
                assert lease.runtime.generate(PROMPT, max_tokens=1) is not None
    assert shelf.used_bytes == 0


def test_closing_in_the_middle_of_it_ends_all_threads(models: list[ShelfModel]) -> None:
    shelf = Shelf(models, 2 * bytes_of(models[0]), "test")
    ends: list[EdgerouteError] = []

    def lease(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while True:
                with shelf.lease(dice.choice(NAMES)) as lease:
                    lease.runtime.generate(PROMPT, max_tokens=3)
        except EdgerouteError as error:
            ends.append(error)

    threads = [threading.Thread(target=lease, args=(seed,)) for seed in range(6)]
    for each in threads:
        each.start()
    time.sleep(0.2)
    shelf.close()
    for each in threads:
        each.join(20)
    assert not any(each.is_alive() for each in threads)
    assert [type(each) for each in ends] == [ClosedError] * 6
    assert shelf.used_bytes == 0 and shelf.n_waiting == 0


def test_a_folder_of_adapters_that_is_missing_is_an_error_and_an_empty_one_is_none(
    models: list[ShelfModel], tmp_path: Path
) -> None:
    """A mistyped folder that was silently ignored would be an adapter silently ignored."""
    path = models[0].path
    with pytest.raises(EdgerouteError, match="no-such"):
        bytes_of(shelf_model("red", path, adapters=(str(tmp_path / "no-such"),)))
    empty = shelf_model("red", path, adapters=(str(tmp_path),))
    assert bytes_of(empty) >= bytes_of(models[0])
    assert empty.settings().adapters == () and empty.params.adapters == (str(tmp_path),)
