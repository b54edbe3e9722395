"""Work in several threads."""

import threading
from collections.abc import Callable

__all__ = ["together"]


def together(*work: Callable[[], None]) -> None:
    """Run all at the same time, and raise what any of them raises."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            begin.wait()
            one()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
