"""Stop texts in text that comes in pieces, and the text of one row."""

from __future__ import annotations

from collections.abc import Sequence

from ssm_modal.tokenizers.base import StreamDecoder


class StopMatcher:
    """Passes text through until a stop text shows up, wherever the pieces break it.

    `push` gives the text that is certain to stay: an end that may yet become a stop text is held back. Once a
    stop text is complete, `stopped` is True and it and all behind it are dropped. Of several, the first
    completed counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """The part of the text so far that has become certain."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        out = []
        # One character at a time, so that the first stop text to complete is found however the text is cut.
        for char in text:
            self._held += char
            hit = max((s for s in self.stops if self._held.endswith(s)), key=len, default=None)
            if hit is not None:
                out.append(self._held[: -len(hit)])
                self._held, self.stopped = "", True
                break
            keep = self._pending()
            cut = len(self._held) - keep
            out.append(self._held[:cut])
            self._held = self._held[cut:]
        return "".join(out)

    def finish(self) -> str:
        """The text still held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        for n in range(min(len(self._held), max(map(len, self.stops)) - 1), 0, -1):
            end = self._held[-n:]
            if any(stop.startswith(end) for stop in self.stops):
                return n
        return 0


class RowText:
    """The text of one row as its tokens come: decoded, searched for stop texts, collected."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        return self._keep(self._matcher.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._matcher.push(self._decoder.finish())
        return self._keep(rest + self._matcher.finish())

    def _keep(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text
