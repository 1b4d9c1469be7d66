"""Whose turn it is: one generation at a time uses a program, in one thread at a time."""

import weakref
from collections.abc import Callable
from threading import Lock, Thread, current_thread
from typing import Protocol, TypeVar

from tokenloop.runner.errors import RunnerError

Done = TypeVar("Done")


class User(Protocol):
    """A generation. `is_finished` says whether it needs the program no more."""

    is_finished: bool


class Turn:
    """Which generation may use a program, and the lock of whoever is inside.

    A method gives Python's global lock away while it computes, and all that it reads and writes
    belongs to the program. So whoever uses the program holds the lock, and whoever comes meanwhile
    is refused before anything is touched. Nobody holds it between two tokens, so that a generation
    may be given up, collected, or continued by another thread.
    """

    def __init__(self):
        self._lock = Lock()
        # The generation that was begun last, which is not kept alive for this, and the thread that
        # used it last.
        self._user: Callable[[], User | None] = lambda: None
        self._thread: Thread | None = None

    def begin(self, user: User, prepare: Callable[[], None]) -> None:
        """Give the turn to `user`, once `prepare` has made the program ready for it. This ends a
        generation that is under way in this thread, or in one that has ended.

        Errors: RunnerError where the program is in use, or another thread's generation is under
        way, which go on; and what `prepare` raises, which changes nothing either.
        """
        with self._unlocked():
            last, thread = self._user(), self._thread
            is_under_way = last is not None and not last.is_finished
            if is_under_way and thread is not current_thread() and thread.is_alive():
                raise RunnerError(
                    f"a generation is under way on this model in the thread {thread.name!r}, and "
                    "its state is shared: finish or cancel that one first, or load the artifact "
                    "once for each thread"
                )
            prepare()
            self._user, self._thread = weakref.ref(user), current_thread()

    def use(self, user: User, action: Callable[[], Done]) -> Done:
        """The result of `action`, which uses the program for `user`. Errors: RunnerError where the
        turn is another's by now, or the program is in use, before `action` is called."""
        with self._unlocked():
            return self._use(user, action)

    def hold(self, user: User, action: Callable[[], Done]) -> Done:
        """As `use`, but where the program is in use it waits. For an action of many steps, which
        must not be refused because another thread was just being refused."""
        with self._lock:
            return self._use(user, action)

    def _use(self, user: User, action: Callable[[], Done]) -> Done:
        # Even the first step would overwrite the state of the generation that was begun later.
        if self._user() is not user:
            raise RunnerError(
                "another generation was started on this model, and its state is shared: "
                "finish one before you start the next"
            )
        self._thread = current_thread()
        return action()

    def _unlocked(self) -> Lock:
        """The lock, for a `with`, if nobody has it. Errors: RunnerError where somebody has.

        A thread that takes it in between is waited for, for one token at most. The lock's own
        `with` is worth that: no interrupt comes between taking the lock and being sure to give it
        back, as it may after acquire(blocking=False).
        """
        if self._lock.locked():
            raise RunnerError(
                "this model is in use, by another thread or by the generation that this call is "
                "made from, and its state is shared: wait until that is done, or load the artifact "
                "once for each"
            )
        return self._lock
