"""The job queue: states, progress, cancellation, single flight, bounds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from workbench.lab.jobs import Job, JobCancelled, JobError, JobQueue

PATIENCE = 20.0


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(limit=3, history=4)
    yield queue
    queue.shutdown(timeout=PATIENCE)


class Gate:
    """A job that waits inside until it is let go on, with a point for cancellation on every turn."""

    def __init__(self) -> None:
        self.inside, self.go, self.runs = threading.Event(), threading.Event(), 0

    def __call__(self, job: Job, result: Any = "passed") -> Any:
        self.runs += 1
        self.inside.set()
        while not self.go.wait(0.005):
            job.check_cancelled()
        return result


def test_a_job_runs_and_reports(queue: JobQueue) -> None:
    gate, seen = Gate(), []

    def work(job: Job, text: str) -> str:
        job.progress(0.25, "quarter")
        seen.append((job.state, job.fraction, job.message, job.seconds_left))
        return gate(job, text.upper())

    job = queue.submit("shout", work, text="abc")
    assert gate.inside.wait(PATIENCE)
    assert not job.finished and job.result is None
    gate.go.set()
    assert queue.wait(job.id, PATIENCE) is job
    assert (job.state, job.result, job.fraction, job.error) == ("done", "ABC", 1.0, None)
    assert job.started is not None and job.ended is not None and job.created <= job.started <= job.ended
    [(state, fraction, message, left)] = seen
    assert (state, fraction, message) == ("running", 0.25, "quarter") and left is not None and left >= 0
    assert job.seconds_left is None


def test_the_time_left_is_extrapolated_from_the_speed(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def work(job: Job) -> None:
        assert job.seconds_left is None
        job.progress(0.2)
        gate(job)

    job = queue.submit("slow", work)
    assert gate.inside.wait(PATIENCE)
    monkeypatch.setattr("workbench.lab.jobs.time.monotonic", lambda: job._clock + 10.0)
    assert job.seconds_left == pytest.approx(40.0)
    monkeypatch.undo()
    gate.go.set()
    assert queue.wait(job.id, PATIENCE).state == "done"


def test_a_failure_is_a_sentence_and_its_traceback_stays_inside(queue: JobQueue) -> None:
    def work(job: Job) -> None:
        raise ValueError("layer 9 does not exist")

    job = queue.wait(queue.submit("bad", work).id, PATIENCE)
    assert (job.state, job.error, job.result) == ("failed", "layer 9 does not exist", None)
    assert job.traceback and "in work" in job.traceback and "Traceback" in job.traceback
    shown = json.dumps(job.summary())
    assert "layer 9" in shown and "Traceback" not in shown and __file__ not in shown


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (MemoryError(), "Not enough memory."),
        (SystemExit(3), "SystemExit: 3"),
        (RuntimeError("two\n lines"), "two lines"),
    ],
)
def test_every_kind_of_failure_leaves_the_worker_alive(queue: JobQueue, failure: BaseException, sentence: str) -> None:
    def work(job: Job) -> None:
        raise failure

    assert queue.wait(queue.submit("bad", work).id, PATIENCE).error == sentence
    assert queue.wait(queue.submit("good", lambda job: 5).id, PATIENCE).result == 5


def test_cancel_a_running_job(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit("endless", gate)
    assert gate.inside.wait(PATIENCE)
    queue.cancel(job.id)
    assert queue.wait(job.id, PATIENCE).state == "cancelled" and job.error is None
    with pytest.raises(JobError, match="'endless' is cancelled already"):
        queue.cancel(job.id)


def test_cancel_passes_through_a_handler_of_exceptions_and_stops_at_progress(queue: JobQueue) -> None:
    inside, go = threading.Event(), threading.Event()
    swallowed = []

    def work(job: Job) -> None:
        inside.set()
        go.wait(PATIENCE)
        try:
            job.progress(0.5)
        except Exception as error:
            swallowed.append(error)

    job = queue.submit("careless", work)
    assert inside.wait(PATIENCE)
    queue.cancel(job.id)
    go.set()
    assert queue.wait(job.id, PATIENCE).state == "cancelled"
    assert not swallowed and job.fraction == 0 and not issubclass(JobCancelled, Exception)


def test_cancel_a_waiting_job_at_once_and_it_never_runs(queue: JobQueue) -> None:
    first, second = Gate(), Gate()
    running = queue.submit("first", first)
    waiting = queue.submit("second", second)
    assert first.inside.wait(PATIENCE) and waiting.state == "queued"
    queue.cancel(waiting.id)
    assert waiting.state == "cancelled"
    first.go.set()
    assert queue.wait(running.id, PATIENCE).state == "done"
    assert queue.wait(queue.submit("third", lambda job: 1).id, PATIENCE).result == 1
    assert second.runs == 0


def test_jobs_run_one_at_a_time_in_order_and_are_listed_newest_first(queue: JobQueue) -> None:
    gate, order = Gate(), []
    first = queue.submit("0", gate)
    others = [queue.submit(str(number), lambda job, number: order.append(number), number=number) for number in (1, 2)]
    assert gate.inside.wait(PATIENCE) and [job.title for job in queue.jobs()] == ["2", "1", "0"]
    assert order == []
    gate.go.set()
    for job in (first, *others):
        queue.wait(job.id, PATIENCE)
    assert order == [1, 2]


def test_two_workers_run_two_jobs_together() -> None:
    queue = JobQueue(workers=2)
    meeting = threading.Barrier(2, timeout=PATIENCE)
    jobs = [queue.submit("meet", lambda job: meeting.wait()) for _ in range(2)]
    assert [queue.wait(job.id, PATIENCE).state for job in jobs] == ["done", "done"]
    queue.shutdown(PATIENCE)


def test_a_full_queue_refuses_in_words(queue: JobQueue) -> None:
    gate = Gate()
    queue.submit("running", gate)
    assert gate.inside.wait(PATIENCE)
    for number in range(3):
        queue.submit(str(number), lambda job: None)
    with pytest.raises(JobError, match="3 jobs are waiting already, the limit is 3: 'one more' was not queued"):
        queue.submit("one more", lambda job: None)
    gate.go.set()


def test_history_is_bounded_and_forgets_the_oldest(queue: JobQueue) -> None:
    jobs = []
    for number in range(7):
        jobs.append(queue.submit(str(number), lambda job: None))
        queue.wait(jobs[-1].id, PATIENCE)
    assert [job.title for job in queue.jobs()] == ["6", "5", "4", "3"]
    with pytest.raises(JobError, match=r"there is no job .* the last 4 ended ones are remembered"):
        queue.job(jobs[0].id)


def test_one_key_runs_once_at_a_time(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit("trace", gate, key="a")
    assert gate.inside.wait(PATIENCE)
    assert queue.submit("trace", gate, key="a") is job
    other = queue.submit("trace", lambda job: None, key="b")
    assert other is not job and queue.submit("trace", gate, key="b") is other
    gate.go.set()
    queue.wait(other.id, PATIENCE)
    again = queue.submit("trace", gate, key="a")
    assert again is not job
    queue.wait(again.id, PATIENCE)
    assert gate.runs == 2


def test_a_key_that_is_being_cancelled_starts_anew() -> None:
    queue, gate, release = JobQueue(), Gate(), threading.Event()

    def deaf(job: Job) -> str:
        gate.inside.set()
        release.wait(PATIENCE)
        return "did not listen"

    old = queue.submit("deaf", deaf, key="a")
    assert gate.inside.wait(PATIENCE)
    queue.cancel(old.id)
    new = queue.submit("again", lambda job: "fresh", key="a")
    assert new is not old
    release.set()
    assert queue.wait(new.id, PATIENCE).result == "fresh"
    assert (old.state, old.result) == ("done", "did not listen")  # it ended before it noticed: its result is real
    queue.shutdown(PATIENCE)


def test_single_flight_under_contention(queue: JobQueue) -> None:
    gate, jobs, start = Gate(), [], threading.Barrier(8)

    def press() -> None:
        start.wait(PATIENCE)
        jobs.append(queue.submit("trace", gate, key="same"))

    threads = [threading.Thread(target=press) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(jobs) == 8 and len(set(map(id, jobs))) == 1
    gate.go.set()
    queue.wait(jobs[0].id, PATIENCE)
    assert gate.runs == 1


def test_wait_times_out_and_refuses_to_deadlock(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit("slow", gate)
    with pytest.raises(TimeoutError, match=r"'slow' is still (queued|running) after 0.01 s"):
        queue.wait(job.id, 0.01)
    gate.go.set()
    inner = queue.submit("inner", lambda job: queue.wait(job.id))
    assert queue.wait(inner.id, PATIENCE).error == "a job cannot wait for another job of its own queue"


def test_shutdown_cancels_everything_and_refuses_new_jobs() -> None:
    queue, gate = JobQueue(), Gate()
    running, waiting = queue.submit("running", gate), queue.submit("waiting", lambda job: None)
    assert gate.inside.wait(PATIENCE)
    queue.shutdown(PATIENCE)
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert all(not thread.is_alive() and thread.daemon for thread in queue._threads)
    with pytest.raises(JobError, match="shut down"):
        queue.submit("late", lambda job: None)


def test_shutdown_names_a_job_that_does_not_listen() -> None:
    queue, release, inside = JobQueue(), threading.Event(), threading.Event()

    def deaf(job: Job) -> None:
        inside.set()
        release.wait(PATIENCE)

    queue.submit("deaf one", deaf)
    assert inside.wait(PATIENCE)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="still running: deaf one"):
        queue.shutdown(0.05)
    assert time.monotonic() - started < PATIENCE / 2
    release.set()
    queue.shutdown(PATIENCE)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "half", None])
def test_progress_refuses_what_is_not_a_fraction(queue: JobQueue, fraction: Any) -> None:
    job = queue.submit("bad", lambda job: job.progress(fraction))
    assert "progress is a number from 0 to 1" in str(queue.wait(job.id, PATIENCE).error)


def test_mistakes_are_named(queue: JobQueue) -> None:
    with pytest.raises(TypeError, match="'x' needs a function, got str"):
        queue.submit("x", "not callable")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0, 1, 1"):
        JobQueue(workers=0, limit=1, history=1)
