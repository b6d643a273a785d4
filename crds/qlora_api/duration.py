"""Writes durations for people: the same text in a job's status and on the console of `qlora run`."""


def format_duration(seconds: float) -> str:
    """The duration in its two largest units, rounded down and without padding, as kubectl writes ages: `1h12m`, `45s`.

    `seconds` is finite and not negative.
    """
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"
