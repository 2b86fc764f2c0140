"""Jobs: long work in threads of this process, one at a time, with progress and cancellation.

    queue = JobQueue()
    job = queue.submit("Trace a text", trace, text=text)      # calls trace(job, text=text) in a worker
    queue.wait(job.id).result

The function reports `job.progress(fraction, message)` now and then and returns its result, for example a run id. A
model that is loaded in the process is shared with its jobs, which is why they are threads and not processes. A
cancelled job stops at its next `progress` or `check_cancelled`; nothing can stop a function that calls neither.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from workbench.lab.run_format import did_you_mean

__all__ = ["Job", "JobCancelled", "JobError", "JobQueue"]

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = (DONE, FAILED, CANCELLED)


class JobError(RuntimeError):
    """The queue cannot do what was asked: it is full, shut down, or does not know the job."""


class JobCancelled(BaseException):
    """Raised inside a job's function when the job was cancelled.

    Not an Exception, so that a function that catches its own failures does not swallow it.
    """


class Job:
    """One piece of work.

    Fields may be read at any time from any thread; `summary` is a consistent copy for a client.

    `state` is queued, running, done, failed or cancelled; `fraction` runs from 0 to 1; `result` is what the
    function returned; `error` is a sentence for people and `traceback` the full one, for logs only. Times are
    seconds since the epoch.
    """

    def __init__(self, title: str, key: str | None, changed: threading.Condition):
        self.id = secrets.token_hex(6)
        self.title = title
        self.key = key
        self.state = QUEUED
        self.fraction = 0.0
        self.message = ""
        self.result: Any = None
        self.error: str | None = None
        self.traceback: str | None = None
        self.cancelling = False
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self._clock = 0.0
        self._changed = changed

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the job ends, from its speed so far; None before the first progress and after the
        end.
        """
        if self.state != RUNNING or self.fraction <= 0:
            return None
        return (time.monotonic() - self._clock) * (1 - self.fraction) / self.fraction

    def progress(self, fraction: float, message: str = "") -> None:
        """Report the part that is done, 0 to 1, and what is going on. Also a point where a cancelled job stops."""
        self.check_cancelled()
        if not (isinstance(fraction, (int, float)) and math.isfinite(fraction) and 0 <= fraction <= 1):
            raise ValueError(f"progress is a number from 0 to 1, got {fraction!r}")
        with self._changed:
            self.fraction, self.message = float(fraction), message
            self._changed.notify_all()

    def check_cancelled(self) -> None:
        """Raise JobCancelled when the job has been cancelled."""
        if self.cancelling:
            raise JobCancelled(self.title)

    def summary(self) -> dict[str, Any]:
        """What a client may see, as plain values: not the traceback, and not the result, which may be anything."""
        with self._changed:
            return {
                "id": self.id,
                "title": self.title,
                "state": self.state,
                "fraction": self.fraction,
                "message": self.message,
                "seconds_left": self.seconds_left,
                "error": self.error,
                "cancelling": self.cancelling,
                "created": self.created,
                "started": self.started,
                "ended": self.ended,
            }

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.title!r}: {self.state}, {self.fraction:.0%}>"


