"""Numbers as a reader takes them in."""


def scaled(amount: float, unit: str = "") -> str:
    """Three digits and a unit: 12.3 M, 12.3 MB."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= factor:
            value = amount / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
    return f"{amount:.0f} {unit}".rstrip()
