"""Ctrl-C and the scheduler's SIGTERM, kept until a step is finished, so that the run can be saved where it stands."""

import signal
import threading


class StopRequest:
    """A context: `asked` turns true at the first SIGINT or SIGTERM; a second one acts at once, as without this."""

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        self._restore()

    def _note(self, *_):
        self.asked = True
        self._restore()

    def _restore(self):
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
