"""Formats durations for a job's status and the console of `qlora run`."""


def format_duration(seconds: float) -> str:
    """Format the duration in its two largest units, as kubectl does: `1h12m`, `45s`.

    It is rounded down, without padding. `seconds` is finite and not negative.
    """
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"
