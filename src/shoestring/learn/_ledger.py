"""What a state was taught: the chunks of every job, told by what their rows hold.

A job is one command: some rows of a data set, in order or shuffled by a seed, in chunks of one size. A chunk is told by
the hash of its rows' hashes, and a job that has ended also by the sum of all its rows' hashes, which is the same in any
order and any chunks. So:

- a job that was cut off goes on behind the chunks that were saved, without a look through the backbone at those before;
- rows that were taught by a job that has ended are found again, whatever their file is called now and in whatever order
  they are, as long as they are all there is, or stand before new rows as in a log that has grown;
- chunks that are met again among other rows are found where rows are in the same order and chunks.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

CHUNK = 256  # rows, where nobody says otherwise
NOTHING = "0" * 32  # `total_of` no rows
MOST = 4_000_000  # chunks: safetensors reads headers of up to 100 MB


@dataclass
class Job:
    """Rows taught by one command.

    Attributes
    ----------
    data, split : where they came from
    first, rows : the first of them, and how many, in the data set's own order
    chunk, shuffle : rows a chunk; seed of the order or None
    date : when it began
    ended : whether all of them were met
    total : `total_of` their hashes, once it has ended; "" if that is not known
    chunks : hashes of the chunks that were learnt, in that order
    """

    data: str
    split: str
    first: int
    rows: int
    chunk: int
    shuffle: int | None
    date: str
    ended: bool = False
    total: str = ""
    chunks: list[bytes] = field(default_factory=list)

    def __str__(self) -> str:
        return f"on {self.date[:10]} from {self.data} ({self.split})"


class Ledger:
    """The jobs of a state.

    Examples
    --------
    >>> ledger, rows = Ledger(), np.arange(64, dtype=np.uint8).reshape(4, 16)
    >>> job = ledger.plan("a.csv", "train", 4, lambda: rows, chunk=2)
    >>> for chunk in rows[:2], rows[2:]:
    ...     ledger.add(job, chunk_hash(chunk))
    >>> _ = ledger.end(job, Counter(job.chunks), total_of(rows))
    >>> ledger.plan("b.csv", "train", 4, lambda: rows[::-1])
    Traceback (most recent call last):
    ValueError: the 4 rows of b.csv were learnt on ... from a.csv (train): --again teaches them once more
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.forgotten: list[tuple[int, str]] = []  # of parts of jobs: rows, and `total_of` their hashes

    def plan(
        self,
        data: str,
        split: str,
        rows: int,
        hashes: Callable[[], np.ndarray],
        *,
        chunk: int | None = None,
        shuffle: int | None = None,
        same_order: bool = False,
        again: bool = False,
    ) -> Job:
        """The job that these rows call for: one that was cut off, or a new one on the rows that are not known.

        Parameters
        ----------
        data, split : where the rows come from
        rows : their number
        hashes : gives the hash of each row, (rows, 16), in the data set's order; called only if there are other jobs
        chunk : rows a chunk, or None: as the job that was cut off, else 256
        shuffle : seed of the order or None
        same_order : take the order of the job that was cut off instead
        again : teach rows that are known once more

        Raises
        ------
        ValueError
            If the rows are known, or the job that was cut off cannot go on.
        """
        cut_off = next((job for job in self.jobs if not job.ended and (job.data, job.split) == (data, split)), None)
        if cut_off is not None:
            refusal = _refusal(cut_off, rows, chunk, cut_off.shuffle if same_order else shuffle)
            if not refusal:
                return cut_off
            if not again:
                raise ValueError(refusal)
            cut_off.ended = True
        size = chunk or CHUNK
        n_chunks = sum(len(job.chunks) for job in self.jobs)
        if n_chunks + -(-rows // size) > MOST:
            raise ValueError(f"a state remembers {MOST:,} chunks and has {n_chunks:,}: give a --chunk above {size}")
        first = 0
        if self.jobs and not again:
            found = hashes()
            first = self._known_rows(found, data)
            order = np.arange(first, rows) if shuffle is None else first + shuffled(rows - first, shuffle)
            if (rows, total_of(found)) not in [*self.forgotten, self._all_forgotten()]:
                self._refuse_known_chunks(found[order], size)
        return Job(data, split, first, rows - first, size, shuffle, now())

    def add(self, job: Job, chunk: bytes) -> None:
        """Note that a chunk of a job has been learnt."""
        if not any(job is other for other in self.jobs):
            self.jobs.append(job)
        job.chunks.append(chunk)

    def end(self, job: Job, met: Counter[bytes], total: str) -> int:
        """Note that all rows of a job were met: their chunks, and `total_of` them.

        Returns
        -------
        int : chunks that were learnt before the job was cut off, and have not been met since: their rows were changed
        """
        gone = list((Counter(job.chunks) - met).elements())
        if gone:  # known chunks all the same, of rows that cannot be told otherwise
            job.chunks = list(met.elements())
            rows = len(gone) * job.chunk
            self.jobs.append(Job(job.data, job.split, 0, rows, job.chunk, job.shuffle, job.date, True, "", gone))
        job.ended, job.total = True, total
        return len(gone)

    def forget(self, hashes: np.ndarray) -> None:
        """Note that rows were taken out: a job whose rows have all gone, at once or one part after the other, may come
        again."""
        gone = len(hashes), total_of(hashes)
        if not self._drop(gone):
            self.forgotten.append(gone)
            if self._drop(self._all_forgotten()):
                self.forgotten = []

    def _all_forgotten(self) -> tuple[int, str]:
        total = NOTHING
        for _, part in self.forgotten:
            total = add_totals(total, part)
        return sum(rows for rows, _ in self.forgotten), total

    def clear(self) -> None:
        """Note that no row is left."""
        self.jobs, self.forgotten = [], []

    def _drop(self, gone: tuple[int, str]) -> bool:
        job = next((job for job in self.jobs if job.total and (job.rows, job.total) == gone), None)
        if job is not None:
            self.jobs = [other for other in self.jobs if other is not job]
        return job is not None

    def _known_rows(self, hashes: np.ndarray, data: str) -> int:
        """How many rows, from the first on, are those of jobs that have ended; not all of them."""
        first, jobs = 0, []
        while True:
            longest: Job | None = None
            total, end = NOTHING, first
            for job in sorted((job for job in self.jobs if job.total and job.rows), key=lambda job: job.rows):
                if first + job.rows > len(hashes):
                    break
                total, end = add_totals(total, total_of(hashes[end : first + job.rows])), first + job.rows
                if total == job.total:
                    longest = job
            if longest is None:
                break
            jobs.append(longest)
            first += longest.rows
        if jobs and first == len(hashes):
            where = " and ".join(dict.fromkeys(map(str, jobs)))
            forgotten = self._all_forgotten()[0]
            since = f" ({forgotten:,} rows were forgotten since)" if forgotten else ""
            raise ValueError(f"the {first:,} rows of {data} were learnt {where}{since}: --again teaches them once more")
        return first

    def _refuse_known_chunks(self, hashes: np.ndarray, size: int) -> None:
        known = {chunk: job for job in self.jobs for chunk in job.chunks}
        new = [chunk_hash(hashes[start : start + size]) for start in range(0, len(hashes), size)]
        met = [known[chunk] for chunk in new if chunk in known]
        if met:
            job = met[0]
            cut_off = "" if job.ended else ", in a job that was cut off and can go on by the same command"
            raise ValueError(
                f"{len(met):,} of {len(new):,} chunks of {size} rows were learnt {job}{cut_off}: "
                "--again teaches all of them once more"
            )

    def to_json(self) -> dict[str, Any]:
        jobs = [{**vars(job), "chunks": base64.b64encode(b"".join(job.chunks)).decode()} for job in self.jobs]
        return {"jobs": jobs, "forgotten": self.forgotten}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Ledger:
        ledger = cls()
        for job in read.get("jobs", []):
            packed = base64.b64decode(job["chunks"])
            ledger.jobs.append(Job(**{**job, "chunks": [packed[i : i + 16] for i in range(0, len(packed), 16)]}))
        ledger.forgotten = [(rows, total) for rows, total in read.get("forgotten", [])]
        return ledger


def _refusal(job: Job, rows: int, chunk: int | None, shuffle: int | None) -> str:
    """Why a job that was cut off cannot go on, "" if it can."""
    begun = f"the job on {job.data} ({job.split}) that was begun on {job.date[:10]} and cut off"
    if chunk not in (None, job.chunk):
        return f"{begun} goes on with --chunk {job.chunk} only, got {chunk}; --again begins another"
    if shuffle != job.shuffle:
        return f"{begun} goes on {'without' if job.shuffle is None else 'with'} --shuffle only; --again begins another"
    if rows < job.first + job.rows:
        return (
            f"{begun} cannot go on: there were {job.first + job.rows:,} rows, now there are {rows:,}; "
            "--again begins another"
        )
    return ""


def shuffled(n: int, seed: int) -> np.ndarray:
    """The order of a job's rows. Every job that was cut off depends on it: it must never change."""
    return np.random.default_rng(seed).permutation(n)


def chunk_hash(hashes: np.ndarray) -> bytes:
    """16 bytes that tell these rows in this order; hashes: (n, 16), uint8."""
    return hashlib.blake2b(hashes.tobytes(), digest_size=16).digest()


def total_of(hashes: np.ndarray) -> str:
    """The sum of row hashes (n, 16) modulo 2^128, which tells the rows in any order; hexadecimal.

    >>> a, b = np.eye(2, 16, dtype=np.uint8)
    >>> total_of(np.stack([a, b])) == total_of(np.stack([b, a])) == add_totals(total_of(a[None]), total_of(b[None]))
    True
    """
    words = np.ascontiguousarray(hashes).view("<u4").astype(np.uint64).sum(0)  # (4,), exact below 2^32 rows
    return f"{sum(int(word) << 32 * i for i, word in enumerate(words)) % 2**128:032x}"


def add_totals(a: str, b: str) -> str:
    """The `total_of` two sets of rows together."""
    return f"{(int(a, 16) + int(b, 16)) % 2**128:032x}"


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
