"""What of a text stands word for word in the text that the model was trained on."""

from __future__ import annotations

import numpy as np

LEAST = 40  # characters of a piece that counts: about a line of verse. Shorter ones are found in any two texts
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, and large enough for all 64 bits of a hash to be in use


def hashes(text: str) -> np.ndarray:
    """A hash, uint64, of each LEAST characters in a row: (len(text) - LEAST + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    found = np.zeros(max(0, len(codes) - LEAST + 1), dtype=np.uint64)
    for i in range(LEAST):
        found *= FACTOR  # modulo 2^64
        found += codes[i : i + len(found)]
    return found


class Verbatim:
    """A text in which pieces of others are looked up. Takes 8 bytes for each of its characters."""

    def __init__(self, source: str):
        self.known = np.sort(hashes(source))

    def covers(self, text: str) -> np.ndarray:
        """Of each character, does it belong to LEAST or more in a row that stand in the source? bool (len(text),)."""
        covered = np.zeros(len(text), dtype=bool)
        wanted = hashes(text)
        if not len(wanted) or not len(self.known):
            return covered
        places = np.searchsorted(self.known, wanted).clip(max=len(self.known) - 1)
        for start in np.flatnonzero(self.known[places] == wanted):
            covered[start : start + LEAST] = True
        return covered


def pieces(text: str, covered: np.ndarray) -> list[tuple[str, bool]]:
    """The text, cut where `covered`, bool (len(text),), changes: (piece, is it covered)."""
    found = []
    start = 0
    for end in [*(np.flatnonzero(np.diff(covered)) + 1), len(text)]:
        if start < end:
            found.append((text[start:end], bool(covered[start])))
        start = end
    return found
