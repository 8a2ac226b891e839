"""The layout is untrusted input: doctored tables are refused, and nothing crashes.

A table with one field changed must be refused with a reason, or be of no account:
then every feature gets the answer that the true table gets. A crash is a failure
of the subprocess that asks.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from typing import Any

import pytest
from conftest import RunProgram

from anyfork import _anyfork

SEED = 20240613
WORD = 8
FEATURES = {"hop", "twin", "hooks", "stack", "attach"}

Answer = dict[str, list[str]]


def _table() -> tuple[bytes, int, bool]:
    table, version, debug = _anyfork._layout_table()
    return bytes(table), version, debug


def _changed(table: bytes) -> list[tuple[str, bytes]]:
    """(what was done, the doctored table) for each 8-byte field."""
    chance = random.Random(SEED)
    cases = []
    for at in range(0, len(table), WORD):
        (value,) = struct.unpack_from("<Q", table, at)
        values = {
            "+8": value + 8,
            "-8": value - 8,
            "+1": value + 1,
            "zero": 0,
            "huge": 2**64 - 8,
            "sign bit": 2**63,
            "a page too far": value + 4096,
            "random": chance.getrandbits(64),
            "random small": chance.randrange(0, 1 << 16) & ~7,
        }
        for what, new in values.items():
            if new % 2**64 == value:
                continue
            doctored = bytearray(table)
            struct.pack_into("<Q", doctored, at, new % 2**64)
            cases.append((f"word {at // WORD} {what}", bytes(doctored)))
    return cases


def _ask(run_program: RunProgram, cases: list[tuple[str, bytes, int, bool]]) -> list[Answer]:
    """What is found with each table, in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([(table.hex(), version, debug) for _, table, version, debug in cases], file)
        file.flush()
        done = run_program("layout_doctored", file.name, timeout=300, check=False)
    answers: list[Answer] = [json.loads(line) for line in done.out.splitlines()]
    if done.returncode != 0 or len(answers) != len(cases):
        culprit = cases[len(answers)][0] if len(answers) < len(cases) else "the end"
        pytest.fail(f"ended with {done.returncode} at {culprit}\n{done.err}")
    return answers


def _refused(answer: Answer) -> set[str]:
    assert set(answer) == FEATURES
    for feature, (state, why) in answer.items():
        assert state in ("ready", "refused"), (feature, state)
        assert (state == "refused") == bool(why), (feature, state, why)
    return {feature for feature, (state, _) in answer.items() if state == "refused"}


@pytest.fixture(scope="module")
def truth(run_program: RunProgram) -> Answer:
    """What the program finds with the true table."""
    table, version, debug = _table()
    return _ask(run_program, [("nothing", table, version, debug)])[0]


def test_the_true_table_is_accepted(truth: Answer) -> None:
    refused = _refused(truth)
    assert "hop" not in refused
    if "twin" in refused:  # named, not a surprise
        assert "free-threaded" in truth["twin"][1]


@pytest.mark.timeout(400)
def test_each_field_is_proved_or_of_no_account(run_program: RunProgram, truth: Answer) -> None:
    table, version, debug = _table()
    cases = [(what, doctored, version, debug) for what, doctored in _changed(table)]
    answers = _ask(run_program, cases)
    refused = 0
    used: set[str] = set()
    for (what, *_), answer in zip(cases, answers, strict=True):
        now = _refused(answer)
        # Never more than the truth allows; less only with a reason (_refused checks).
        assert _refused(truth) <= now, f"{what}: {answer}"
        if now != _refused(truth):
            refused += 1
            used.add(" ".join(what.split()[:2]))
    assert refused > 0
    print(f"{len(cases)} tables, {refused} refused; {len(used)} fields matter")


def _proved_words() -> dict[str, int]:
    """Fields that are written through or followed, by their place in the table."""
    words = {
        "cookie": 0,
        "version": 1,
        "free_threaded": 2,
        "runtime.interpreters_head": 5,
        "interpreter.id": 7,
        "interpreter.next": 8,
        "interpreter.threads_head": 9,
    }
    shift = 1 if sys.version_info >= (3, 14) else 0  # threads_main
    words["interpreter.ceval_gil"] = 14 + shift
    words["interpreter.gil"] = 15 + shift
    words["interpreter.gil_locked"] = 17 + shift
    words["interpreter.gil_holder"] = 18 + shift
    return words


def test_what_is_written_through_is_always_refused(run_program: RunProgram, truth: Answer) -> None:
    table, version, debug = _table()
    gil_matters = "twin" not in _refused(truth)
    cases = []
    for name, word in _proved_words().items():
        if "gil" in name and not gil_matters:
            continue
        for what, doctored in _changed(table):
            same_minor = doctored[WORD + 2 : 2 * WORD] == table[WORD + 2 : 2 * WORD]
            if what.startswith(f"word {word} ") and not (name == "version" and same_minor):
                cases.append((f"{name}: {what}", doctored, version, debug))
    for (what, *_), answer in zip(cases, _ask(run_program, cases), strict=True):
        feature = "twin" if "gil" in what else "hop"
        assert answer[feature][0] == "refused", f"{what}: {answer}"


def test_another_cpython_is_refused(run_program: RunProgram) -> None:
    table, version, debug = _table()
    minor = 1 << 16
    free = bytearray(table)
    free[2 * WORD] ^= 1
    of_next = bytearray(table)
    struct.pack_into("<Q", of_next, WORD, struct.unpack_from("<Q", table, WORD)[0] + minor)
    cases = [
        ("the next minor version runs", table, version + minor, debug),
        ("the one before runs", table, version - minor, debug),
        ("another major version runs", table, version + (1 << 24), debug),
        ("the other debug flag", table, version, not debug),
        ("the other free-threaded flag", bytes(free), version, debug),
        ("a table of the next minor version", bytes(of_next), version, debug),
        ("no cookie", b"XDEBUGPY" + table[WORD:], version, debug),
        ("zeros", bytes(len(table)), version, debug),
        ("ones", b"\xff" * len(table), version, debug),
        ("empty", b"", version, debug),
    ]
    cases += [(f"cut at {n}", table[:n], version, debug) for n in range(0, len(table), WORD)]
    for (what, *_), answer in zip(cases, _ask(run_program, cases), strict=True):
        assert _refused(answer) == FEATURES, f"{what}: {answer}"


def test_a_micro_version_is_no_reason(run_program: RunProgram, truth: Answer) -> None:
    table, version, debug = _table()
    micro = (version & ~0xFFFF) | (version + 0x100 & 0xFFFF)
    assert _ask(run_program, [("another micro", table, micro, debug)]) == [truth]


@pytest.mark.timeout(400)
def test_random_tables_crash_nothing(run_program: RunProgram, truth: Answer) -> None:
    """Many fields at once, the head left alone so that the rest is looked at."""
    table, version, debug = _table()
    chance = random.Random(SEED + 1)
    cases: list[tuple[str, bytes, int, bool]] = []
    for n in range(150):
        doctored = bytearray(table)
        for at in range(3 * WORD, len(table), WORD):
            if chance.random() < 0.15:
                small: Any = chance.choice((8, 16, 64, 4096, 1 << 20))
                value = struct.unpack_from("<Q", doctored, at)[0] + chance.choice((-1, 1)) * small
                struct.pack_into("<Q", doctored, at, value % 2**64)
        cases.append((f"random table {n}", bytes(doctored), version, debug))
    for (what, *_), answer in zip(cases, _ask(run_program, cases), strict=True):
        assert _refused(truth) <= _refused(answer), f"{what}: {answer}"
