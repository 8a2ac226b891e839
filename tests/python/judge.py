"""What a child's outcome is worth: passed, known (and as known), or a failure."""

from __future__ import annotations

from typing import Any

import child_checks
from known_outcomes import known_outcome


def judge(area: str, kind: str, row: dict[str, Any]) -> None:
    """Fail unless the child ended as it has to, or as known_outcomes.py says."""
    check, code, text = row["check"], row["code"], row["text"]
    shown = f"{check}: {'hung' if code is None else f'ended with {code}'}\n{text}"
    known = known_outcome(area, check, kind)
    if known is None:
        assert code == child_checks.EXPECTED_CODE.get(check, 0), shown
        assert child_checks.EXPECTED_TEXT.get(check, "") in text, shown
        return
    changed = f"known_outcomes.py expects {known.outcome}, {known.text!r}: {shown}"
    if isinstance(known.outcome, int):
        assert code == known.outcome, changed
    else:
        assert code == 1 and known.outcome in text, changed
    assert known.text in text, changed