class JobQueue:
    """Runs submitted functions in `workers` daemon threads, in order of submission.

    `limit`: jobs that may wait; `history`: finished jobs that are remembered, the oldest forgotten first.
    """

    def __init__(self, workers: int = 1, limit: int = 32, history: int = 100):
        if min(workers, limit, history) < 1:
            raise ValueError(f"workers, limit and history must be at least 1, got {workers}, {limit}, {history}")
        self._workers, self._limit, self._history = workers, limit, history
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[Job, Callable[..., Any], dict[str, Any]]] = deque()
        self._jobs: dict[str, Job] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, title: str, function: Callable[..., Any], *, key: str | None = None, **arguments: Any) -> Job:
        """Queue `function(job, **arguments)` and return its job.

        With a `key`, a job of the same key that is queued or running, and not being cancelled, is returned instead of
        starting the same work twice. JobError when `limit` jobs wait already or the queue is shut down.
        """
        if not callable(function):
            raise TypeError(f"job {title!r} needs a function, got {type(function).__name__}")
        with self._changed:
            if self._closed:
                raise JobError(f"the job queue is shut down: {title!r} was not started")
            for job in self._jobs.values():
                if key is not None and job.key == key and not job.finished and not job.cancelling:
                    return job
            if len(self._waiting) >= self._limit:
                raise JobError(
                    f"{len(self._waiting)} jobs are waiting already, the limit is {self._limit}: "
                    f"{title!r} was not queued. Cancel some, or wait until one has ended."
                )
            job = Job(title, key, self._changed)
            self._jobs[job.id] = job
            self._waiting.append((job, function, arguments))
            if len(self._threads) < self._workers:
                name = f"workbench-job-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()
            return job

    def job(self, job_id: str) -> Job:
        """The job with this id; JobError when there is none, or none any more."""
        with self._changed:
            if job_id not in self._jobs:
                near = did_you_mean(str(job_id), self._jobs)
                raise JobError(f"there is no job {job_id!r}; the last {self._history} ended ones are remembered.{near}")
            return self._jobs[job_id]

    def jobs(self) -> list[Job]:
        """All jobs that are waiting, running or remembered, newest first."""
        with self._changed:
            return list(reversed(self._jobs.values()))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once when it waits, at its next progress when it runs.

        JobError when it has ended already.
        """
        with self._changed:
            job = self.job(job_id)
            if job.finished:
                raise JobError(f"job {job.title!r} is {job.state} already and cannot be cancelled")
            job.cancelling = True
            if job.state == QUEUED:
                self._waiting = deque(item for item in self._waiting if item[0] is not job)
                self._end(job, CANCELLED)
            self._changed.notify_all()
            return job

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Wait until a job has ended, in whatever state, and return it. TimeoutError after `timeout` seconds.

        Inside a job of the same queue it is a JobError: the worker would wait for itself.
        """
        if threading.current_thread() in self._threads:
            raise JobError("a job cannot wait for another job of its own queue")
        with self._changed:
            job = self.job(job_id)
            if not self._changed.wait_for(lambda: job.finished, timeout):
                raise TimeoutError(f"job {job.title!r} is still {job.state} after {timeout} s")
            return job

    def shutdown(self, timeout: float | None = None) -> None:
        """Cancel everything, refuse new jobs and wait for the workers.

        TimeoutError names a job that goes on regardless.
        """
        with self._changed:
            self._closed = True
            for job in [job for job in self._jobs.values() if not job.finished]:
                self.cancel(job.id)
            self._changed.notify_all()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        still = [job.title for job in self.jobs() if not job.finished]
        if still:
            raise TimeoutError(f"after {timeout} s still running: {', '.join(still)}")

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job, function, arguments = self._waiting.popleft()
                job.state, job.started, job._clock = RUNNING, time.time(), time.monotonic()
                self._changed.notify_all()
            self._run(job, function, arguments)
            # The arguments may hold a model or large arrays; do not keep them until the next job comes.
            del job, function, arguments

    def _run(self, job: Job, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        state, result, error, trace = DONE, None, None, None
        try:
            result = function(job, **arguments)
        except JobCancelled:
            state = CANCELLED
        except BaseException as failure:  # a job that calls sys.exit must not take the worker with it
            state, error, trace = FAILED, describe_failure(failure), traceback.format_exc()
        with self._changed:
            job.result, job.error, job.traceback = result, error, trace
            if state == DONE:
                job.fraction = 1.0
            self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.state, job.ended = state, time.time()
        finished = [other for other in self._jobs.values() if other.finished]
        for other in sorted(finished, key=lambda one: one.ended or 0.0)[: max(0, len(finished) - self._history)]:
            del self._jobs[other.id]
        self._changed.notify_all()


def describe_failure(failure: BaseException) -> str:
    """One failure as a sentence for people: the message, and the kind of failure where the message alone says too
    little.
    """
    message = " ".join(str(failure).split())[:500]
    if isinstance(failure, MemoryError):
        return f"Not enough memory. {message}".strip()
    if message and isinstance(failure, (ValueError, RuntimeError, TimeoutError)):
        return message
    return f"{type(failure).__name__}: {message}" if message else type(failure).__name__
