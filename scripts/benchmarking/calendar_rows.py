"""Text that shallow layers can learn within minutes: a day of the calendar, and the days that follow.

    rows = calendar_rows(days=8)   # {"source": "monday 30 april", "target": "tuesday 1 may, ..."}

Most pieces of a name follow from the piece before, a day's number from that of the day before, and only the
end of a month asks for more.
"""

from __future__ import annotations

import random
from itertools import product

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = {
    "january": 31, "february": 28, "march": 31, "april": 30, "may": 31, "june": 30, "july": 31, "august": 31,
    "september": 30, "october": 31, "november": 30, "december": 31,
}  # fmt: skip
DATES = [f"{day} {month}" for month, length in MONTHS.items() for day in range(1, length + 1)]


def calendar_rows(days: int, seed: int = 0) -> list[dict[str, str]]:
    """Each weekday with each date of a year without a leap day, and the `days` days after it; in an order of
    `seed`."""
    rows = [continue_calendar(weekday, date, days) for weekday, date in product(range(7), range(len(DATES)))]
    random.Random(seed).shuffle(rows)
    return rows


def continue_calendar(weekday: int, date: int, days: int) -> dict[str, str]:
    named = [
        f"{WEEKDAYS[(weekday + step) % 7]} {DATES[(date + step) % len(DATES)]}" for step in range(days + 1)
    ]
    return {"source": named[0], "target": ", ".join(named[1:])}
