"""Stop strings in a text that comes in pieces: nothing of one ever goes out."""

from collections.abc import Sequence


class StopText:
    """Holds back what may be the beginning of a stop string.

    The text ends before the stop string that is whole first; of several that end together, before
    the longest. So it does not matter where pieces are cut.
    """

    def __init__(self, stops: Sequence[str]):
        """stops: texts of one character or more."""
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now; once a stop string is `found`, there is no more."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [
            (place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        kept = self._beginning(text)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back: no more text follows."""
        text, self._held = self._held, ""
        return text

    def _beginning(self, text: str) -> int:
        """The first place from which the text to its end begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        first = max(0, len(text) - longest)
        for place in range(first, len(text)):
            if any(stop.startswith(text[place:]) for stop in self._stops):
                return place
        return len(text)
