"""How numbers are written for people: counts, durations, sizes, rates, learning rates."""


def format_count(count: float) -> str:
    """Three significant digits with a decimal suffix: 950, 12.3k, 1.24M, 3.4B, 2T."""
    value, suffixes = float(count), ["", "k", "M", "B", "T"]
    while abs(value) >= 999.5 and len(suffixes) > 1:
        value /= 1000
        suffixes.pop(0)
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text + suffixes[0]


def counted(count: int, noun: str) -> str:
    """1 file, 1,024 files."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def format_duration(seconds: float) -> str:
    """0.4s, 9.5s, 42s, 1m13s, 2h05m, 3d04h: the two largest units."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


def format_milliseconds(seconds: float) -> str:
    """Three significant digits: 83 ms, 8.31 ms, 5610 ms."""
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f} ms" if milliseconds >= 99.5 else f"{milliseconds:.3g} ms"


def format_scientific(value: float) -> str:
    """Two significant digits with a short exponent: 2.9e-4."""
    mantissa, exponent = f"{value:.1e}".split("e") if value else ("0", "0")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def format_size(number: float) -> str:
    """3.42 GiB, 512 MiB, 12 KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}" if number < 100 * unit else f"{number / unit:,.0f} {name}"
    return f"{number / 1024:,.0f} KiB"


def format_seconds(seconds: float) -> str:
    """1.24 s, 83.1 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
