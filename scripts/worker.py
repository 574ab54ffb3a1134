"""A process that calls functions for this one, with limits on time and memory, and may die of them."""

import faulthandler
import multiprocessing
import os
import pathlib
import resource
import signal

START_SECONDS = 600  # of a process, to import Keras: 5 on an idle machine


class WorkerEndedError(Exception):
    """The worker died, or was stopped at its time limit: the message says which."""


class Worker:
    """A process that calls functions; where one kills it, another process takes its place."""

    def __init__(self, seconds, memory_bytes, prepare=int):
        self._seconds, self._arguments = seconds, (prepare, memory_bytes)
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()  # else this process would not see that the other one has ended
        if not self._connection.poll(START_SECONDS):
            raise WorkerEndedError(f"did not start within {START_SECONDS} s")
        self._connection.recv()

    def ask(self, function, content):
        """Returns function(content); raises WorkerEndedError where there is no answer."""
        self._connection.send((function, content))
        if self._connection.poll(self._seconds):
            try:
                return self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
            code = self._process.exitcode
            text = f"died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        else:
            os.kill(self._process.pid, signal.SIGABRT)  # faulthandler then says where it was
            self._process.join(5)
            text = f"no answer within {self._seconds} s"
        self.stop()
        self._start()
        raise WorkerEndedError(text)

    def stop(self):
        """Ends the process."""
        self._process.kill()
        self._process.join()


def serve(connection, prepare, memory_bytes):
    """Answers (function, content) with function(content), until the other side is gone."""
    faulthandler.enable()
    prepare()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while True:
        function, content = connection.recv()
        connection.send(function(content))
