"""Numbers with a noun, and names with an article, for messages."""


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, which is in the plural unless the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def with_article(name: str) -> str:
    """Return a name behind "a" or "an", by how it is spoken: an int, a uint8, an LSTM, a Memformer."""
    start = name.lower()
    is_vowel = start.startswith(("a", "e", "i", "o", "u", "lstm")) and not start.startswith(("uint", "uni"))
    return f"{'an' if is_vowel else 'a'} {name}"
